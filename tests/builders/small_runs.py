"""Tiny real inputs for the stages: an LLM, a vision tower and a slice of the bundled data, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModel, AutoModelForCausalLM

from modeling_llm2clip import EVA02VisionModel
from tests.builders import tiny

DATA = Path(__file__).resolve().parents[2] / "examples" / "data"
CONCEPTS = str(DATA / "concepts")
GLOSSES = str(DATA / "glosses")
# Settings of both stages.
SMALL: dict[str, Any] = {
    "warmup_steps": 0, "max_steps": 6, "logging_steps": 1, "save_steps": 3, "report_to": "none", "use_cpu": True,
    "seed": 7,
}  # fmt: skip


def save_llm(folder: Path) -> str:
    """A causal LLM with its tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny.decoder_config()).save_pretrained(folder)
    tiny.plain_tokenizer().save_pretrained(folder)
    return str(folder)


def save_vision_tower(folder: Path, **fields: Any) -> str:
    """An EVA02 tower with its image processor, 28 pixels."""
    torch.manual_seed(0)
    EVA02VisionModel(tiny.vision_config(**{"initializer_range": 0.1, **fields})).save_pretrained(folder)
    return _with_image_processor(folder)


def save_dinov2_tower(folder: Path) -> str:
    """A DINOv2 tower with its image processor, whose weights have other names in files than in transformers 5.23."""
    torch.manual_seed(0)
    AutoModel.from_config(tiny.other_vision_config("dinov2")).save_pretrained(folder)
    return _with_image_processor(folder)


def _with_image_processor(folder: Path) -> str:
    tiny.processor().image_processor.save_pretrained(folder)
    return str(folder)


def write_text_pairs(path: Path, rows: int) -> str:
    """Write a table of pairs of texts, `short` and `long`; each short text stands in two rows."""
    columns = {
        "short": [f"a picture of thing {number // 2}" for number in range(rows)],
        "long": [f"thing {number} in another picture, with a few more words about it" for number in range(rows)],
    }
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return str(path)


def concepts(split: str = "train", **fields: Any) -> dict[str, Any]:
    """A source of captioned images."""
    return {"path": CONCEPTS, "split": split, "caption_columns": ["caption", "keywords"], "max_samples": 96, **fields}


def rows_of_concepts(rows: str = "", split: str = "test") -> datasets.Dataset:
    """The captioned images themselves; `rows` is a slice of them, as `:24`."""
    return datasets.load_dataset("parquet", data_files=f"{CONCEPTS}/{split}.parquet", split=f"train[{rows or ':'}]")


def pair_sources() -> list[dict[str, Any]]:
    """The two sources of stage 1."""
    return [
        {"path": GLOSSES, "anchor_column": "lemmas", "positive_column": "gloss"},
        {"path": CONCEPTS, "caption_columns": ["caption", "keywords"]},
    ]


def stage1_fields(folder: Path, llm: str) -> dict[str, Any]:
    """Settings of a small stage 1."""
    return {
        "model_name_or_path": llm,
        "output_dir": str(folder),
        "sources": pair_sources(),
        "prompt_prefix": tiny.PREFIX,
        "prompt_suffix": tiny.SUFFIX,
        "max_text_length": 64,
        "lora_rank": 4,
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 8,
        **SMALL,
    }


def stage2_fields(folder: Path, vision: str, text: str, cache: str) -> dict[str, Any]:
    """Settings of a small stage 2."""
    return {
        "vision_model_name_or_path": vision,
        "text_model_name_or_path": text,
        "embedding_cache": cache,
        "output_dir": str(folder),
        "sources": [concepts()],
        "eval_sources": {"validation": concepts("validation", caption_columns=["caption"], max_samples=40)},
        "projection_dim": 24,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 16,
        **SMALL,
    }

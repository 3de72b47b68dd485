"""The `evaluate` job: a saved model on a data set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoProcessor

from llm2clip.data import CaptionSource, PairSource
from llm2clip.embedding import EmbeddingCache
from llm2clip.evaluation.caption_pairs import CaptionRetrieval
from llm2clip.evaluation.image_text import ImageTextRetrieval
from llm2clip.utils.files import write_json
from llm2clip.utils.identity import data_revision
from llm2clip.utils.processes import process_state
from llm2clip.utils.towers import open_text_tower
from modeling_llm2clip import LLM2CLIPModel

TASKS = ("retrieval", "caption_retrieval")


@dataclass
class EvaluateConfig:
    """Settings of an evaluation."""

    model: str = field(default="", metadata={"help": "The model: Hub id or folder."})
    task: str = field(
        default="retrieval",
        metadata={"help": "retrieval (images and captions), or caption_retrieval (two captions of one image)."},
    )
    data: dict[str, Any] | str = field(
        default="", metadata={"help": "The data: a path or Hub id, or a CaptionSource / PairSource mapping."}
    )
    split: str = field(default="test", metadata={"help": "Split of the data, unless the mapping names one."})
    caption_columns: list[str] | None = field(default=None, metadata={"help": "Columns of the captions."})
    query_column: str | None = field(default=None, metadata={"help": "caption_retrieval: column of the queries."})
    target_column: str | None = field(default=None, metadata={"help": "caption_retrieval: column of the targets."})
    embedding_cache: str | None = field(
        default=None,
        metadata={"help": "retrieval: read the captions' embeddings from here, without the LLM."},
    )
    batch_size: int = field(default=64, metadata={"help": "Images or captions per forward pass."})
    num_workers: int = field(default=0, metadata={"help": "Processes that read images."})
    on_error: str = field(default="raise", metadata={"help": "Damaged image: raise or skip."})
    output: str | None = field(default=None, metadata={"help": "Also write the result to this JSON file."})


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a model.

    Args:
        config: The settings.

    Returns:
        The metrics; see `retrieval_metrics` and `caption_retrieval_metrics`.

    Raises:
        ValueError: The task is unknown, or a setting that it needs is missing.
    """
    for name in ("model", "data"):
        if not getattr(config, name):
            raise ValueError(f"evaluate needs {name}; give it as an option (--{name}).")
    if config.task not in TASKS:
        raise ValueError(f"task {config.task!r} is unknown; choose one of {', '.join(TASKS)}.")
    if config.on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', not {config.on_error!r}.")
    metrics = _retrieval(config) if config.task == "retrieval" else _caption_retrieval(config)
    if config.output and process_state().is_main_process:
        data = _source_fields(config)
        data["revision"] = data_revision(data)
        write_json(config.output, {"model": config.model, "task": config.task, "data": data, **metrics})
    return metrics


def _source_fields(config: EvaluateConfig) -> dict[str, Any]:
    fields: dict[str, Any] = dict(config.data) if isinstance(config.data, dict) else {"path": config.data}
    fields.setdefault("split", config.split)
    if config.caption_columns is not None:
        fields["caption_columns"] = config.caption_columns
    return fields


def _retrieval(config: EvaluateConfig) -> dict[str, Any]:
    source = CaptionSource.from_dict(_source_fields(config))
    device = process_state().device
    cached = config.embedding_cache is not None
    model = LLM2CLIPModel.from_pretrained(config.model, text_model=not cached).to(device).eval()
    processor = AutoProcessor.from_pretrained(config.model)
    retrieval = ImageTextRetrieval(source, processor.image_processor, config.on_error)
    if config.embedding_cache is not None:
        embed: Any = EmbeddingCache.open(config.embedding_cache, model.config.text_model_fingerprint).lookup
    else:

        def embed(captions: list[str]) -> torch.Tensor:
            return model.text_model.encode(captions, processor.tokenizer, config.batch_size, show_progress_bar=True)

    return retrieval(model, embed, config.batch_size, config.num_workers, show_progress_bar=True)


def _caption_retrieval(config: EvaluateConfig) -> dict[str, Any]:
    fields = _source_fields(config)
    if config.query_column and config.target_column:
        fields |= {"anchor_column": config.query_column, "positive_column": config.target_column}
    source = PairSource.from_dict(fields)
    model: Any
    model, tokenizer = open_text_tower(config.model)
    retrieval = CaptionRetrieval.from_source(source)
    return retrieval(model.to(process_state().device).eval(), tokenizer, config.batch_size, show_progress_bar=True)

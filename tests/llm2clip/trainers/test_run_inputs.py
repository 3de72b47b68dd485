"""A run is resumed with other data or other frozen weights than it was started with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from llm2clip.data import CaptionImageDataset, CaptionSource, PairDataset, PairSource
from llm2clip.data.sampling import EpochDataset
from llm2clip.data.table_identity import sampled_files_digest
from llm2clip.data.transforms import EvalTransform
from llm2clip.trainers import run_stage1
from llm2clip.trainers.mntp_data import TokenBlocks
from llm2clip.trainers.run_state import INPUTS, read_run_state
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.text_tower_trainer import sampled_digest
from llm2clip.utils.files import read_json
from llm2clip.utils.settings import build_config
from tests.llm2clip import tiny
from tests.modeling_llm2clip import tiny as tiny_models

CHANGES: dict[str, Callable[[datasets.Dataset], datasets.Dataset]] = {
    "reordered": lambda table: table.select(range(len(table))[::-1]),
    "another text": lambda table: table.map(lambda row: {"long": row["long"].replace("thing 3 ", "Thing 3 ")}),
    "fewer rows": lambda table: table.select(range(len(table) - 1)),
}


def run(folder: Path, data: Path, llm: str, resume: bool = False, **changes: Any) -> None:
    source = {"path": str(data), "anchor_column": "short", "positive_column": "long"}
    fields = {**tiny.stage1_fields(folder, llm), "sources": [source], "per_device_train_batch_size": 2}
    fields |= {"max_steps": 2, "save_steps": 1, "save_total_limit": 1, **changes}
    run_stage1.run(build_config(Stage1Recipe, fields), resume)


def pairs(path: Path) -> PairDataset:
    return PairDataset(PairSource(path=str(path), anchor_column="short", positive_column="long"))


def captions(path: Path) -> CaptionImageDataset:
    return CaptionImageDataset(CaptionSource(path=str(path), caption_columns=["short", "long"]), None)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("opened", [pairs, captions])
def test_a_digest_of_texts_is_of_the_rows_in_their_order(
    opened: Callable[[Path], EpochDataset], change: str, tmp_path: Path
) -> None:
    table = datasets.Dataset.from_parquet(tiny.write_text_pairs(tmp_path / "a.parquet", 8))
    CHANGES[change](table).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "moved").mkdir()
    table.to_json(tmp_path / "moved" / "c.jsonl")
    digests = [opened(tmp_path / name).content_digest() for name in ("a.parquet", "b.parquet", "moved/c.jsonl")]
    assert digests[0] == digests[2] != digests[1]


def test_a_digest_of_images_is_of_their_bytes(tmp_path: Path) -> None:
    def digest(last: Any, folder: str) -> str:
        (tmp_path / folder).mkdir()
        for name, image in (("a.png", tiny_models.IMAGES[0]), ("b.png", last)):
            image.save(tmp_path / folder / name)
        rows = {"image": ["a.png", "b.png"], "caption": ["one", "two"]}
        datasets.Dataset.from_dict(rows).to_json(tmp_path / folder / "rows.jsonl")
        source = CaptionSource(path=str(tmp_path / folder / "rows.jsonl"))
        return CaptionImageDataset(source, EvalTransform(tiny_models.processor().image_processor)).content_digest()

    first, second = tiny_models.IMAGES[:2]
    assert digest(second, "x") == digest(second, "y") != digest(first, "z")


def test_a_digest_of_tokens_is_of_their_values() -> None:
    tokens = np.arange(12, dtype=np.int32)
    other = tokens.copy()
    other[7] = 0
    digests = [TokenBlocks(one, 4).content_digest() for one in (tokens, tokens.copy(), other)]
    assert digests[0] == digests[1] != digests[2]


def test_changed_data_is_refused_or_accepted(tmp_path: Path) -> None:
    llm, data, folder = tiny.save_llm(tmp_path / "llm"), tmp_path / "pairs.parquet", tmp_path / "run"
    tiny.write_text_pairs(data, 20)
    run(folder, data, llm)
    before = read_run_state(folder / "checkpoint-2")[INPUTS]
    tiny.write_text_pairs(data, 24)
    with pytest.raises(
        ValueError, match=r"checkpoint-2 had other inputs \(rows of the training data: 20 -> 24; .*any"
    ):
        run(folder, data, llm, resume=True)
    with pytest.raises(ValueError, match="started with other settings"):
        run(folder, data, llm, resume=True, max_steps=3)
    run(folder, data, llm, resume=True, max_steps=3, resume_anyway=True)
    after = read_run_state(folder / "checkpoint-3")[INPUTS]
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] == after[name]] == ["tokenizer", "frozen weights"]


def test_another_llm_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    llm, data = tiny.save_llm(tmp_path / "llm"), tmp_path / "pairs.parquet"
    tiny.write_text_pairs(data, 20)
    run(tmp_path / "run", data, llm)
    model = LlamaForCausalLM.from_pretrained(llm)
    model.model.layers[1].mlp.up_proj.weight.data += 1e-3
    model.save_pretrained(llm)
    with pytest.raises(ValueError, match=r"other inputs \(frozen weights: \w+ -> \w+\)"):
        run(tmp_path / "run", data, llm, resume=True)


def test_a_digest_of_weights_is_of_the_last_value_of_a_large_one_too() -> None:
    # The embeddings of SmolLM2-135M have as many; the float32 next to their last place is beyond it.
    weight = torch.zeros(28_311_552, dtype=torch.int8)
    before = sampled_digest([("weight", weight)])
    weight[-1] = 1
    assert sampled_digest([("weight", weight)]) != before
    assert sampled_digest([("empty", weight[:0]), ("one", weight[:1])])


def test_a_checkpoint_is_compared_with_the_settings_that_it_was_trained_with(tmp_path: Path) -> None:
    llm, data, folder = tiny.save_llm(tmp_path / "llm"), tmp_path / "pairs.parquet", tmp_path / "run"
    tiny.write_text_pairs(data, 20)
    run(folder, data, llm, save_total_limit=3)
    # It starts again from an earlier checkpoint, and is killed before its own first one.
    changed = {"learning_rate": 1e-4, "save_steps": 10, "resume_anyway": True}
    branch = {**changed, "resume_from_checkpoint": str(folder / "checkpoint-1"), "max_grad_norm": 1e-30}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_stage1.Stage1Trainer, "training_step", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folder, data, llm, **branch)
    with pytest.raises(ValueError, match=r"checkpoint-2 was started with other settings \(.*learning_rate: 0.005 -> "):
        run(folder, data, llm, resume=True, learning_rate=1e-4)


def _interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def test_a_resumed_run_logs_and_saves_as_often_as_its_settings_say(tmp_path: Path) -> None:
    llm, data, folder = tiny.save_llm(tmp_path / "llm"), tmp_path / "pairs.parquet", tmp_path / "run"
    tiny.write_text_pairs(data, 20)
    settings = {"max_steps": 5, "save_steps": 2, "logging_steps": 2, "save_total_limit": None}
    run(folder, data, llm, **settings)
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "checkpoint-5")
    run(folder, data, llm, resume=True, **{**settings, "save_steps": 1, "logging_steps": 1})
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in range(2, 6)]
    history = read_json(folder / "trainer_state.json")["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 3, 4, 5]


def test_a_digest_of_a_stream_is_of_the_content_of_its_files(tmp_path: Path) -> None:
    names = [tmp_path / name for name in ("a.bin", "b.bin", "c.bin")]
    for number, path in enumerate(names):
        path.write_bytes(bytes([number]) * 100)
    files = [*map(str, names), "https://example.invalid/d.bin"]
    first = sampled_files_digest(files)
    assert sampled_files_digest([str(path.rename(tmp_path / f"x-{path.name}")) for path in names]) == first
    assert sampled_files_digest([str(path) for path in sorted(tmp_path.glob("x-*"), reverse=True)]) != first
    (tmp_path / "x-b.bin").write_bytes(bytes([1]) * 99 + b"\2")
    assert sampled_files_digest([str(path) for path in sorted(tmp_path.glob("x-*"))]) != first

"""Stage 2 on several sources: one of them per step, or all of them in each batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm2clip.data import SampleIndex
from llm2clip.trainers import run_stage2
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.trainers.stage2_data import build_dataset
from llm2clip.trainers.stage2_trainer import Stage2Trainer
from llm2clip.utils.settings import build_config
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.test_stage2 import losses
from tests.llm2clip.trainers.test_stage2_captions import embedded, source, train, write_tars
from tests.llm2clip.trainers.test_stream_resume import assert_equal, broken_after


@pytest.mark.parametrize("frozen", [False, True])
def test_the_rows_of_a_step_come_from_one_source_or_from_all(frozen: bool, inputs: Inputs, tmp_path: Path) -> None:
    found: dict[str, list[set[str]]] = {}
    for mixing in ("one_source_per_step", "proportional"):
        sources = [tiny.concepts(max_samples=48), tiny.concepts("validation", max_samples=40)]
        fields = tiny.stage2_fields(tmp_path / mixing, inputs.vision, inputs.text, inputs.cache)
        states = {"freeze_vision_layers": 1, "frozen_states_dir": str(tmp_path / "states")} if frozen else {}
        config = build_config(Stage2Recipe, {**fields, "sources": sources, "mixing": mixing, **states})
        model, processor = run_stage2.load_model(config)
        dataset = build_dataset(config, processor.image_processor)
        trainer = Stage2Trainer(model, config, list, dataset, processing_class=processor)
        trainer.store_rows()
        dataset = trainer.train_dataset
        half = len(dataset.captions.tables[0]) if frozen else len(dataset.tables[0])
        first = {dataset[SampleIndex(0, index)]["key"] for index in range(half)}
        found[mixing] = [
            {"first" if sample["key"] in first else "second" for sample in batch}
            for batch in trainer.get_train_dataloader()
        ]
    assert sorted(map(sorted, found["one_source_per_step"])) == [["first"]] * 3 + [["second"]] * 2
    assert found["proportional"] == [{"first", "second"}] * 5


@pytest.fixture(scope="module")
def mixture(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two streams with sidecars beside their shards, and a table with a cache."""
    streams = []
    for name in ("a", "b"):
        folder = write_tars(tmp_path_factory.mktemp(name) / "tars", 2 if name == "a" else 3)
        embedded(inputs, Path(), source(folder), output_dir="")
        streams.append(source(folder, embedding_cache=folder))
    return [*streams, tiny.concepts("validation", max_samples=40)]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mixing", ["proportional", "weights", "one_source_per_step"])
def test_a_resumed_run_on_streams_and_a_table_equals_an_unbroken_one(
    mixing: str, workers: int, mixture: list[dict[str, Any]], inputs: Inputs, tmp_path: Path
) -> None:
    sources = [{**fields, "weight": weight} for fields, weight in zip(mixture, (2, 1, 1), strict=True)]
    changes: dict[str, Any] = {
        "sources": mixture if mixing == "proportional" else sources,
        "mixing": mixing,
        "dataloader_num_workers": workers,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 12,
        "patch_dropout": 0.3,
    }
    train(tmp_path / "unbroken", inputs, Path(inputs.cache), "", **changes)
    for step in (4, 11):  # in the first epoch of 160 rows, and in the second
        folder = broken_after(tmp_path / "unbroken", tmp_path / str(step), step)
        train(folder, inputs, Path(inputs.cache), "", resume=True, **changes)
        assert_equal(folder, tmp_path / "unbroken")
        assert losses(folder) == losses(tmp_path / "unbroken")


def test_tables_can_be_mixed_by_weight(inputs: Inputs, tmp_path: Path) -> None:
    sources = [tiny.concepts(max_samples=48, weight=3), tiny.concepts("validation", max_samples=40, weight=1)]
    train(tmp_path, inputs, Path(inputs.cache), "", sources=sources, mixing="weights", max_steps=2)
    states = {"freeze_vision_layers": 1, "frozen_states_dir": str(tmp_path / "states")}
    with pytest.raises(ValueError, match="no streams or weights"):
        train(tmp_path / "no", inputs, Path(inputs.cache), "", sources=sources, mixing="weights", **states)

"""Stage 2 on several sources: one of them per step, or all of them in each batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip.data import SampleIndex
from llm2clip.trainers import run_stage2
from llm2clip.trainers.stage2_config import Stage2Config
from llm2clip.trainers.stage2_trainer import Stage2Trainer
from llm2clip.utils.settings import build_config
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs


@pytest.mark.parametrize("frozen", [False, True])
def test_the_rows_of_a_step_come_from_one_source_or_from_all(frozen: bool, inputs: Inputs, tmp_path: Path) -> None:
    found: dict[str, list[set[str]]] = {}
    for mixing in ("one_source", "all_sources"):
        sources = [tiny.concepts(max_samples=48), tiny.concepts("validation", max_samples=40)]
        fields = tiny.stage2_fields(tmp_path / mixing, inputs.vision, inputs.text, inputs.cache)
        states = {"freeze_vision_layers": 1, "frozen_states_dir": str(tmp_path / "states")} if frozen else {}
        config = build_config(Stage2Config, {**fields, "sources": sources, "mixing": mixing, **states})
        model, processor = run_stage2.load_model(config)
        dataset, _ = run_stage2.build_dataset(config, model, processor.image_processor)
        trainer = Stage2Trainer(model=model, args=config, data_collator=list, train_dataset=dataset)
        half = len(dataset.captions.tables[0]) if frozen else len(dataset.tables[0])
        first = {dataset[SampleIndex(0, index)]["key"] for index in range(half)}
        found[mixing] = [
            {"first" if sample["key"] in first else "second" for sample in batch}
            for batch in trainer.get_train_dataloader()
        ]
    assert sorted(map(sorted, found["one_source"])) == [["first"]] * 3 + [["second"]] * 2
    assert found["all_sources"] == [{"first", "second"}] * 5

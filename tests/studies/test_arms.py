"""Arms of every kind are trained and measured, on tiny towers and a few pictures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llm2clip import LLM2CLIPModel
from llm2clip.encoders import embed
from studies.miniature.material import Material
from studies.miniature.runs import execute_one, model_path, result_path, runs_of
from tests.builders import small_runs, tiny

FEW = {"num_train_epochs": 1, "per_device_train_batch_size": 8}
ARMS = {
    "a7": ["one block", "not standardised"],
    "a8": ["two encoders", "stage 1, tower and LoRA train", "no frozen part first, the tower trains"],
    "recipes": ["closed form, stage 1"],
    "tower": ["E5, closed form and heads first"],
    "retention": ["the CLIP of cliparts", "E5, kept space", "E5, kept space, then emojis"],
}


@pytest.fixture
def material(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Material:
    """A folder with tiny towers in place of all, and the same pictures in every split."""
    text, cache, pictures = (str(tmp_path / name) for name in ("text", "cache", "pictures.parquet"))
    tiny.text_model().save_pretrained(text)
    tiny.processor().tokenizer.save_pretrained(text)
    vision = small_runs.save_dinov2_tower(tmp_path / "vision")
    small_runs.rows_of_concepts(":24").to_parquet(pictures)
    source = {"path": pictures, "caption_columns": ["caption", "keywords"]}
    embed.run(embed.EmbedConfig(text_model_name_or_path=text, output_dir=cache, sources=[source]))
    made = {"data": pictures, "text_encoder": text, "rows": cache, "weights": vision}
    for name, path in made.items():
        monkeypatch.setattr(Material, name, lambda self, *names, path=path: Path(path))
    return Material(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("table", ARMS)
def test_arms_train_and_are_measured(table: str, material: Material) -> None:
    done: dict[str, Any] = {}
    for run in runs_of(table):
        if run.seed or run.arm not in ARMS[table]:
            continue
        settings = {**run.settings, **({} if run.settings.get("command") == "align" else FEW)}
        settings |= {} if "keeps" in run.parents else {"projection_dim": 16}
        if settings.get("parts"):
            settings["parts"] = [part if "command" in part else {**part, **FEW} for part in settings["parts"]]
        if "freeze_vision_layers" in settings:
            settings["freeze_vision_layers"] = -1
        parents = {role: done[parent.arm] for role, parent in run.parents.items()}
        done[run.arm] = run = dataclasses.replace(run, settings=settings, parents=parents, is_kept=True)
        execute_one(run, material.folder)
        scores = json.loads(result_path(material.folder, run).read_text())
        assert 0 <= scores["test/text_to_image_recall@10"] <= 1
        model = LLM2CLIPModel.from_pretrained(model_path(run, material), text_model=False)
        is_closed = "closed form" in run.arm
        assert (model.visual_standardization is not None) == (is_closed or settings.get("standardize", True) is True)
    assert [*done] == ARMS[table]

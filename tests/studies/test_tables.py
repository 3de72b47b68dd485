"""The tables of the study: every arm is a recipe that the command takes, and the report has the committed numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from llm2clip.command_line.settings import build_config
from llm2clip.trainers.align_recipe import AlignRecipe
from llm2clip.trainers.parts import plan_parts
from llm2clip.trainers.stage2_config import Stage2Recipe
from studies.miniature import page
from studies.miniature.material import Material
from studies.miniature.runs import QUESTIONS, RETRIEVAL, TABLES, Run, read_table, recipe_of, runs_of

NAMES = sorted(path.stem for path in TABLES.glob("*.yaml"))
FIRST = [run for name in NAMES for run in runs_of(name) if run.seed == 0]


@pytest.fixture
def material(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Material:
    """A folder in which nothing is made."""
    for name in ("data", "weights", "text_encoder", "vision_tower"):
        monkeypatch.setattr(Material, name, lambda self, name, kind=name: self.folder / kind / str(name))
    return Material(tmp_path)


@pytest.mark.parametrize("run", FIRST, ids=lambda run: f"{run.table} {run.arm}")
def test_every_arm_is_a_recipe_of_known_encoders(run: Run, material: Material) -> None:
    assert set(run.encoders) <= set(material.texts)
    if run.kind == RETRIEVAL or (run.kind == QUESTIONS and run.encoders):
        models = {role: material.folder / parent.name for role, parent in run.parents.items()}
        command, recipe = recipe_of(run, material, [material.folder / name for name in run.encoders], models)
        if command == "align":
            parts: list[Any] = [build_config(AlignRecipe, recipe, run.name)]
            parts[0].validate_sources()
        else:
            parts = plan_parts(build_config(Stage2Recipe, recipe, run.name))
        assert {tuple(part.sources[0]["caption_columns"]) for part in parts} == {tuple(run.captions)}


def test_a_table_has_mean_and_deviation_of_its_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    keys = [f"{test}/{way}_recall@{rank}" for test in ("test", "transfer") for way in page.WAYS for rank in (1, 10)]
    rows = [
        {"arm": "none", "seed": seed, "cpu_seconds": 9.6 + seed, **dict.fromkeys(keys, 0.25 + seed / 10)}
        for seed in range(2)
    ]
    page.write_results("a7", rows)
    assert page.read_results("a7") == rows
    head, _, line = page.table_of("a7").splitlines()
    titles = "in domain, R@1 | in domain, R@10 | transfer, R@1 | transfer, R@10 | CPU s | paper"
    assert head == f"| 2 seeds | {titles} |"
    assert line == "| none | 30.0±7.1 | 30.0±7.1 | 30.0±7.1 | 30.0±7.1 | 10 | 78.3 / 75.5 |"


def test_seeds_are_a_column_where_they_differ_and_equal_runs_have_no_deviation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "RESULTS", tmp_path)
    keys = [f"{test}/{way}_recall@{rank}" for test in ("test", "transfer") for way in page.WAYS for rank in (1, 10)]
    runs = [("stage 1", 0), ("stage 1", 1), ("two encoders", 0)]
    rows = [{"arm": arm, "seed": seed, "cpu_seconds": 10, **dict.fromkeys(keys, 0.25)} for arm, seed in runs]
    page.write_results("a8", rows)
    _, _, *lines = page.table_of("a8").splitlines()
    scores = " | ".join(["25.0"] * 4)
    assert lines == [
        f"| stage 1 | {scores} | 2 | 10 | 83.9 / 82.1 (a) |",
        f"| two encoders | {scores} | 1 | 10 |  |",
    ]


def test_what_a_killed_process_left_is_made_again(tmp_path: Path) -> None:
    def dies(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt

    def ends(folder: Path) -> None:
        folder.mkdir()
        (folder / "whole").touch()

    material, path = Material(tmp_path), tmp_path / "texts" / "one"
    with pytest.raises(KeyboardInterrupt):
        material.made(path, dies)
    assert not path.exists()
    for make in (ends, dies):  # what is there is not made again
        assert [file.name for file in material.made(path, make).iterdir()] == ["whole"]


def test_a_folder_made_with_other_recipes_is_refused(tmp_path: Path) -> None:
    Material(tmp_path).require_same_recipes()
    later = Material(tmp_path)
    later.texts = {**later.texts, "another": {"of": "llm"}}
    later.require_same_recipes()
    changed = Material(tmp_path)
    changed.texts = {**later.texts, "stage 1": {"of": "raw", "command": "mntp"}}
    with pytest.raises(ValueError, match="stage 1"):
        changed.require_same_recipes()


def test_the_report_has_the_committed_results(tmp_path: Path) -> None:
    report = tmp_path / "README.md"
    shutil.copy(page.HERE / "README.md", report)
    page.write(report)
    assert report.read_text() == (page.HERE / "README.md").read_text()
    for path in page.RESULTS.glob("*.csv"):
        assert {row["arm"] for row in page.read_results(path.stem)} <= set(read_table(path.stem)["arms"])

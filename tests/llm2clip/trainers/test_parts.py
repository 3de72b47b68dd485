"""Recipes in parts: what each gets, and runs that are broken in a part, between parts, and in the last one."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.command_line.settings import build_config
from llm2clip.files.manifests import FOLDER_MANIFEST
from llm2clip.hub.cards.facts import CURVES
from llm2clip.hub.upload_files import model_files
from llm2clip.trainers import run_align, run_stage2
from llm2clip.trainers.align_recipe import AlignRecipe
from llm2clip.trainers.alignment import linear_maps
from llm2clip.trainers.parts import plan_parts
from llm2clip.trainers.run_context import RunContext
from llm2clip.trainers.stage2_config import Stage2Recipe
from tests.builders import small_runs
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.stages import assert_equal_weights, at_step, history, interrupt, load, train

# The heads on a frozen tower, and then its last layer too (LP-FT).
TWO = [{"freeze_vision": "all", "learning_rate": 1e-2, "max_steps": 4, "save_steps": 2}, {"freeze_vision_layers": -1}]
ON_TOP = [{"command": "align", "heads": "residual", "ridge": 0.3}, {"freeze_vision": "all"}]
RECIPES: dict[str, list[dict[str, Any]]] = {"two": TWO, "on-top": ON_TOP}


def settings(folder: Path, inputs: Inputs, parts: list[dict[str, Any]], **changes: Any) -> Stage2Recipe:
    fields = small_runs.stage2_fields(folder, inputs.vision, inputs.text, inputs.cache)
    fields |= {"parts": parts, "vision_pooling": "cls_mean", "projection_dim": 8, "per_device_train_batch_size": 32}
    return build_config(Stage2Recipe, {**fields, **changes})


def test_parts_are_runs_of_their_own_one_after_another(inputs: Inputs, tmp_path: Path) -> None:
    config = settings(tmp_path / "run", inputs, TWO)
    last = train(config)
    first = train(settings(tmp_path / "first", inputs, [], **TWO[0]))
    assert_equal_weights(load(tmp_path / "run" / "part1"), first)
    continued = dict.fromkeys(("vision_model_name_or_path", "text_model_name_or_path"), "")
    continued |= {"vision_pooling": None, "projection_dim": None, "model_name_or_path": str(tmp_path / "first")}
    second = train(settings(tmp_path / "second", inputs, [], **{**continued, **TWO[1]}))
    # Weights that are mapped from a file are aligned otherwise in memory, and so summed in another order.
    assert_equal_weights(last, second, atol=1e-6)
    assert (tmp_path / "run" / CURVES).is_file()
    assert not (tmp_path / "run" / "part1" / "part1").exists()


def test_the_card_has_the_curves_of_all_parts(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[int]] = []
    monkeypatch.setattr(
        "llm2clip.trainers.model_card.write_curves",
        lambda folder, log: shown.append([entry["step"] for entry in log if "loss" in entry]),
    )
    run_stage2.run(settings(tmp_path, inputs, TWO, max_steps=2, save_strategy="no", eval_sources={}))
    assert shown[-1] == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def unbroken(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Run a recipe once; returns its folder."""

    @cache
    def run(name: str) -> Path:
        folder = tmp_path_factory.mktemp("parts") / "unbroken"
        run_stage2.run(settings(folder, inputs, RECIPES[name]))
        return folder

    return run


def test_heads_on_top_of_a_closed_form_leave_its_maps(unbroken: Callable[[str], Path]) -> None:
    folder = unbroken("on-top")
    last, first = load(folder), load(folder / "part1")
    assert (last.config.visual_head, last.config.text_head) == ("residual", "residual")
    for before, after in zip(linear_maps(first), linear_maps(last), strict=True):
        assert after.weight.equal(before.weight)
    assert last.visual_projection.gate.item() != pytest.approx(0.1, abs=1e-6)
    assert last.text_adapter.gate.item() != pytest.approx(0.1, abs=1e-6)


def test_a_closed_form_can_be_the_start_of_a_run_that_trains_the_tower(inputs: Inputs, tmp_path: Path) -> None:
    last = train(settings(tmp_path, inputs, [{"command": "align"}, {}], projection_dim=None, max_steps=2))
    first = load(tmp_path / "part1")
    assert first.config.projection_dim == last.config.projection_dim == 32
    assert first.config.text_head == last.config.text_head == "linear"
    assert not torch.equal(first.visual_projection.weight, last.visual_projection.weight)
    assert not torch.equal(first.text_adapter.proj.weight, last.text_adapter.proj.weight)


@pytest.mark.parametrize("name", [pytest.param("two", marks=pytest.mark.slow), "on-top"])
@pytest.mark.parametrize("stop", ["in part 1", "between", "in part 2"])
def test_a_broken_run_that_is_resumed_ends_as_an_unbroken_one(
    name: str, stop: str, unbroken: Callable[[str], Path], inputs: Inputs, tmp_path: Path
) -> None:
    parts, folder = RECIPES[name], tmp_path / "broken"
    config, expected = settings(folder, inputs, parts), load(unbroken(name))
    with pytest.MonkeyPatch.context() as patch:
        if stop == "in part 1" and parts is ON_TOP:
            patch.setattr(run_align, "align", interrupt)
        elif stop == "between":
            patch.setattr(RunContext, "__enter__", _interrupted_in_the_last(RunContext.__enter__))
        else:
            at_step(3 if stop == "in part 1" else 5, interrupt, patch)
        if stop == "in part 2" and parts is TWO:  # the first part has fewer steps
            at_step(5, interrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            run_stage2.run(config)
    assert (folder / "part1" / FOLDER_MANIFEST).is_file() == (stop != "in part 1")
    with pytest.MonkeyPatch.context() as patch:
        if stop != "in part 1":
            patch.setattr(run_align, "align", lambda *_: pytest.fail("a finished part is run again"))
        again = train(config, resume=True)
    assert_equal_weights(again, expected, atol=1e-6)
    assert [entry["step"] for entry in history(folder) if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def _interrupted_in_the_last(enter: Any) -> Any:
    def entered(self: RunContext) -> Any:
        return enter(self) if Path(self.args.output_dir).name == "part1" else interrupt()

    return entered


@pytest.mark.parametrize(("name", "setting"), [("two", "learning_rate"), ("on-top", "ridge")])
def test_a_finished_part_of_another_tower_or_with_other_settings_is_refused(
    name: str, setting: str, inputs: Inputs, tmp_path: Path
) -> None:
    (first, last), changes = RECIPES[name], {"max_steps": 1, "eval_sources": {}}
    run_stage2.run(settings(tmp_path / "run", inputs, [first, last], **changes))
    tower = small_runs.save_vision_tower(tmp_path / "other")
    for own, found in (({}, "vision_model_name_or_path"), ({setting: 1.0}, f"{setting}: .* -> 1.0")):
        other = changes if own else {**changes, "vision_model_name_or_path": tower}
        with pytest.raises(ValueError, match=rf"part1 was .* with other settings \({found}"):
            run_stage2.run(settings(tmp_path / "run", inputs, [{**first, **own}, last], **other), resume=True)


def test_the_parts_of_a_recipe_get_what_they_share_and_what_is_their_own(inputs: Inputs, tmp_path: Path) -> None:
    first, last = plan_parts(settings(tmp_path, inputs, ON_TOP, adapter_num_layers=1))
    assert isinstance(first, AlignRecipe)
    assert isinstance(last, Stage2Recipe)
    assert (first.vision_pooling, first.projection_dim, first.adapter_num_layers) == ("cls_mean", 8, 1)
    assert (last.vision_pooling, last.projection_dim, last.adapter_num_layers) == (None, None, None)
    assert (first.output_dir, last.output_dir) == (str(tmp_path / "part1"), str(tmp_path))
    assert last.model_name_or_path == first.output_dir
    assert first.seed == last.seed == 7
    assert first.eval_sources == last.eval_sources
    shared = json.loads(json.dumps(last.to_dict(), default=str))
    assert shared["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"command": "train"}], "a part has command: train, but it can be align or stage2"),
        ([{"command": "align"}], "the last part has to be one that trains"),
        ([{}, {"command": "align"}, {}], "part 2 aligns two towers, so that no part can come before it"),
        ([{"learning_rat": 1.0}, {}], "part 1 has no field 'learning_rat'; did you mean 'learning_rate'"),
        ([{}, {"model_name_or_path": "m"}], "part 2 has model_name_or_path, which follows from the recipe"),
        ([{}, {"projection_dim": 8}], "projection_dim is 8, but .*part1 is already trained"),
        ([{"freeze_vision": "all", "patch_dropout": 0.5}, {}], "patch_dropout is 0.5, but freeze_vision: all"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_part(
    parts: list[dict[str, Any]], message: str, inputs: Inputs, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_stage2.run(settings(tmp_path / "run", inputs, parts))
    assert not (tmp_path / "run").exists()


def test_what_an_alignment_would_not_use_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="visual_head is gated, but the first part aligns two towers"):
        run_stage2.run(settings(tmp_path / "run", inputs, ON_TOP, visual_head="gated"))


def test_a_push_leaves_out_the_parts_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "part1").mkdir()
    for name in ("config.json", "part1/config.json", "part1/model.safetensors"):
        (tmp_path / name).write_text("{}")
    files = model_files(tmp_path)
    assert (list(files.uploaded), files.others) == (["config.json"], [])

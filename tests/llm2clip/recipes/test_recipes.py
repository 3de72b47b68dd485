"""The packaged recipes and launch configurations are read by what they are for."""

from __future__ import annotations

from importlib import import_module, resources
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from llm2clip.cli import COMMANDS
from llm2clip.command_line.settings import build_config
from llm2clip.recipes import find_recipe, load_recipe
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe

RECIPES = sorted(Path(str(resources.files("llm2clip.recipes"))).glob("*.yaml"))
LAUNCH = resources.files("llm2clip.recipes") / "accelerate"


def test_a_recipe_is_found_by_path_or_by_its_packaged_name(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("- a list")
    assert find_recipe(str(mine)) == mine
    assert find_recipe("stage1_paper") == find_recipe("stage1_paper.yaml")
    with pytest.raises(FileNotFoundError, match="the packaged recipes: embed_paper"):
        find_recipe("stage_one")
    with pytest.raises(ValueError, match="but is a list"):
        load_recipe(mine)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_packaged_recipe_builds_its_settings(path: Path) -> None:
    fields, stage = load_recipe(path), path.stem.partition("_")[0]
    if stage != "quickstart":
        config_class = getattr(import_module(COMMANDS[stage].module), COMMANDS[stage].config)
        on_cpu = {"use_cpu": True} if stage != "embed" else {}
        assert build_config(config_class, {**fields, **on_cpu}, str(path)).output_dir
        return
    # What is `auto` there depends on the processor.
    stage1, stage2 = (
        {name: value for name, value in fields[part].items() if value != "auto"} for part in ("stage1", "stage2")
    )
    build_config(Stage1Recipe, {**stage1, "use_cpu": True}, str(path))
    build_config(Stage2Recipe, {**stage2, "freeze_vision": "all", "embedding_cache": "x", "use_cpu": True}, str(path))


@pytest.mark.parametrize("name", sorted(path.name for path in LAUNCH.iterdir() if path.name.endswith(".yaml")))
def test_accelerate_reads_the_launch_configurations(name: str) -> None:
    config = load_config_from_file(str(LAUNCH / name))
    assert (config.num_processes, config.use_cpu) == ((2, True) if name == "cpu_2.yaml" else (8, False))
    # accelerate passes over settings of a strategy that it does not know.
    options = {action.dest for action in launch_command_parser()._actions}
    strategy = config.fsdp_config or {}
    assert set(strategy) <= options
    assert bool(strategy) == name.startswith("fsdp")
    assert not config.fsdp_config or config.fsdp_config["fsdp_version"] == 2

"""Settings from recipes and options."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from importlib import import_module, resources
from pathlib import Path
from typing import Any, Literal

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from llm2clip.cli import COMMANDS
from llm2clip.quickstart.config import PROFILES
from llm2clip.recipes import find_recipe, load_recipe
from llm2clip.trainers.stage1_config import Stage1Config
from llm2clip.trainers.stage2_config import Stage2Config
from llm2clip.trainers.warm_start import first_part
from llm2clip.utils.settings import add_fields, bracket_numbers, build_config, complete_flags, given_fields

RECIPES = sorted(Path(str(resources.files("llm2clip.recipes"))).glob("*.yaml"))


@dataclass
class Settings:
    """One field of each supported type."""

    name: str
    rate: float = field(default=1e-3, metadata={"help": "100% of it"})
    steps: int = 10
    on: bool = False
    columns: list[str] = field(default_factory=lambda: ["caption"])
    source: dict[str, Any] | None = None
    mode: Literal["a", "b"] = "a"
    limit: int | None = None
    weights: list[float] | None = None


def parse(*arguments: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_fields(parser, Settings)
    return build_config(Settings, given_fields(parser.parse_args(arguments), Settings))


def test_options_become_their_types() -> None:
    settings = parse(
        "--name", "12", "--rate", "1e-5", "--steps", "3", "--on", "--columns", "caption", "keywords",
        "--source", "{path: x, split: test}", "--mode", "b", "--limit", "7",
    )  # fmt: skip
    assert settings == Settings("12", 1e-5, 3, True, ["caption", "keywords"], {"path": "x", "split": "test"}, "b", 7)
    settings = parse("--name", "x", "--on", "false", "--limit", "null", "--weights", "[1, 2e-1]")
    assert (settings.on, settings.limit, settings.weights) == (False, None, [1.0, 0.2])
    assert parse("--name", "x", "--weights", "3").weights == [3.0]


@pytest.mark.parametrize("text", ["a", "[a, b]", "[a dog] on grass", "{", "[cat]", "null", "1e-3"])
def test_strings_are_not_parsed_as_yaml(text: str) -> None:
    settings = parse("--name", text, "--columns", text)
    assert (settings.name, settings.columns) == (text, [text])
    assert build_config(Settings, {"name": "x", "columns": text}).columns == [text]


def test_numbers_that_yaml_reads_as_strings_are_converted() -> None:
    assert build_config(Settings, {"name": "x", "rate": "1e-5"}).rate == 1e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "x", "rat": 1}, "mine.yaml has no field 'rat'; did you mean 'rate'?"),
        ({"name": "x", "zzz": 1}, r"mine.yaml has no field 'zzz'\."),
        ({}, "mine.yaml lacks name"),
        ({"name": "x", "steps": 1.5}, "steps is 1.5, but it has to be an integer"),
        ({"name": "x", "steps": True}, "steps is True, but it has to be an integer"),
        ({"name": "x", "rate": "fast"}, "rate is 'fast', but it has to be a number"),
        ({"name": "x", "on": "perhaps"}, "on is 'perhaps', but it has to be true or false"),
        ({"name": "x", "mode": "c"}, "mode is 'c', but it has to be one of a, b"),
        ({"name": "x", "source": [1]}, "source is .*, but it has to be a mapping or null"),
        ({"name": ["x"]}, "name is .*, but it has to be a string"),
        ({"name": "x", "weights": "[1"}, r"weights is '\[1', but it has to be a list of numbers or null"),
    ],
)
def test_an_unknown_missing_or_misfitting_field_is_one_clear_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(Settings, fields, "mine.yaml")


def test_a_recipe_is_found_by_path_or_by_its_packaged_name(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: x")
    assert find_recipe(str(mine)) == mine
    assert find_recipe("stage1_paper") == find_recipe("stage1_paper.yaml")
    with pytest.raises(FileNotFoundError, match="the packaged recipes: embed_paper"):
        find_recipe("stage_one")
    mine.write_text("- a list")
    with pytest.raises(ValueError, match="but is a list"):
        load_recipe(mine)
    mine.write_text("a: [")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_recipe(mine)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_packaged_recipe_builds_its_settings(path: Path) -> None:
    fields = load_recipe(path)
    stage = path.stem.partition("_")[0]
    if stage == "quickstart":
        assert path.stem.removeprefix("quickstart_") in PROFILES
        build_config(Stage1Config, {**fields["stage1"], "use_cpu": True}, str(path))
        stage2 = {**fields["stage2"], **fields.get("unfrozen", {})}
        stage2.pop("caption_weights", None)
        both = {**stage2, "embedding_cache": "x", "use_cpu": True, "warm_start": fields["frozen"]}
        assert first_part(build_config(Stage2Config, both, str(path))).freeze_vision == "all"
        return
    command = COMMANDS[stage]
    config_class = getattr(import_module(command.module), command.config)
    extra = {"use_cpu": True} if stage != "embed" else {}
    assert build_config(config_class, {**fields, **extra}, str(path)).output_dir


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--on", "a text"], ["--on=true", "a text"]),
        (["--on", "false", "a text"], ["--on", "false", "a text"]),
        (["--name", "x", "--on"], ["--name", "x", "--on=true"]),
        (["--name", "on"], ["--name", "on"]),
        ([], []),
    ],
)
def test_a_flag_does_not_consume_the_next_argument(given: list[str], meant: list[str]) -> None:
    assert complete_flags(given, Settings) == meant


@dataclass
class Numbers:
    """A list of numbers between other fields."""

    place: str = ""
    some_shares: list[float] = field(default_factory=list)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--some-shares", "0", ".5", "out"], ["--some-shares=[0, .5]", "out"]),
        (["--some_shares", "-1e-3", "--place", "1"], ["--some_shares=[-1e-3]", "--place", "1"]),
        (["--some-shares", "[0, 1]", "2"], ["--some-shares", "[0, 1]", "2"]),
        (["--some-shares"], ["--some-shares"]),
    ],
)
def test_numbers_do_not_consume_what_follows_them(given: list[str], meant: list[str]) -> None:
    assert bracket_numbers(given, Numbers) == meant


ZERO = ("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")


@pytest.mark.parametrize("name", ["ddp_8gpu", "fsdp", *ZERO, "cpu_2"])
def test_accelerate_reads_the_launch_configurations(name: str) -> None:
    path = str(resources.files("llm2clip.recipes") / "accelerate" / f"{name}.yaml")
    config = load_config_from_file(path)
    assert config.num_processes == (2 if name == "cpu_2" else 8)
    assert config.use_cpu == (name == "cpu_2")
    # accelerate passes over settings of a strategy that it does not know.
    options = {action.dest for action in launch_command_parser()._actions}
    strategy = {**(config.fsdp_config or {}), **(config.deepspeed_config or {})}
    assert set(strategy) <= options
    assert bool(strategy) == (name in ("fsdp", *ZERO))
    if config.fsdp_config:
        assert config.fsdp_config["fsdp_version"] == 2

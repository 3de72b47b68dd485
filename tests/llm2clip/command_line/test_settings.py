"""Settings from recipes and options, what is said of wrong ones, and the text of `--help`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from llm2clip.command_line.options import (
    OptionParser,
    unknown_option,
)
from llm2clip.command_line.settings import build_config
from llm2clip.encoders.embed import EmbedConfig
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe


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


@dataclass
class Numbers:
    name: str = ""
    on: bool = False
    weights: list[float] = field(default_factory=list)


def parse(*arguments: str) -> Settings:
    values, unknown = OptionParser(Settings).read(arguments)
    assert not unknown
    return build_config(Settings, values)


def test_options_become_their_types() -> None:
    settings = parse(
        "--name", "12", "--rate", "1e-5", "--steps", "3", "--on", "--columns", "caption", "keywords",
        "--source", "{path: x, split: test}", "--mode", "b", "--limit", "7",
    )  # fmt: skip
    assert settings == Settings("12", 1e-5, 3, True, ["caption", "keywords"], {"path": "x", "split": "test"}, "b", 7)
    settings = parse("--name", "x", "--on", "false", "--limit", "null", "--weights", "[1, 2e-1]")
    assert (settings.on, settings.limit, settings.weights) == (False, None, [1.0, 0.2])
    assert parse("--name", "x", "--weights", "3").weights == [3.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "x", "rat": 1}, "mine.yaml has no field 'rat'; did you mean 'rate'?"),
        ({}, "mine.yaml lacks name"),
        ({"name": "x", "steps": 1.5}, "steps is 1.5, but it has to be an integer"),
        ({"name": "x", "steps": True}, "steps is True"),
        ({"name": "x", "rate": "fast"}, "rate is 'fast'"),
        ({"name": "x", "on": "perhaps"}, "on is 'perhaps'"),
        ({"name": "x", "mode": "c"}, "one of a, b"),
        ({"name": "x", "source": [1]}, "a mapping or null"),
        ({"name": ["x"]}, "a string"),
        ({"name": "x", "weights": "[1"}, "a list of numbers or null"),
    ],
)
def test_an_unknown_missing_or_misfitting_field_is_one_clear_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(Settings, fields, "mine.yaml")
    assert build_config(Settings, {"name": "x", "rate": "1e-5"}).rate == 1e-5  # a text to YAML


@pytest.mark.parametrize("text", ["a", "[a, b]", "{", "null", "1e-3"])
def test_strings_are_not_parsed_as_yaml(text: str) -> None:
    settings = parse("--name", text, "--columns", text)
    assert (settings.name, settings.columns) == (text, [text])
    assert build_config(Settings, {"name": "x", "columns": text}).columns == [text]


@pytest.mark.parametrize(
    ("given", "values"),
    [
        (["--on", "a text"], {"on": "true", "place": "a text"}),
        (["--on", "false", "a text"], {"on": "false", "place": "a text"}),
        (["--no-on", "a text"], {"on": "false", "place": "a text"}),
        (["--name", "on", "--on"], {"name": "on", "on": "true"}),
        (["--weights", "0", "-1e-3", "out"], {"weights": "[0, -1e-3]", "place": "out"}),
        (["--weights", "[0, 1]", "--name", "x"], {"weights": "[0, 1]", "name": "x"}),
    ],
)
def test_flags_and_numbers_do_not_consume_the_argument_after_them(given: list[str], values: dict[str, str]) -> None:
    parser = OptionParser(Numbers)
    parser.add_argument("place", nargs="?", default=argparse.SUPPRESS)
    assert parser.read(given) == (values, [])


@pytest.mark.parametrize(
    ("config_class", "given", "meant"),
    [
        (Stage1Recipe, "--lora_rnk", "--lora-rank"),
        (Stage1Recipe, "--temperature", "--scale"),
        (Stage2Recipe, "--lr=1e-4", "--learning-rate"),
        (Stage2Recipe, "--precision", "--bf16"),
        (EmbedConfig, "--precision", "--dtype"),
    ],
)
def test_an_unknown_option_suggests_the_one_that_is_meant(config_class: type, given: str, meant: str) -> None:
    assert f"{given.partition('=')[0]}; did you mean {meant}?" in unknown_option(given, [config_class])

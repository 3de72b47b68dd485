"""Settings from recipes and options, what is said of wrong ones, and the text of `--help`."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers.trainer_utils import SchedulerType

from llm2clip.command_line.options import OptionParser, unknown_option
from llm2clip.command_line.settings import build_config


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
    parts: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    scheduler: SchedulerType | str = "linear"
    saves: str | bool = False
    metrics: str | list[str] | None = None
    scale: float | Literal["checkpoint"] | None = None


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
    ("name", "given", "value"),
    [
        ("rate", "1e-5", 1e-5),  # a text to YAML
        ("name", 12, "12"),
        ("name", Path("a"), "a"),
        ("columns", [Path("a"), 1], ["a", "1"]),
        ("weights", ["1e-5", 1], [1e-5, 1.0]),
        ("parts", "[{a: 1}, {b: 2}]", [{"a": 1}, {"b": 2}]),
        ("parts", "{a: 1}", [{"a": 1}]),
        ("options", None, {}),
        ("options", "null", {}),
        ("source", "null", None),
        ("scheduler", "cosine", SchedulerType.COSINE),
        ("saves", "true", True),
        ("saves", "all", "all"),
        ("metrics", "all", "all"),
        ("metrics", ["a", "b"], ["a", "b"]),
        ("scale", "checkpoint", "checkpoint"),
        ("scale", "2", 2.0),
    ],
)
def test_values_are_converted_to_the_type_of_their_field(name: str, given: Any, value: Any) -> None:
    converted = getattr(build_config(Settings, {"name": "x", name: given}), name)
    assert (converted, type(converted)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("steps", 1.5),
        ("steps", True),
        ("steps", None),
        ("rate", "fast"),
        ("rate", True),
        ("on", "perhaps"),
        ("mode", "c"),
        ("mode", None),
        ("source", [1]),
        ("name", ["x"]),
        ("name", True),
        ("weights", "[1"),
        ("weights", [True]),
        ("scheduler", "cosin"),
    ],
)
def test_a_misfitting_value_is_one_error_that_names_its_field(name: str, given: Any) -> None:
    with pytest.raises(ValueError, match=f"^mine.yaml: {name} is {re.escape(repr(given))}, "):
        build_config(Settings, {"name": "x", name: given}, "mine.yaml")


def test_an_unknown_field_and_a_missing_one_are_named() -> None:
    with pytest.raises(ValueError, match=r"'rat'.* 'rate'"):
        build_config(Settings, {"name": "x", "rat": 1})
    with pytest.raises(ValueError, match="lacks name"):
        build_config(Settings, {})


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
        (["--weights", "0", "--name", "x", "--weights", "1", "2"], {"weights": ["0", "1", "2"], "name": "x"}),
        (["--weights", "[0, 1]", "--name", "x"], {"weights": "[0, 1]", "name": "x"}),
    ],
)
def test_flags_do_not_consume_the_argument_after_them_and_lists_may_be_in_parts(
    given: list[str], values: dict[str, str]
) -> None:
    parser = OptionParser(Numbers)
    parser.add_argument("place", nargs="?", default=argparse.SUPPRESS)
    assert parser.read(given) == (values, [])


@pytest.mark.parametrize(
    ("given", "words"),
    [("--colums", "--columns"), ("--ratee=1e-4", "--rate"), ("--name", "NAME"), ("two words", "'two words'")],
)
def test_an_unknown_argument_suggests_what_is_meant(given: str, words: str) -> None:
    message = unknown_option(given, [Settings])
    assert given.partition("=")[0] in message
    assert words in message

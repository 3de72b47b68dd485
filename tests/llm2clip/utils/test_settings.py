"""Settings from recipes and options, what is said of wrong ones, and the text of `--help`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

import pytest
from transformers import TrainingArguments

from llm2clip.encoders.embed import EmbedConfig
from llm2clip.trainers.distill_config import DistillRecipe
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.option_names import MOST_USED, NAMES_ELSEWHERE, OF_THE_TRAINER
from llm2clip.utils.options import (
    OptionParser,
    format_help,
    option_groups,
    placeholder,
    unknown_option,
)
from llm2clip.utils.settings import build_config


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
    """A list of numbers between other fields."""

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


@pytest.mark.parametrize("text", ["a", "[a, b]", "[a dog] on grass", "{", "[cat]", "null", "1e-3"])
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
        (Stage1Recipe, "--lora-r=8", "--lora-rank"),
        (Stage1Recipe, "--temperature", "--scale"),
        (Stage2Recipe, "--text-adapter-depth", "--adapter-num-layers"),
        (Stage2Recipe, "--lr=1e-4", "--learning-rate"),
        (Stage2Recipe, "--epochs", "--num-train-epochs"),
        (Stage2Recipe, "--batch-size", "--per-device-train-batch-size"),
        (Stage2Recipe, "--precision", "--bf16"),
        (Stage2Recipe, "--train-data", "--sources"),
        (EmbedConfig, "--precision", "--dtype"),
        (EmbedConfig, "--llm", "--text-model-name-or-path"),
    ],
)
def test_an_unknown_option_suggests_the_one_that_is_meant(config_class: type, given: str, meant: str) -> None:
    assert unknown_option(given, [config_class]) == (
        f"there is no option {given.partition('=')[0]}; did you mean {meant}?"
    )


def test_names_elsewhere_and_names_in_the_help_are_those_of_settings() -> None:
    known = {*get_type_hints(Stage1Recipe), *get_type_hints(Stage2Recipe), *get_type_hints(DistillRecipe)}
    others = {"batch_size", "num_workers", "block_size", "mask_token", "data"}  # of evaluate, embed and mntp
    assert {*MOST_USED, *OF_THE_TRAINER} <= known
    assert {field for names in NAMES_ELSEWHERE.values() for field in names.split()} <= known | others


def test_a_wrong_use_of_an_option_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="argument --steps: expected one argument"):
        parse("--name", "x", "--steps")


@pytest.mark.parametrize(
    ("config_class", "name", "shown"),
    [
        (Settings, "name", "TEXT"),
        (Settings, "rate", "FLOAT"),
        (Settings, "steps", "INT"),
        (Settings, "on", ""),
        (Settings, "columns", "TEXT ..."),
        (Settings, "source", "YAML"),
        (Settings, "mode", "{a,b}"),
        (Settings, "weights", "FLOAT ..."),
        (Stage2Recipe, "output_dir", "PATH"),
        (Stage2Recipe, "verify_cache", "{true,false}"),
        (Stage2Recipe, "adapter_normalize", "{true,false}"),
        (Stage2Recipe, "eval_strategy", "{no,steps,epoch}"),
        (Stage2Recipe, "logit_scale_init_value", "FLOAT|{checkpoint}"),
        (Stage2Recipe, "report_to", "TEXT ..."),
    ],
)
def test_a_placeholder_says_what_a_field_takes(config_class: type, name: str, shown: str) -> None:
    (one,) = (one for one in fields(config_class) if one.name == name)  # type: ignore[arg-type]
    assert placeholder(one, get_type_hints(config_class)[name]) == shown


def test_a_stage_shows_its_own_settings_and_few_of_the_trainer() -> None:
    few = [row for rows in option_groups(Stage1Recipe, (), everything=False).values() for row in rows]
    every = [row for rows in option_groups(Stage1Recipe, (), everything=True).values() for row in rows]
    own = {*get_type_hints(Stage1Recipe)} - {*get_type_hints(TrainingArguments)}
    shown = {row[0].split()[0][2:].replace("-", "_") for row in few}
    assert own <= shown
    assert len(shown) < len(own) + 40 < len(every)
    assert len({row[0].split()[0] for row in every}) == len(every)


def test_texts_are_short_unless_everything_is_shown() -> None:
    (short,) = (row for row in option_groups(Stage2Recipe, (), False)["most used"] if row[0].startswith("--tower"))
    assert short == (
        "--tower-chunk-size INT",
        "Rows per forward pass of the towers (GradCache). Unset: the whole batch at once.",
    )
    (whole,) = (row for row in option_groups(Stage2Recipe, (), True)["most used"] if row[0].startswith("--tower"))
    assert "the gradients stay the same" in whole[1]


def test_help_is_laid_out_in_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    groups = option_groups(Settings, ("name", "on", "columns", "source", "limit", "weights"), True)
    assert format_help("it [OPTIONS]", "Does it.", groups, "The end.").splitlines() == [
        "usage: it [OPTIONS]",
        "",
        "Does it.",
        "",
        "options:",
        "  --rate FLOAT  100% of it",
        "                (default: 0.001)",
        "  --steps INT   (default: 10)",
        "  --mode {a,b}  (default: a)",
        "",
        "The end.",
    ]

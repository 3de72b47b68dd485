"""The text of `--help`."""

from __future__ import annotations

from dataclasses import fields
from typing import get_type_hints

import pytest
from transformers import TrainingArguments

from llm2clip.trainers.stage1_config import Stage1Config
from llm2clip.trainers.stage2_config import Stage2Config
from llm2clip.utils.help_text import format_help, option_groups, placeholder
from tests.llm2clip.utils.test_options import Settings


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
        (Stage2Config, "output_dir", "PATH"),
        (Stage2Config, "verify_cache", "{true,false}"),
        (Stage2Config, "adapter_normalize", "{true,false}"),
        (Stage2Config, "eval_strategy", "{no,steps,epoch}"),
        (Stage2Config, "logit_scale_init_value", "FLOAT|{checkpoint}"),
        (Stage2Config, "report_to", "TEXT ..."),
    ],
)
def test_a_placeholder_says_what_a_field_takes(config_class: type, name: str, shown: str) -> None:
    (field,) = (field for field in fields(config_class) if field.name == name)  # type: ignore[arg-type]
    assert placeholder(field, get_type_hints(config_class)[name]) == shown


def test_a_stage_shows_its_own_settings_and_few_of_the_trainer() -> None:
    few = [row for rows in option_groups(Stage1Config, (), everything=False).values() for row in rows]
    every = [row for rows in option_groups(Stage1Config, (), everything=True).values() for row in rows]
    own = {*get_type_hints(Stage1Config)} - {*get_type_hints(TrainingArguments)}
    shown = {row[0].split()[0][2:].replace("-", "_") for row in few}
    assert own <= shown
    assert len(shown) < len(own) + 40 < len(every)
    assert len({row[0].split()[0] for row in every}) == len(every)


def test_texts_are_short_unless_everything_is_shown() -> None:
    (short,) = (row for row in option_groups(Stage2Config, (), False)["most used"] if row[0].startswith("--tower"))
    assert short == (
        "--tower-chunk-size INT",
        "Rows per forward pass of the towers (GradCache). Unset: the whole batch at once.",
    )
    (whole,) = (row for row in option_groups(Stage2Config, (), True)["most used"] if row[0].startswith("--tower"))
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

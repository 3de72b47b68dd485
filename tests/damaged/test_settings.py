"""A setting with any value is accepted in its declared type, or refused by its name."""

from __future__ import annotations

import dataclasses
import importlib
import random
import types
import typing
from enum import Enum
from typing import Any

import pytest
from transformers import TrainingArguments

from llm2clip.cli import COMMANDS
from llm2clip.command_line.settings import build_config
from llm2clip.data import CaptionSource, PairSource
from tests.damage import VALUES
from tests.refusals import accepted

# What a command needs besides its recipe, so that one value is wrong and no other.
NEEDED: dict[str, dict[str, Any]] = {
    "evaluate": {"model": "x", "benchmark": ["cifar10"], "data": "x"},
    "report": {"results": ["x"]},
    "CaptionSource": {"path": "x"},
    "PairSource": {"path": "x", "anchor_column": "a", "positive_column": "b"},
    "check-data": {"source": "x"},
    "convert": {"source": "x", "destination": "y"},
    "merge": {"first": "x", "second": "y", "destination": "z"},
    "build": {"model": "x"},
    "index": {"folder": "x", "model": "y", "output_dir": "z"},
    "search": {"index": "x", "query": ["a dog"]},
    "serve": {"model": "x"},
    "tags": {"index": "x", "labels": "y"},
    **{stage: {"use_cpu": True, "output_dir": "x"} for stage in ("stage1", "stage2", "mntp", "distill-text")},
}
CLASSES: dict[str, Any] = {
    **{name: getattr(importlib.import_module(command.module), command.config) for name, command in COMMANDS.items()},
    **{"CaptionSource": CaptionSource, "PairSource": PairSource},
}
INHERITED = {field.name for field in dataclasses.fields(TrainingArguments)}
# What starts other libraries or reaches for other machines is not tried.
OUTSIDE = {"fsdp", "fsdp_config", "ddp_backend", "local_rank", "parallelism_config", "hub_token"}
# Draws of the settings of the Trainer, whose class is slow to make.
DRAWS = 60


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has a declared type."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is Any:
        return True
    if kind in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if kind is typing.Literal:
        return value in arguments
    if kind is list:
        return isinstance(value, list) and (not arguments or all(fits(item, arguments[0]) for item in value))
    if kind is dict:
        return isinstance(value, dict) and (not arguments or all(fits(item, arguments[1]) for item in value.values()))
    if kind is float:
        return type(value) in (int, float)
    if kind is type(None) or value is None:
        return value is None and kind is type(None)
    return type(value) is kind or (isinstance(value, Enum) and isinstance(value, kind))


@pytest.mark.parametrize("command", CLASSES)
def test_a_setting_with_any_value_has_its_type_or_is_refused(command: str) -> None:
    config_class, hints, generator = CLASSES[command], typing.get_type_hints(CLASSES[command]), random.Random(command)
    names = [field.name for field in dataclasses.fields(config_class) if field.init]
    is_stage = issubclass(config_class, TrainingArguments)
    own = [name for name in names if not (is_stage and name in INHERITED)]
    others = sorted({*names} - {*own} - OUTSIDE)
    of_each = len(VALUES) // (4 if is_stage else 2)
    draws = [(name, value) for name in own for value in generator.sample(VALUES, of_each)]
    draws += [(generator.choice(others), generator.choice(VALUES)) for _ in range(DRAWS if is_stage else 0)]
    taken = 0
    for name, value in draws:
        # As in a recipe, as an option or argument, and one entry of a list.
        spellings = (name, f"--{name.replace('_', '-')}", f"{name.removesuffix('s')} ", name.upper())
        fields = {**NEEDED.get(command, {}), name: value}
        config = accepted(lambda fields=fields: build_config(config_class, fields), *spellings)
        taken += config is not None
        if config is not None and name in own:
            assert fits(getattr(config, name), hints[name]), (name, value, getattr(config, name))
    assert 0 < taken < len(draws)

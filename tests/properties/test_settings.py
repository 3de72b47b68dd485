"""A setting with any value is accepted in its declared type, or refused by its name."""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from llm2clip.cli import COMMANDS
from llm2clip.data import CaptionSource, PairSource
from llm2clip.utils.settings import build_config
from tests.properties.inputs import VALUES, quick
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
    **{stage: {"use_cpu": True, "output_dir": "x"} for stage in ("stage1", "stage2", "mntp", "distill-text")},
}
INHERITED = {field.name for field in dataclasses.fields(TrainingArguments)}


def _classes() -> dict[str, type]:
    found = {
        name: getattr(importlib.import_module(command.module), command.config) for name, command in COMMANDS.items()
    }
    return {**found, "CaptionSource": CaptionSource, "PairSource": PairSource}


CLASSES = _classes()


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


def spellings(name: str) -> list[str]:
    """How messages name a setting: as in a recipe, as an option or argument, and one entry of a list."""
    return [name, f"--{name.replace('_', '-')}", f"{name.removesuffix('s')} ", name.upper()]


def own_fields(config_class: type) -> list[str]:
    """The settings that are not those of transformers' Trainer."""
    fields = [field.name for field in dataclasses.fields(config_class) if field.init]
    return [name for name in fields if not (issubclass(config_class, TrainingArguments) and name in INHERITED)]


@quick(150)
@pytest.mark.parametrize("command", CLASSES)
@given(data=st.data())
def test_a_setting_with_any_value_has_its_type_or_is_refused(command: str, data: st.DataObject) -> None:
    config_class, hints = CLASSES[command], typing.get_type_hints(CLASSES[command])
    name = data.draw(st.sampled_from(own_fields(config_class)))
    needed = NEEDED.get(command, {})
    config = accepted(lambda: build_config(config_class, {**needed, name: data.draw(VALUES)}), *spellings(name))
    if config is not None:
        assert fits(getattr(config, name), hints[name]), getattr(config, name)


@quick(60)
@pytest.mark.parametrize("command", ["stage1", "stage2", "mntp"])
@given(data=st.data())
def test_a_setting_of_the_trainer_with_any_value_is_accepted_or_refused(command: str, data: st.DataObject) -> None:
    hints = typing.get_type_hints(CLASSES[command])
    # What starts other libraries or reaches for other machines is not tried.
    outside = {"deepspeed", "fsdp", "fsdp_config", "ddp_backend", "local_rank", "parallelism_config", "hub_token"}
    plain = {name for name in INHERITED & set(hints) - outside if CLASSES[command].__dataclass_fields__[name].init}
    name = data.draw(st.sampled_from(sorted(plain)))
    accepted(lambda: build_config(CLASSES[command], {**NEEDED[command], name: data.draw(VALUES)}), name)

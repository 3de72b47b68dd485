"""Build a settings dataclass from a YAML recipe and `--field value` options, with one clear error for a mistake.

We tried HfArgumentParser of transformers 5.23 and jsonargparse 4.53 in its place: neither suggests the nearest field
name, the former does not check the types of a recipe, and the latter shows no help texts of dataclass fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from llm2clip.command_line.option_names import nearest_field
from llm2clip.command_line.yaml_text import load_yaml

ConfigT = TypeVar("ConfigT")
ValueT = TypeVar("ValueT")
TRUTH_VALUES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
UNIONS = (typing.Union, types.UnionType)
# Types of values that become a number or a string; a bool, which Python counts as an int, does not.
ACCEPTED: dict[Any, Any] = {int: (int, float, str), float: (int, float, str), str: (str, int, float, Path)}
NAMES = {
    int: "an integer", float: "a number", bool: "true or false", str: "a string", list: "a list", dict: "a mapping",
}  # fmt: skip
PLURALS = {int: "integers", float: "numbers", str: "strings"}
MAX_SHOWN = 500  # characters of a wrong value in a message
CONVERSION_ERRORS = (AttributeError, KeyError, TypeError, ValueError)


def setting(default: ValueT, help: str, affects_numbers: bool = True) -> ValueT:
    """Declare a dataclass field with a default and the help text of its command-line option.

    Args:
        affects_numbers: Whether what a run computes depends on it, so that a resumed run needs the same value.
    """
    value: Any = {"default_factory": default.copy} if isinstance(default, (list, dict)) else {"default": default}
    return dataclasses.field(**value, metadata={"help": help, "affects_numbers": affects_numbers})


def build_config(
    config_class: type[ConfigT],
    fields: Mapping[str, Any],
    origin: str = "the recipe",
    places: Mapping[str, str] | None = None,
) -> ConfigT:
    """Build the settings of a command.

    Args:
        fields: Values by field name, from YAML or a command line; they are converted to the fields' types.
        origin: Where the fields come from, for error messages.
        places: Where single fields come from, if not all of them from the same place.

    Raises:
        ValueError: A field does not exist (the message suggests the nearest one), a required field is missing, a
            value does not fit the type of its field, or the settings class refuses it.
    """
    places = places or {}
    values = _converted(config_class, fields, origin, places)
    # A field without a default has MISSING for both.
    required = [
        field.name
        for field in dataclasses.fields(config_class)  # type: ignore[arg-type]
        if field.init and field.default is field.default_factory and field.name not in values
    ]
    if required:
        raise ValueError(f"{origin} lacks {', '.join(required)}.")
    try:
        return config_class(**values)
    except ValueError as error:
        named = [name for name in places if re.search(rf"\b{re.escape(str(name))}\b", str(error))]
        if type(error) is not ValueError or not named:
            raise
        ways = ", ".join(f"{name} is set by {places[name]}" for name in named)
        raise ValueError(f"{str(error).rstrip(' .')}. {ways}.") from error


def change_config(config: ConfigT, fields: Mapping[str, Any], origin: str = "the recipe") -> ConfigT:
    """Copy the settings of a command with other values of some fields, which are converted as in [`build_config`]."""
    return dataclasses.replace(config, **_converted(type(config), fields, origin, {}))  # type: ignore[type-var]


def _converted(
    config_class: type, fields: Mapping[str, Any], origin: str, places: Mapping[str, str]
) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(config_class) if field.init]
    hints = _hints(config_class)
    values = {}
    for name, value in fields.items():
        place = places.get(name, origin)
        if name not in known:
            meant = nearest_field(str(name), known)
            raise ValueError(f"{place} has no field {name!r}" + (f"; did you mean {meant!r}?" if meant else "."))
        try:
            values[name] = convert(value, hints[name])
        except CONVERSION_ERRORS:
            wanted = describe(hints[name])
            raise ValueError(f"{place}: {name} is {_shown(value)}, but it has to be {wanted}.") from None
    return values


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


# Manifests are read by the thousand.
_hints = functools.cache(typing.get_type_hints)


def nearest(name: str, known: Iterable[str]) -> str:
    """End an error message with the name that was probably meant."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else "."


def convert(value: Any, hint: Any) -> Any:
    """Convert a value from YAML (`1e-4` is a string) or a command line (all are), or raise a `CONVERSION_ERRORS`."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in UNIONS:
        return _convert_union(value, arguments)
    if kind is typing.Literal:
        return {str(option): option for option in arguments}[str(value)]
    if kind in (list, dict):
        return _convert_collection(value, hint, kind)
    if kind is bool:
        return value if isinstance(value, bool) else TRUTH_VALUES[value.lower()]
    if kind in ACCEPTED:
        fraction = kind is int and isinstance(value, float) and not value.is_integer()
        if isinstance(value, bool) or not isinstance(value, ACCEPTED[kind]) or fraction:
            raise ValueError(value)
    return kind(value) if kind in ACCEPTED or is_enum(kind) else value


def _convert_union(value: Any, options: Sequence[Any]) -> Any:
    if value is None or (isinstance(value, str) and value.lower() == "null"):
        if type(None) in options:
            return None
        raise ValueError(value)
    # An enumeration that is a string too, as those of transformers' Trainer, knows its own values.
    if any(map(is_enum, options)):
        options = [option for option in options if option is not str]
    if isinstance(value, str) and str in options:  # and not a list of one
        options = [option for option in options if typing.get_origin(option) is not list]
    # Every value fits `str`, so that narrower types go first.
    for option in sorted(options, key=lambda option: option is str):
        if option is not type(None):
            with contextlib.suppress(*CONVERSION_ERRORS):
                return convert(value, option)
    raise ValueError(value)


def _convert_collection(value: Any, hint: Any, kind: Any) -> Any:
    if kind is dict and value in (None, "null"):
        return {}
    if isinstance(value, str):
        value = [value] if hint == list[str] else load_yaml(value)
        value = [value] if kind is list and not isinstance(value, list) else value
    if not isinstance(value, kind):
        raise ValueError(value)
    arguments = typing.get_args(hint)
    if not arguments:
        return value
    if kind is list:
        return [convert(item, arguments[0]) for item in value]
    return {key: convert(item, arguments[1]) for key, item in value.items()}


def is_enum(hint: Any) -> bool:
    """Whether a type is an enumeration."""
    return isinstance(hint, type) and issubclass(hint, Enum)


def describe(hint: Any) -> str:
    """Name a type in words, such as `an integer or null`."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in UNIONS:
        options = [describe(option) for option in arguments if option is not type(None)]
        return " or ".join(dict.fromkeys(options)) + (" or null" if type(None) in arguments else "")
    if kind is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if is_enum(kind):
        return "one of " + ", ".join(str(option.value) for option in kind.__members__.values())
    if kind is list and arguments:
        return f"a list of {PLURALS.get(arguments[0], 'mappings')}"
    return NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def options_of(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)


def require(config: Any, names: Sequence[str], output_dir: bool = True) -> None:
    """Raise ValueError if some of the settings `names` are empty; the message lists all of them.

    Args:
        output_dir: Whether `output_dir` is one of them.
    """
    missing = [name for name in (*["output_dir"] * output_dir, *names) if not getattr(config, name)]
    if missing:
        raise ValueError(f"{type(config).__name__} needs {', '.join(missing)}; set them in the recipe or as options.")


def defaults_of(config: Any) -> dict[str, Any]:
    """Return the default of each setting of a dataclass."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config)
    }


def refuse(config: Any, names: Iterable[str], why: str) -> None:
    """Raise ValueError if one of these settings of a dataclass is given, of which `why` says that it has no use."""
    defaults = defaults_of(config)
    values = {name: getattr(config, name) for name in names if name in defaults}
    given = [name for name, value in values.items() if value is not None and value != defaults[name]]
    if given:
        shown = " and ".join(f"{name} is {str(values[name])[:MAX_SHOWN]}" for name in given)
        unset = " and ".join(json.dumps(defaults[name], default=str) for name in given)  # where a recipe sets it
        them = "it" if len(given) == 1 else "them"
        raise ValueError(f"{shown}, but {why}; leave {them} unset, or set {them} to {unset}.")


def check_choices(config: Any) -> None:
    """Raise ValueError if a `Literal` field of a settings dataclass has another value; for its `__post_init__`."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if any(typing.get_origin(kind) is typing.Literal for kind in options_of(hint)):
            try:
                convert(getattr(config, name, None), hint)
            except CONVERSION_ERRORS:
                raise ValueError(f"{name} is {getattr(config, name)!r}, but it has to be {describe(hint)}.") from None

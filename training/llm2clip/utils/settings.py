"""From a YAML recipe and `--field value` overrides to a checked settings dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import yaml

ConfigT = TypeVar("ConfigT")
TRUTH_VALUES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def build_config(config_class: type[ConfigT], fields: Mapping[str, Any], origin: str = "the recipe") -> ConfigT:
    """Make the settings of a job.

    Args:
        config_class: A dataclass.
        fields: Values by field name, as YAML or a command line gives them; they are converted to the field's type.
        origin: Where the fields come from, for the error message.

    Raises:
        ValueError: A field does not exist (the message suggests the nearest), is required but absent, or its value
            does not fit its type.
    """
    known = {field.name: field for field in dataclasses.fields(config_class) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(config_class)
    values = {}
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"{origin} has no field {name!r}{nearest(name, known)}")
        try:
            values[name] = convert(value, hints[name])
        except (TypeError, ValueError):
            raise ValueError(f"{origin}: {name} is {value!r}, but it has to be {describe(hints[name])}.") from None
    required = [
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING and name not in values
    ]
    if required:
        raise ValueError(f"{origin} lacks {', '.join(required)}.")
    return config_class(**values)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: what was probably meant."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else "."


def convert(value: Any, hint: Any) -> Any:
    """Convert a value from YAML or a command line to a field's type.

    YAML reads `1e-4` as text, and a command line reads everything as text.

    Raises:
        ValueError: The value does not fit.
    """
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None or (isinstance(value, str) and value.lower() == "null"):
            if type(None) in options:
                return None
            raise ValueError(value)
        # Text fits str always, so a narrower type goes first.
        for option in sorted(options, key=lambda option: option is str):
            if option is not type(None):
                try:
                    return convert(value, option)
                except (TypeError, ValueError):
                    continue
        raise ValueError(value)
    if origin is typing.Literal:
        for option in typing.get_args(hint):
            if value == option or str(value) == str(option):
                return option
        raise ValueError(value)
    if origin in (list, dict) or hint in (list, dict):
        return _convert_collection(value, hint, origin or hint)
    if hint is bool:
        return _convert_bool(value)
    if hint is int:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError(value)
        return int(value)
    if hint is float:
        if isinstance(value, bool):
            raise ValueError(value)
        return float(value)
    if hint is str:
        if not isinstance(value, (str, int, float, Path)) or isinstance(value, bool):
            raise ValueError(value)
        return str(value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    return value


def _convert_collection(value: Any, hint: Any, kind: type) -> Any:
    if isinstance(value, str):
        value = [value] if hint == list[str] else _yaml(value)
        if kind is list and not isinstance(value, list):
            value = [value]
    items: Any = value
    if not isinstance(value, kind):
        raise ValueError(value)
    arguments = typing.get_args(hint)
    if kind is list and arguments:
        return [convert(item, arguments[0]) for item in items]
    return value


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(text) from error


def _convert_bool(value: Any) -> bool:
    if isinstance(value, str):
        value = TRUTH_VALUES.get(value.lower())
    if not isinstance(value, bool):
        raise ValueError(value)
    return value


def describe(hint: Any) -> str:
    """A type as a user would say it."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [describe(option) for option in typing.get_args(hint) if option is not type(None)]
        return " or ".join(dict.fromkeys(options)) + (" or null" if type(None) in typing.get_args(hint) else "")
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if origin is list and typing.get_args(hint):
        return "a list of " + {"str": "texts", "float": "numbers", "int": "whole numbers"}.get(
            getattr(typing.get_args(hint)[0], "__name__", ""), "mappings"
        )
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(str(option.value) for option in hint.__members__.values())
    if hint is dict or origin is dict:
        return "a mapping"
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def add_fields(parser: argparse.ArgumentParser, config_class: type, skip: Sequence[str] = ()) -> None:
    """Give a parser one option per field of a dataclass, with its help text, type and default.

    Values stay text; `build_config` converts them. An option that was not given is absent from the result.
    """
    hints = typing.get_type_hints(config_class)
    own, inherited = (
        parser.add_argument_group("settings"),
        parser.add_argument_group("settings of transformers' Trainer"),
    )
    bases = [base for base in config_class.__mro__[1:] if base.__module__.split(".")[0] == "transformers"]
    base_fields = {field.name for base in bases for field in _own_fields(base)}
    for field in dataclasses.fields(config_class):
        if not field.init or field.name in skip:
            continue
        hint = hints[field.name]
        text = " ".join(str(field.metadata.get("help", "")).split()).replace("%", "%%")
        group = inherited if field.name in base_fields else own
        options = {"nargs": "?", "const": "true"} if _allows(hint, bool) else {}
        if _allows(hint, list):
            options = {"nargs": "+"}
        group.add_argument(
            *dict.fromkeys((f"--{field.name.replace('_', '-')}", f"--{field.name}")),
            dest=field.name,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{text} ({describe(hint)}; default: {_default(field)})".strip(),
            **options,  # type: ignore[arg-type]
        )


def complete_flags(arguments: Sequence[str], config_class: type) -> list[str]:
    """A command line whose `--flag`s without a value say `--flag=true`, so that none takes the argument after it."""
    hints = typing.get_type_hints(config_class)
    flags = {f"--{field.name}" for field in dataclasses.fields(config_class) if hints[field.name] is bool}
    followers = [*arguments, ""][1:]
    return [
        f"{argument}=true"
        if argument.replace("-", "_").replace("__", "--", 1) in flags and follower.lower() not in TRUTH_VALUES
        else argument
        for argument, follower in zip(arguments, followers, strict=True)
    ]


def given_fields(namespace: argparse.Namespace, config_class: type) -> dict[str, Any]:
    """The fields that a parsed command line gives. One word for a list that is not of texts may be YAML."""
    names = {field.name for field in dataclasses.fields(config_class)}
    values = {name: value for name, value in vars(namespace).items() if name in names}
    hints = typing.get_type_hints(config_class)
    for name, value in values.items():
        is_word = isinstance(value, list) and len(value) == 1 and list[str] not in _options(hints[name])
        if is_word and value[0].startswith(("[", "{")):
            values[name] = value[0]
    return values


def _own_fields(base: type) -> Iterable[dataclasses.Field[Any]]:
    return dataclasses.fields(base) if dataclasses.is_dataclass(base) else ()


def _allows(hint: Any, kind: type) -> bool:
    return hint is kind or any(option is kind or typing.get_origin(option) is kind for option in _options(hint))


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        value = field.default.value if isinstance(field.default, Enum) else field.default
        return str(value).replace("%", "%%")
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory()).replace("%", "%%")
    return "required"


def require(config: Any, names: Sequence[str]) -> None:
    """Raise one error for the settings that a job cannot do without.

    Raises:
        ValueError: Some of the fields `names` are empty.
    """
    missing = [name for name in ("output_dir", *names) if not getattr(config, name)]
    if missing:
        raise ValueError(f"{type(config).__name__} needs {', '.join(missing)}; give them in the recipe or as options.")


def check_choices(config: Any) -> None:
    """Raise ValueError if a `Literal` field of a settings dataclass has another value; for its `__post_init__`."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name, None)
        choices = [
            choice
            for option in (hint, *_options(hint))
            if typing.get_origin(option) is typing.Literal
            for choice in typing.get_args(option)
        ]
        if choices and value not in choices and not (value is None and type(None) in _options(hint)):
            raise ValueError(
                f"{name} {value!r} is unknown; choose one of {', '.join(map(str, dict.fromkeys(choices)))}."
            )

"""Build a settings dataclass from a YAML recipe and `--field value` options, with one clear error for a mistake.

We tried HfArgumentParser of transformers 5.23 and jsonargparse 4.53 in its place: neither suggests the nearest field
name, the former does not check the types of a recipe, and the latter shows no help texts of dataclass fields.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import itertools
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from llm2clip.utils.yaml_text import load_yaml

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
MISFITS = (AttributeError, KeyError, TypeError, ValueError)


def setting(default: ValueT, help: str) -> ValueT:
    """Declare a dataclass field with a default and the help text of its command-line option."""
    value: Any = {"default_factory": default.copy} if isinstance(default, (list, dict)) else {"default": default}
    return dataclasses.field(**value, metadata={"help": help})


def build_config(config_class: type[ConfigT], fields: Mapping[str, Any], origin: str = "the recipe") -> ConfigT:
    """Build the settings of a command.

    Args:
        fields: Values by field name, from YAML or a command line; they are converted to the fields' types.
        origin: Where the fields come from, for error messages.

    Raises:
        ValueError: A field does not exist (the message suggests the nearest one), a required field is missing, or a
            value does not fit the type of its field.
    """
    values = _converted(config_class, fields, origin)
    # A field without a default has MISSING for both.
    required = [
        field.name
        for field in dataclasses.fields(config_class)  # type: ignore[arg-type]
        if field.init and field.default is field.default_factory and field.name not in values
    ]
    if required:
        raise ValueError(f"{origin} lacks {', '.join(required)}.")
    return config_class(**values)


def change_config(config: ConfigT, fields: Mapping[str, Any], origin: str = "the recipe") -> ConfigT:
    """Copy the settings of a command with other values of some fields, which are converted as in [`build_config`]."""
    return dataclasses.replace(config, **_converted(type(config), fields, origin))  # type: ignore[type-var]


def _converted(config_class: type, fields: Mapping[str, Any], origin: str) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(config_class) if field.init]
    hints = _hints(config_class)
    values = {}
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"{origin} has no field {name!r}{nearest(str(name), known)}")
        try:
            values[name] = convert(value, hints[name])
        except MISFITS:
            wanted = describe(hints[name])
            raise ValueError(f"{origin}: {name} is {_shown(value)}, but it has to be {wanted}.") from None
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


def unknown_option(argument: str, config_classes: Sequence[type]) -> str:
    """The error message for an argument that no field of the settings classes has."""
    if not argument.startswith("-"):
        return f"the argument {argument!r} is one too many; put quotes around a text of several words."
    option = argument.split("=")[0].lstrip("-").replace("-", "_")
    known = [field.name for config_class in config_classes for field in dataclasses.fields(config_class)]
    return f"there is no option {argument}{nearest(option, known)}"


def convert(value: Any, hint: Any) -> Any:
    """Convert a value from YAML (`1e-4` is a string) or a command line (all are), or raise one of `MISFITS`."""
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
    return kind(value) if kind in ACCEPTED or _is_enum(kind) else value


def _convert_union(value: Any, options: Sequence[Any]) -> Any:
    if value is None or (isinstance(value, str) and value.lower() == "null"):
        if type(None) in options:
            return None
        raise ValueError(value)
    # An enumeration that is a string too, as those of transformers' Trainer, knows its own values.
    if any(map(_is_enum, options)):
        options = [option for option in options if option is not str]
    # Every value fits `str`, so that narrower types go first.
    for option in sorted(options, key=lambda option: option is str):
        if option is not type(None):
            with contextlib.suppress(*MISFITS):
                return convert(value, option)
    raise ValueError(value)


def _convert_collection(value: Any, hint: Any, kind: Any) -> Any:
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


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def describe(hint: Any) -> str:
    """Name a type in words, such as `an integer or null`."""
    kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in UNIONS:
        options = [describe(option) for option in arguments if option is not type(None)]
        return " or ".join(dict.fromkeys(options)) + (" or null" if type(None) in arguments else "")
    if kind is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if _is_enum(kind):
        return "one of " + ", ".join(str(option.value) for option in kind.__members__.values())
    if kind is list and arguments:
        return f"a list of {PLURALS.get(arguments[0], 'mappings')}"
    return NAMES.get(kind, getattr(kind, "__name__", str(kind)))


def add_fields(parser: argparse.ArgumentParser, config_class: type, skip: Sequence[str] = ()) -> None:
    """Add one option per field of a dataclass to a parser, with the field's help text, type and default.

    The values stay strings, which `build_config` converts. An option that is not given is absent from the result.
    """
    hints = typing.get_type_hints(config_class)
    own = parser.add_argument_group("settings")
    inherited = parser.add_argument_group("settings of transformers' Trainer")
    bases = [base for base in config_class.__mro__[1:] if base.__module__.startswith("transformers.")]
    base_fields = {name for base in bases for name in getattr(base, "__dataclass_fields__", ())}
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
    """Replace each `--flag` without a value by `--flag=true`, so that it does not consume the next argument.

    `--no-flag` becomes `--flag=false`.
    """
    hints = typing.get_type_hints(config_class)
    flags = {f"__{field.name}" for field in dataclasses.fields(config_class) if hints[field.name] is bool}
    completed = []
    for argument, follower in itertools.pairwise([*arguments, ""]):
        name = argument.replace("-", "_")
        if name.startswith("__no_") and name not in flags and f"__{name[5:]}" in flags:
            completed.append(f"--{name[5:]}=false")
            continue
        is_bare = name in flags and follower.lower() not in TRUTH_VALUES
        completed.append(f"{argument}=true" if is_bare else argument)
    return completed


def bracket_numbers(arguments: Sequence[str], config_class: type) -> list[str]:
    """Write the numbers of each list of numbers as one value, so that it does not consume arguments after them."""
    hints = typing.get_type_hints(config_class)
    lists = {f"__{field.name}" for field in dataclasses.fields(config_class) if hints[field.name] == list[float]}
    completed: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        numbers = list(itertools.takewhile(_is_number, rest)) if argument.replace("-", "_") in lists else []
        completed.append(f"{argument}=[{', '.join(numbers)}]" if numbers else argument)
        del rest[: len(numbers)]
    return completed


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return False


def given_fields(namespace: argparse.Namespace, config_class: type) -> dict[str, Any]:
    """Return the fields that are given on a parsed command line.

    A single value in brackets for a list of anything but strings is YAML.
    """
    hints = typing.get_type_hints(config_class)
    values = {name: value for name, value in vars(namespace).items() if name in hints}
    for name, value in values.items():
        is_word = isinstance(value, list) and len(value) == 1 and list[str] not in _options(hints[name])
        if is_word and value[0].startswith(("[", "{")):
            values[name] = value[0]
    return values


def _allows(hint: Any, kind: type) -> bool:
    return any(kind in (option, typing.get_origin(option)) for option in _options(hint))


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)


def _default(field: dataclasses.Field[Any]) -> str:
    value = "required" if field.default_factory is dataclasses.MISSING else field.default_factory()
    if field.default is not dataclasses.MISSING:
        value = field.default.value if isinstance(field.default, Enum) else field.default
    return str(value).replace("%", "%%")


def require(config: Any, names: Sequence[str], output_dir: bool = True) -> None:
    """Raise ValueError if some of the settings `names` are empty; the message lists all of them.

    Args:
        output_dir: Whether `output_dir` is one of them.
    """
    missing = [name for name in (*["output_dir"] * output_dir, *names) if not getattr(config, name)]
    if missing:
        raise ValueError(f"{type(config).__name__} needs {', '.join(missing)}; set them in the recipe or as options.")


def check_choices(config: Any) -> None:
    """Raise ValueError if a `Literal` field of a settings dataclass has another value; for its `__post_init__`."""
    for name, hint in typing.get_type_hints(type(config)).items():
        options, value = _options(hint), getattr(config, name, None)
        literals = [option for option in options if typing.get_origin(option) is typing.Literal]
        choices = [choice for literal in literals for choice in typing.get_args(literal)]
        if set(options) - set(literals) - {type(None)}:
            continue  # values of another type are allowed too
        if choices and value not in choices and not (value is None and type(None) in options):
            raise ValueError(f"{name} is {value!r}, but it has to be one of {', '.join(map(str, choices))}.")

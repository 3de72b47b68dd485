"""Build a settings dataclass from a YAML recipe and `--field value` options, with one clear error for a mistake.

pydantic converts the values. HfArgumentParser of transformers 5.23 does not check the types of a recipe, and neither
it nor jsonargparse 4.53 suggests the nearest field name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import operator
import re
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from llm2clip.command_line.yaml_text import load_yaml

if TYPE_CHECKING:
    from pydantic import TypeAdapter

ConfigT = TypeVar("ConfigT")
ValueT = TypeVar("ValueT")
MAX_SHOWN = 500  # characters of a wrong value in a message
_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = MAX_SHOWN


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
            raise ValueError(f"{place} has no field {name!r}{nearest(str(name), known)}")
        try:
            values[name] = convert(value, hints[name])
        except ValueError as error:
            raise ValueError(f"{place}: {name} is {_shown.repr(value)}, but {error}.") from None
    return values


# Manifests are read by the thousand.
_hints = functools.cache(typing.get_type_hints)


def nearest(name: str, known: Iterable[str]) -> str:
    """End an error message with the name that was probably meant."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else "."


def convert(value: Any, hint: Any) -> Any:
    """Convert a value from YAML, where `1e-4` is a string, or from a command line, where all are.

    Raises:
        ValueError: It does not fit; the message says what it has to be.
    """
    options = options_of(hint)
    if isinstance(value, str):
        value = _from_text(value, options)
    elif isinstance(value, list):
        value = [str(item) if isinstance(item, Path) else item for item in value]
    elif isinstance(value, Path):
        value = str(value)
    if value is None:
        if type(None) in options:
            return None
        value = {} if typing.get_origin(hint) is dict else None
    try:
        converted = _adapter(hint).validate_python(value)
    except ValueError as error:
        reasons = [_reason(entry["msg"]) for entry in error.errors()]  # type: ignore[attr-defined]
        reasons += ["null"] if type(None) in options else []
        raise ValueError(f"it has to be {' or '.join(dict.fromkeys(reasons))}") from None
    # To pydantic, as to Python, True is 1.
    pairs = zip(value, converted, strict=True) if isinstance(value, list) else [(value, converted)]
    if any(isinstance(given, bool) and not isinstance(taken, bool) for given, taken in pairs):
        raise ValueError("it has to be a number")
    return converted


def _reason(message: str) -> str:
    """Shorten what pydantic says of a wrong value, such as `Input should be a valid number, unable to parse ...`."""
    return message.removeprefix("Input should be ").partition(", unable to ")[0]


def _from_text(text: str, options: Sequence[Any]) -> Any:
    """Return the value that a text stands for, where that may be `null`, a mapping or a list."""
    if text.lower() == "null" and type(None) in options:
        return None
    if list[str] in options:
        return text if str in options else [text]
    kinds = {typing.get_origin(option) or option for option in options}
    if dict in kinds or (list in kinds and str not in kinds):
        with contextlib.suppress(ValueError):
            value = load_yaml(text)
            if list in kinds:
                return value if isinstance(value, list) else [value]
            if value is None or isinstance(value, dict):
                return value
    return text


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    """Return what converts to a type; of a union, the first member that a value fits."""
    from pydantic import ConfigDict, Field, TypeAdapter  # a quarter of the time of `llm2clip --help`

    # Every value fits `str`. An enumeration that is a string too, as those of transformers, knows its own values.
    options = sorted(options_of(hint), key=lambda option: option is str)
    options = [option for option in options if option is not type(None)]
    if any(map(is_enum, options)):
        options.remove(str)
    union = functools.reduce(operator.or_, options)
    hint = Annotated[union, Field(union_mode="left_to_right")] if len(options) > 1 else union
    return TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True, arbitrary_types_allowed=True))


def is_enum(hint: Any) -> bool:
    """Tell whether a type is an enumeration."""
    return isinstance(hint, type) and issubclass(hint, Enum)


def options_of(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


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
            require_choice(name, getattr(config, name, None), hint)


def require_choice(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError if the value of a setting is none of the choices of a `Literal`."""
    try:
        convert(value, hint)
    except ValueError as error:
        raise ValueError(f"{name} is {value!r}, but {error}.") from None

"""Options of a command, one per field of its settings class."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import typing
from collections.abc import Sequence
from typing import Any, NoReturn

from llm2clip.utils.option_names import nearest_field
from llm2clip.utils.settings import TRUTH_VALUES, options_of


class OptionParser(argparse.ArgumentParser):
    """A parser that has one option per field, and raises `ValueError` for a mistake.

    The values stay strings, which `build_config` converts. An option that is not given is absent from the result.
    """

    def __init__(self, config_class: type, skip: Sequence[str] = ()) -> None:
        super().__init__(allow_abbrev=False, add_help=False)
        self.fields = typing.get_type_hints(config_class)
        for field in dataclasses.fields(config_class):
            if field.init and field.name not in skip:
                hint = self.fields[field.name]
                nargs: dict[str, Any] = {"nargs": "?", "const": "true"} if allows(hint, bool) else {}
                nargs = {"nargs": "+"} if allows(hint, list) else nargs
                self.add_argument(option(field.name), dest=field.name, default=argparse.SUPPRESS, **nargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def read(self, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Read arguments; returns the values that are given, and the arguments that are none of this parser's.

        A single value in brackets for a list of anything but strings is YAML.
        """
        # Intermixed, so that positional arguments may follow an option.
        namespace, unknown = self.parse_known_intermixed_args(
            bracket_numbers(complete_flags(arguments, self.fields), self.fields)
        )
        values = vars(namespace)
        for name in values.keys() & self.fields.keys():
            value = values[name]
            is_word = isinstance(value, list) and len(value) == 1 and list[str] not in options_of(self.fields[name])
            if is_word and value[0].startswith(("[", "{")):
                values[name] = value[0]
        return values, unknown


def option(name: str) -> str:
    """The option of a field; it may be written with underscores too."""
    return f"--{name.replace('_', '-')}"


def unknown_option(argument: str, config_classes: Sequence[type]) -> str:
    """The error message for an argument that no field of the settings classes has."""
    if not argument.startswith("-"):
        return f"the argument {argument!r} is one too many; put quotes around a text of several words."
    fields = [field.name for config_class in config_classes for field in dataclasses.fields(config_class)]
    given = argument.split("=")[0]
    found = nearest_field(given, fields)
    return f"there is no option {given}" + (f"; did you mean {option(found)}?" if found else ".")


def complete_flags(arguments: Sequence[str], fields: dict[str, Any]) -> list[str]:
    """Write every option of the fields, types by name, with dashes and every `--flag` as `--flag=true`.

    So a flag does not consume the next argument. `--no-flag` becomes `--flag=false`.
    """
    completed = []
    for argument, follower in itertools.pairwise([*arguments, ""]):
        given, equals, value = argument.partition("=")
        name = given[2:].replace("-", "_") if given.startswith("--") else ""
        if name not in fields and fields.get(name.removeprefix("no_")) is bool and not equals:
            completed.append(f"{option(name.removeprefix('no_'))}=false")
        elif name not in fields:
            completed.append(argument)
        elif fields[name] is bool and not equals and follower.lower() not in TRUTH_VALUES:
            completed.append(f"{option(name)}=true")
        else:
            completed.append(option(name) + equals + value)
    return completed


def bracket_numbers(arguments: Sequence[str], fields: dict[str, Any]) -> list[str]:
    """Write the numbers of each list of numbers as one value, so that it does not consume arguments after them."""
    lists = {option(name) for name, hint in fields.items() if hint == list[float]}
    completed: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        numbers = list(itertools.takewhile(_is_number, rest)) if argument in lists else []
        completed.append(f"{argument}=[{', '.join(numbers)}]" if numbers else argument)
        del rest[: len(numbers)]
    return completed


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return False


def allows(hint: Any, kind: type) -> bool:
    """Whether a type is `kind` or a union that has it."""
    return any(kind in (choice, typing.get_origin(choice)) for choice in options_of(hint))

"""Options of a command, one per field of its settings class, and the text that `--help` shows of them."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import re
import shutil
import typing
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, NoReturn

from llm2clip.command_line.settings import is_enum, nearest, options_of

# The first in the help of a stage.
MOST_USED = (
    *("vision_model_name_or_path", "text_model_name_or_path", "model_name_or_path", "student"),
    *("sources", "embedding_cache", "eval_sources", "output_dir"),
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("tower_chunk_size", "bf16", "activation_checkpointing", "warmup_steps", "lr_scheduler_type", "weight_decay"),
    *("lora_rank", "lora_alpha", "lora_dropout", "seed"),
)
# The options of the Trainer that `--help` shows, of more than a hundred.
SHOWN_TRAINER_OPTIONS = (
    *("logging_steps", "report_to", "run_name", "eval_strategy", "eval_steps", "per_device_eval_batch_size"),
    *("save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end", "metric_for_best_model"),
    *("push_to_hub", "hub_model_id", "dataloader_num_workers", "max_grad_norm", "optim", "fp16", "torch_compile"),
)
HelpEntry = tuple[str, str]
TRUTH_VALUES = ("true", "yes", "1", "false", "no", "0")
PLACEHOLDERS = {int: "INT", float: "FLOAT", bool: "{true,false}", dict: "YAML"}
PATH_ENDINGS = ("_dir", "_cache", "_file", "_name_or_path")
MAX_CHOICES = 100  # characters of the choices beside an option; more stand in its text
UNBROKEN = "\N{NO-BREAK SPACE}"
MAX_COLUMN = 38
MIN_WIDTH, MAX_WIDTH = 40, 120


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
                nargs = {"nargs": "+", "action": "extend"} if allows(hint, list) else nargs
                self.add_argument(option(field.name), dest=field.name, default=argparse.SUPPRESS, **nargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def read(self, arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        """Read arguments; returns the values that are given, and the arguments that are none of this parser's."""
        # Intermixed, so that positional arguments may follow an option.
        namespace, unknown = self.parse_known_intermixed_args(_complete(arguments, self.fields))
        # A single value may be a list in YAML.
        values = {
            name: value[0] if isinstance(value, list) and len(value) == 1 else value
            for name, value in vars(namespace).items()
        }
        return values, unknown


def option(name: str) -> str:
    """Return the option of a field; it may be written with underscores too."""
    return f"--{name.replace('_', '-')}"


def unknown_option(argument: str, config_classes: Sequence[type]) -> str:
    """Return the error message for an argument that no field of the settings classes has."""
    if not argument.startswith("-"):
        return f"the argument {argument!r} is one too many; put quotes around a text of several words."
    fields = [field.name for config_class in config_classes for field in dataclasses.fields(config_class)]
    given = argument.split("=")[0]
    name = given.strip("-").replace("-", "_")
    if name in fields:
        return f"there is no option {given}: give its value without it, where `--help` shows {name.upper()}."
    return f"there is no option {given}{nearest(option(name), map(option, fields))} `--help-all` lists them."


def _complete(arguments: Sequence[str], fields: dict[str, Any]) -> list[str]:
    """Write each option of a field with dashes, and join flags with their values by `=`.

    Otherwise these would consume the argument after them. `--flag` becomes `--flag=true`, and `--no-flag` becomes
    `--flag=false`.

    Args:
        fields: Types by name.
    """
    completed = []
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        given, equals, value = argument.partition("=")
        name = given[2:].replace("-", "_") if given.startswith("--") else ""
        if name not in fields and fields.get(name.removeprefix("no_")) is bool and not equals:
            completed.append(f"{option(name.removeprefix('no_'))}=false")
        elif name not in fields:
            completed.append(argument)
        elif fields[name] is bool and not equals and following.lower() not in TRUTH_VALUES:
            completed.append(f"{option(name)}=true")
        else:
            completed.append(option(name) + equals + value)
    return completed


def allows(hint: Any, kind: type) -> bool:
    """Tell whether a type is `kind` or a union that has it."""
    return any(kind in (choice, typing.get_origin(choice)) for choice in options_of(hint))


def option_groups(config_class: type, skip: Sequence[str], everything: bool) -> dict[str, list[HelpEntry]]:
    """Return the options of a settings class with their texts, by the title of their group.

    Args:
        skip: Fields that are no options.
        everything: Show all settings of transformers' Trainer, and whole texts; otherwise the settings of a Trainer
            that are used often, and of each text the first sentence. It makes no difference to other classes.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init and field.name not in skip}
    trainer = {
        name for base in config_class.__mro__ if base.__module__.startswith("transformers.")
        for name in inspect.get_annotations(base)
    }  # fmt: skip
    # Those of a class before those of its bases.
    declared = [name for base in config_class.__mro__ for name in inspect.get_annotations(base)]
    if not trainer:
        ordered = [fields[name] for name in dict.fromkeys(declared) if name in fields]
        return {"options": _entries(config_class, ordered, whole=True)}
    groups = {
        "most used": MOST_USED,
        "other settings of this command": [name for name in declared if name not in trainer],
        "from transformers' Trainer": SHOWN_TRAINER_OPTIONS,
        "all others from transformers' Trainer": tuple(fields) if everything else (),
    }
    shown = {}
    for title, names in groups.items():
        grouped = [fields.pop(name) for name in dict.fromkeys(names) if name in fields]
        shown[title] = _entries(config_class, grouped, whole=everything)
    return shown


def format_help(usage: str, description: str, groups: dict[str, list[HelpEntry]], ending: str = "") -> str:
    """Lay out the help of a command, as wide as the terminal."""
    width = max(MIN_WIDTH, min(shutil.get_terminal_size().columns, MAX_WIDTH)) - 1
    layout = argparse.HelpFormatter("", max_help_position=min(MAX_COLUMN, width // 2), width=width)
    layout.add_usage(usage, [], [])
    layout.add_text(description)
    for title, entries in groups.items():
        layout.start_section(title)
        for invocation, text in entries:
            layout.add_argument(argparse.Action([invocation], "", nargs=0, help=text.replace("%", "%%")))
        layout.end_section()
    layout.add_text(ending)
    return layout.format_help().rstrip().replace(UNBROKEN, " ")


def _entries(config_class: type, fields: Iterable[dataclasses.Field[Any]], whole: bool) -> list[HelpEntry]:
    hints = typing.get_type_hints(config_class)
    return [_entry(field, hints[field.name], whole) for field in fields]


def _entry(field: dataclasses.Field[Any], hint: Any, whole: bool) -> HelpEntry:
    # Those of transformers are written for argparse, which reads %% as %.
    text = " ".join(str(field.metadata.get("help", "")).split()).replace("%%", "%")
    value = placeholder(field, hint)
    if len(value) > MAX_CHOICES:
        text, value = f"{text} One of {value.strip('{}').replace(',', ', ')}." if whole else text, "NAME"
    if not whole:
        first, *others = re.split(r"(?<=\.)(?<!e\.g\.)(?<!i\.e\.) ", text)
        text = " ".join([first, *(other for other in others if other.startswith("Unset:"))])
    return f"{option(field.name)} {value}".rstrip(), f"{text}{_default(field)}".strip()


def placeholder(field: dataclasses.Field[Any], hint: Any) -> str:
    """Return what stands for the value of a field: choices, or a type; nothing for a flag that is off by default."""
    if hint is bool and field.default is False:
        return ""
    kinds = [kind for kind in options_of(hint) if kind is not type(None)]
    if any(map(is_enum, kinds)):
        # Beside an enumeration, `str` stands for the names of its values.
        kinds = [kind for kind in kinds if kind is not str]
    text = "PATH" if field.name.endswith(PATH_ENDINGS) else "TEXT"
    words = [_word(kind, text) for kind in kinds]
    return "|".join(word for word in dict.fromkeys(words) if f"{word} ..." not in words)


def _word(kind: Any, text: str) -> str:
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is list:
        return f"{_word(arguments[0], text)} ..."
    if origin is typing.Literal:
        return f"{{{','.join(map(str, arguments))}}}"
    if is_enum(kind):
        return f"{{{','.join(str(choice.value) for choice in kind.__members__.values())}}}"
    return PLACEHOLDERS.get(origin, text)


def _default(field: dataclasses.Field[Any]) -> str:
    """Return the default of a field in parentheses; one that is unset, or a flag that is off, needs no words."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    elif value is dataclasses.MISSING:
        return " (required)"
    if isinstance(value, bool):
        return f" (default:{UNBROKEN}true)" if value else ""
    if isinstance(value, list):
        value = " ".join(map(str, value))
    value = value.value if isinstance(value, Enum) else value
    return "" if value in (None, "", {}) else f" (default:{UNBROKEN}{value})"

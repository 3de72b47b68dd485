"""YAML that others wrote: recipes, and the heads of model cards. Plain values only, and bounded."""

from __future__ import annotations

from typing import Any

import yaml

MAX_CHARACTERS = 2_000_000
MAX_DEPTH = 64
# Ten times as fast, where PyYAML was built with it.
PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(text: str) -> Any:
    """Read a YAML document of plain values.

    Aliases (`*name`) are refused: in a few lines, they can stand for billions of values.

    Raises:
        ValueError: It is not YAML, or has other values than plain ones, or is too long or too deep; the message says
            which, and where.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters, and at most {MAX_CHARACTERS:,} are read")
    try:
        _refuse_aliases_and_depth(text)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        # A tag whose value does not fit, such as `!!bool maybe`.
        raise ValueError(f"a value does not fit its tag ({type(error).__name__}: {error})") from error


def key_lines(text: str) -> dict[str, int]:
    """The line of each key of a document that [`load_yaml`] has read, a mapping."""
    root = yaml.compose(text, Loader=PARSER)
    return {} if root is None else {key.value: key.start_mark.line + 1 for key, _ in root.value}


def _refuse_aliases_and_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=PARSER):
        line = 0 if event.start_mark is None else event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"*{event.anchor} is an alias: write the values out (line {line})")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is more than {MAX_DEPTH} levels deep (line {line})")

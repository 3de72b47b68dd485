"""YAML that others wrote: recipes, and the heads of model cards. Plain values only, and bounded."""

from __future__ import annotations

from typing import Any

import yaml

MAX_CHARACTERS = 2_000_000
MAX_VALUES = 100_000
MAX_DEPTH = 64
# Ten times as fast, where PyYAML was built with it.
PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_yaml(text: str) -> Any:
    """Read a YAML document of plain values.

    A few lines of YAML can stand for billions of values: each alias (`*name`) repeats what its anchor holds. What all
    of them come to is counted before anything is built.

    Raises:
        ValueError: It is not YAML, or has other values than plain ones, or is too long, too deep or too large; the
            message says which, and where.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters, and at most {MAX_CHARACTERS:,} are read")
    try:
        _refuse_bombs(text)
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


def _refuse_bombs(text: str) -> None:
    """Raise a `ValueError` for a document that is too deep or comes to too many values."""
    sizes: dict[str, int] = {}
    # For each mapping and list that is open: its anchor, and the values so far.
    open_values: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=PARSER):
        if isinstance(event, yaml.CollectionStartEvent):
            open_values.append((event.anchor, 1))
            if len(open_values) > MAX_DEPTH:
                raise ValueError(f"it is more than {MAX_DEPTH} levels deep{_where(event)}")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, count = open_values.pop()
        elif isinstance(event, yaml.ScalarEvent):
            anchor, count = event.anchor, 1
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"*{event.anchor} stands for nothing that is complete before it{_where(event)}")
            anchor, count = None, sizes[event.anchor]
        else:
            continue
        if anchor is not None:
            sizes[anchor] = count
        parent, values = open_values[-1]
        if values + count > MAX_VALUES:
            raise ValueError(f"it comes to more than {MAX_VALUES:,} values{_where(event)}")
        open_values[-1] = parent, values + count


def _where(event: yaml.Event) -> str:
    mark = event.start_mark
    return "" if mark is None else f" (line {mark.line + 1})"

"""YAML that others wrote: recipes, and the heads of model cards. Plain values only."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Refuses aliases (`*name`): in a few lines, they can stand for billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"*{event.anchor} is an alias: write the values out (line {line})")
        return super().compose_node(parent, index)


class _UniqueLoader(_Loader):
    """Refuses repeated keys too, of which the last one would count."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                raise ValueError(f"{key.value!r} is set twice (lines {lines[key.value]} and {line}); keep one of them")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def load_yaml(text: str, unique_keys: bool = False) -> Any:
    """Read a YAML document of plain values.

    Args:
        unique_keys: Refuse a key that is set twice.

    Raises:
        ValueError: It is not YAML, or has other values than plain ones; the message says which, and where.
    """
    try:
        return yaml.load(text, Loader=_UniqueLoader if unique_keys else _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it has too many levels") from error
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        # A tag whose value does not fit, such as `!!bool maybe`.
        raise ValueError(f"a value does not fit its tag ({type(error).__name__}: {error})") from error


def key_lines(text: str) -> dict[str, int]:
    """The line of each key of a document that [`load_yaml`] has read, a mapping."""
    root = yaml.compose(text, Loader=_Loader)
    return {} if root is None else {key.value: key.start_mark.line + 1 for key, _ in root.value}

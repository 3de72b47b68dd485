"""YAML that others wrote: recipes, and the heads of model cards. Plain values only."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Refuses repeated keys, of which the last one would count."""

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


def load_yaml(text: str) -> Any:
    """Read a YAML document of plain values.

    Raises:
        ValueError: It is not YAML, sets a key twice, or has other values than plain ones; the message says where.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError) as error:
        # A tag whose value does not fit, such as `!!bool maybe`, or too many levels.
        raise ValueError(f"{type(error).__name__}: {error}") from error

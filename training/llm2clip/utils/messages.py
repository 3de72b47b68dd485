"""Parts of messages."""

from __future__ import annotations

from collections.abc import Sequence

# Names that a message has.
MAX_NAMED = 20


def shortened(names: Sequence[str]) -> str:
    """List the first names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more

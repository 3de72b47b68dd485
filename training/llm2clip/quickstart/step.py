"""A step of the quickstart, as the ledger runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Step(NamedTuple):
    """A step; see [`Ledger.run`]."""

    name: str
    title: str
    settings: dict[str, Any]
    work: Callable[[bool], dict[str, Any]]
    after: tuple[str, ...] = ()
    folder: Path | None = None

"""Which errors are ours: those that the command line prints as one line, and that name what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llm2clip.cli import USER_ERRORS
from llm2clip.files.library_errors import explain


def fault(error: BaseException, names: Iterable[str]) -> str | None:
    """Return why an error is not one of ours, in words, or None if it is.

    Args:
        names: What its message may name: files, folders, settings. One of them is enough.
    """
    message = explain(error) if isinstance(error, Exception) else None
    if message is None:
        message = str(error)
        if not isinstance(error, USER_ERRORS) or type(error) in (KeyError, UnicodeDecodeError, UnicodeEncodeError):
            return f"{type(error).__name__} is not an error of ours: {message}"
    if not any(name in message for name in names):
        return f"its message does not say what is wrong where: {type(error).__name__}: {message}"
    return None


def accepted(door: Callable[[], Any], *names: str) -> Any:
    """Return what a door returns, or None if it refuses what it is given; any error that is not ours is a failure."""
    try:
        return door()
    except Exception as error:
        if (reason := fault(error, names)) is not None:
            raise AssertionError(reason) from error
    return None

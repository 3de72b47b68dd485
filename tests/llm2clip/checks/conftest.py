"""The small data sets of the tests of `data`."""

from __future__ import annotations

from tests.llm2clip.data.conftest import _prepared, _private_cache

__all__ = ["_prepared", "_private_cache"]

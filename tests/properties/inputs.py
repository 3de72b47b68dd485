"""How many inputs are made, and of what."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


def quick(examples: int) -> settings:
    """The settings of a test: the same inputs in every run, and nothing is stored."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.differing_executors]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=slow)


# All of Unicode but halves of characters, which no encoding has.
TEXTS = st.text(max_size=40)
CAPTIONS = TEXTS.filter(str.strip)
HALVES = st.characters(categories=["Cs"])
BROKEN_TEXTS = st.tuples(TEXTS, HALVES, TEXTS).map("x".join)
SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    TEXTS,
    st.sampled_from(["", "1", "-1", "null", "true", "1e-4", "[1, 2", "{a: b}", "\0", "../x"]),
)
# What a JSON or YAML file may have in any place.
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)

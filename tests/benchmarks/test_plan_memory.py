"""What `llm2clip plan` counts is what training takes."""

from __future__ import annotations

import pytest

from benchmarks.scale.plan_memory import CASES, Case, compare


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_planned_memory_is_within_15_percent_of_the_measured_peak(case: Case) -> None:
    planned, measured = compare(case)
    assert planned == pytest.approx(measured, rel=0.15)

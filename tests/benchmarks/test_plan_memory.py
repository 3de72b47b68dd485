"""What `llm2clip plan` counts is what training takes."""

from __future__ import annotations

import pytest

from benchmarks.scale.plan_memory import CASES, Case, compare

# One case of each stage is in `.ci/run`.
OFTEN = {"stage 1, LoRA, checkpointing", "stage 2, EVA02 and adapter"}
EACH = [pytest.param(case, id=case.name, marks=[] if case.name in OFTEN else pytest.mark.nightly) for case in CASES]


@pytest.mark.slow
@pytest.mark.parametrize("case", EACH)
def test_planned_memory_is_within_10_percent_of_the_measured_peak(case: Case) -> None:
    planned, measured = compare(case)
    assert planned == pytest.approx(measured, rel=0.1)

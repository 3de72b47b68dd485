"""What the quickstart says about its tables."""

from __future__ import annotations

from typing import Any

import pytest

from llm2clip.quickstart.tables import ONE_RUN, reading

RECALL = "text_to_image_recall@10"


def rows(raw: tuple[float, float], tuned: tuple[float, float], several: bool) -> dict[str, Any]:
    spread = {"std": {RECALL: 0.01}} if several else {}
    parts = ("in_domain", "transfer")
    return {
        name: {part: {RECALL: value, **spread} for part, value in zip(parts, values, strict=True)}
        for name, values in (("raw", raw), ("tuned", tuned))
    }


@pytest.mark.parametrize(
    ("tuned", "conclusion"),
    [
        ((0.40, 0.20), "both a better fit of the trained domains and transfer"),
        ((0.40, 0.11), "a better fit of the trained domains, and no transfer"),
        ((0.31, 0.20), "transfer to another domain, and no better fit"),
        ((0.20, 0.05), "neither a better fit"),
    ],
)
def test_several_runs_allow_a_conclusion(tuned: tuple[float, float], conclusion: str) -> None:
    (sentence,) = reading(rows((0.30, 0.10), tuned, several=True), "raw", "tuned")
    assert conclusion in sentence
    assert f"{100 * tuned[0]:.1f} after 30.0 on the trained domains (" in sentence


def test_one_run_allows_none() -> None:
    (sentence,) = reading(rows((0.30, 0.10), (0.40, 0.20), several=False), "raw", "tuned")
    assert sentence == (
        "Stage 1 changes R@10, text \u2192 image, compared with raw: 40.0 after 30.0 on the trained domains and 20.0 "
        f"after 10.0 on the domain it was trained without. {ONE_RUN}"
    )

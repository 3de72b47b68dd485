"""Pairs, hard negatives, judged pairs and caption pairs pass through the suite: counts, intervals and checksums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip.evaluation.benchmarks.base import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.checksum import data_checksum
from llm2clip.evaluation.benchmarks.data import (
    BenchmarkImages,
    CaptionPairData,
    GradedData,
    HardNegativeData,
    PairData,
)
from llm2clip.evaluation.protocols.caption_retrieval import CaptionRetrievalAccuracy
from llm2clip.evaluation.protocols.choices import CaptionChoice, ImageChoice, PairScores
from llm2clip.evaluation.protocols.graded import GradedPrecision, GradedRecall
from llm2clip.evaluation.results import read_result
from llm2clip.evaluation.suite import FoundBenchmark, Suite
from tests.llm2clip.evaluation.fake_session import FakeSession

TEXTS = [f"text {row}" for row in range(12)]


def pictures(count: int) -> BenchmarkImages:
    return BenchmarkImages([f"image {row}".encode() for row in range(count)])


def paired() -> PairData:
    return PairData(pictures(12), list(TEXTS), ["a", "a", "b", "a", "b", "c"])


def judged() -> GradedData:
    own = torch.tensor([[text, text // 2] for text in range(12)])
    return GradedData(pictures(6), list(TEXTS), own[:, 1], own[:8], own.flip(1), outside=["caption 9, image 1"])


def hard_negatives() -> HardNegativeData:
    kinds = ["add_obj", "swap_obj", "add_obj", "add_att", "swap_obj", "add_att"]
    return HardNegativeData(pictures(2), torch.tensor([0, 1, 0, 1, 1, 0]), TEXTS[:6], TEXTS[6:], kinds)


KINDS: list[tuple[Callable[[], Any], Any, dict[str, int], set[str]]] = [
    (paired, PairScores(), {"pairs": 6, "kinds": 3}, {"group_score", "text_score", "image_score"}),
    (paired, ImageChoice(prompt="{}"), {"pairs": 6, "kinds": 3}, {"accuracy"}),
    (
        hard_negatives,
        CaptionChoice(),
        {"add_obj": 2, "swap_obj": 2, "add_att": 2},
        {"accuracy", "add_accuracy", "swap_accuracy"},
    ),
    (
        judged,
        GradedPrecision(),
        {"text_queries": 8, "image_queries": 6, "right_texts": 12, "outside": 1},
        {
            f"{side}_{name}"
            for side in ("text_to_image", "image_to_text")
            for name in ("map@r", "r_precision", "recall@1")
        },
    ),
    (
        judged,
        GradedRecall(),
        {"text_queries": 8, "image_queries": 6, "right_images": 8, "outside": 1},
        {f"{side}_recall@{k}" for side in ("text_to_image", "image_to_text") for k in (1, 5, 10)},
    ),
    (
        lambda: CaptionPairData(TEXTS[:6], TEXTS[6:]),
        CaptionRetrievalAccuracy(),
        {"pairs": 6},
        {"recall@1", "recall@5", "recall@10"},
    ),
]


@pytest.mark.parametrize(("make", "protocol", "counts", "scores"), KINDS)
def test_each_kind_of_data_gives_a_result(
    make: Callable[[], Any], protocol: Any, counts: dict[str, int], scores: set[str], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(2)
    texts = dict(zip(TEXTS, torch.randn(12, 3, generator=generator), strict=True))
    images = {f"image {row}".encode(): torch.randn(3, generator=generator) for row in range(12)}
    session = FakeSession(images=images, texts=texts)
    benchmark = Benchmark(
        *("tiny", "Tiny", ("composition",), "tiny", "x", "", counts, "", "", lambda folder: make()), protocol=protocol
    )
    suite = Suite(tmp_path)
    result = suite.run_one(FoundBenchmark(benchmark, tmp_path), session)
    assert set(result.scores) == scores
    assert set(result.intervals) == scores
    assert counts.items() <= result.counts.items()
    assert read_result(next(tmp_path.glob("*.json"))) == result
    name = next(iter(counts))
    wrong = replace(benchmark, counts=counts | {name: counts[name] + 1})
    with pytest.raises(BenchmarkError, match=f"{counts[name]} {name} instead of {counts[name] + 1}"):
        suite.run_one(FoundBenchmark(wrong, tmp_path), session)
    changed = make()
    changed_texts = next(value for value in vars(changed).values() if isinstance(value, list))
    changed_texts[0] = "another text"
    assert data_checksum(changed) != data_checksum(make()) == result.data["checksum"]

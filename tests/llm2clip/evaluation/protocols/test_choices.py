"""Scores of composition, against direct formulas written as plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.data import HardNegativeData, PairData
from llm2clip.evaluation.protocols.choices import CaptionChoice, ImageChoice, PairScores
from tests.llm2clip.evaluation.fake_session import FakeSession, numbered_images

PAIRS = 40


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def random_pairs() -> tuple[PairData, FakeSession, list[list[list[float]]]]:
    """Pairs, some of which have equal captions or equal images, and their similarities by pair, caption, image."""
    generator = torch.Generator().manual_seed(3)
    images = unit(torch.randn(2 * PAIRS, 4, generator=generator))
    texts = unit(images + torch.randn(2 * PAIRS, 4, generator=generator))
    texts[1] = texts[0]
    images[5] = images[4]
    data = PairData(
        numbered_images(2 * PAIRS),
        [f"text {row}" for row in range(2 * PAIRS)],
        [f"kind {row // 15}" for row in range(PAIRS)],
    )
    session = FakeSession(images=images, texts={**dict(zip(data.texts, texts, strict=True))}, max_words=1)
    similar = [
        [[float(texts[2 * pair + c] @ images[2 * pair + i]) for i in (0, 1)] for c in (0, 1)] for pair in range(PAIRS)
    ]
    return data, session, similar


def test_pair_scores_are_those_of_winoground() -> None:
    data, session, similar = random_pairs()
    text = image = group = 0
    for pair, s in enumerate(similar):
        # Pair 0 has equal captions and pair 2 equal images: what compares them is a tie, which is wrong.
        text_right = pair != 0 and s[0][0] > s[1][0] and s[1][1] > s[0][1]
        image_right = pair != 2 and s[0][0] > s[0][1] and s[1][1] > s[1][0]
        text, image, group = text + text_right, image + image_right, group + (text_right and image_right)
    assert 0 < group < min(text, image)
    found = PairScores().measure(session, data)
    assert {name: round(score * PAIRS) for name, score in found.scores.items()} == {
        "group_score": group,
        "text_score": text,
        "image_score": image,
    }
    assert found.counts == {
        "texts": 2 * PAIRS,
        "truncated_texts": 2 * PAIRS,
        "tied_queries": 2,
        "pairs": PAIRS,
    }
    assert found.groups["kind"]["kind 2"]["queries"] == 10
    with pytest.raises(BenchmarkError, match="no pair"):
        PairScores().measure(session, PairData(numbered_images(0), [], []))


def test_image_choice_averages_the_kinds() -> None:
    data, session, similar = random_pairs()
    session.encoder.texts = {f"a photo of {text}": row for text, row in session.encoder.texts.items()}
    shares = []
    for kind in range(3):
        right = 0
        for pair in range(15 * kind, min(15 * (kind + 1), PAIRS)):
            s = similar[pair]
            right += pair != 2 and s[0][0] > s[0][1] and s[1][1] > s[1][0]
        shares.append(right / (15 if kind < 2 else 10))
    found = ImageChoice().measure(session, data)
    assert found.scores == {"accuracy": pytest.approx(sum(shares) / 3)}
    assert [scores["accuracy"] for scores in found.groups["kind"].values()] == pytest.approx(shares)
    parts = [found.values["accuracy"][found.strata["accuracy"] == part].mean().item() for part in range(3)]
    assert parts == pytest.approx(shares)
    assert session.embedded[-1][0] == "a photo of text 0"  # type: ignore[index]


def test_caption_choice_averages_the_files_of_each_kind() -> None:
    kinds = ["add_att"] * 3 + ["add_obj"] + ["swap_obj"] * 2
    data = HardNegativeData(
        numbered_images(2),
        torch.tensor([0, 0, 1, 1, 0, 1]),
        [f"r{row}" for row in range(6)],
        ["near", "far"] * 3,
        kinds,
    )
    rows = {"r0": [1, 1], "r1": [1, 1], "r2": [0.2, 1], "r3": [0, 1], "r4": [3, 1], "r5": [1, 0]}
    session = FakeSession(images=[[1, 0], [0, 1]], texts={**rows, "near": [2, 2], "far": [-1, 0]})
    found = CaptionChoice().measure(session, data)
    # The first right caption points the same way as the wrong one, so that it is not preferred.
    assert found.values["accuracy"].tolist() == [0, 1, 1, 1, 1, 0]
    assert found.scores == {
        "accuracy": pytest.approx((2 / 3 + 1 + 1 / 2) / 3),
        "add_accuracy": pytest.approx((2 / 3 + 1) / 2),
        "swap_accuracy": pytest.approx(1 / 2),
    }
    assert found.groups["kind"]["add_att"] == {"accuracy": pytest.approx(2 / 3), "queries": 3}
    assert found.counts["tied_queries"] == 2
    assert found.strata["add_accuracy"].tolist() == [0, 0, 0, 1]

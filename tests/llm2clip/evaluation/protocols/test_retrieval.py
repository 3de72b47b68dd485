"""Retrieval by rows, compared with values written by hand, and between captions, with plain loops."""

from __future__ import annotations

import pytest
import torch

from llm2clip.evaluation.benchmark import BenchmarkError
from llm2clip.evaluation.data import CaptionPairData, MultilingualData, RetrievalData
from llm2clip.evaluation.metrics import caption_retrieval_metrics
from llm2clip.evaluation.protocols.caption_retrieval import CaptionRetrievalAccuracy
from llm2clip.evaluation.protocols.retrieval import MultilingualRetrieval, RetrievalProtocol
from tests.llm2clip.evaluation.fake_session import FakeSession, numbered_images

X, Y, Z = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]


def test_each_row_is_a_query_and_only_its_own_image_is_right() -> None:
    """Two images share a caption, one caption is repeated, one is empty, and one image has none."""
    data = RetrievalData.from_captions(numbered_images(4), [["a dog", "a dog", "a cat"], ["a dog"], ["", "a bus"], []])
    table = {"a dog": X, "a cat": Y, "": Y, "a bus": Z}
    found = RetrievalProtocol().measure(FakeSession([X, Y, Z, [1.0, 1.0, 1.0]], table), data)
    # Text rows: a dog, a dog, a cat of image 0; a dog of 1; empty, a bus of 2.
    assert found.values["text_to_image_recall@1"].tolist() == [1, 1, 0, 0, 0, 1]
    assert found.scores["text_to_image_recall@1"] == 0.5
    # Image 0: "a dog" three times at the top, two of them its own. Image 1: "a dog" is behind "a cat" and "".
    hits = found.values["image_to_text_recall@1"]
    assert hits.tolist() == pytest.approx([2 / 3, 0, 1])
    assert found.scores["image_to_text_recall@5"] == found.values["image_to_text_recall@5"].mean()
    assert next(iter(found.scores)) == "text_to_image_recall@1"
    # The three texts that miss are at a right angle to their own image and to another.
    assert found.counts == {
        "images": 4, "texts": 6, "image_queries": 3, "truncated_texts": 0, "empty_texts": 1,
        "tied_text_queries": 3, "tied_image_queries": 2,
    }  # fmt: skip
    assert found.protocol["positives"] == "rows"


def test_every_image_of_a_text_with_several_is_right() -> None:
    qrels = torch.tensor([[0, 0], [0, 1], [1, 2]])
    data = RetrievalData(numbered_images(3), ["a dog", "a cat"], torch.tensor([0, 2]), qrels)
    session = FakeSession([X, Y, Z], {"a dog": [0.1, 1.0, 0.0], "a cat": [0.2, 0.0, 1.0]})
    found = RetrievalProtocol().measure(session, data)
    assert found.values["text_to_image_recall@1"].tolist() == [1, 1]
    # Image 0 is nearer to "a cat", images 1 and 2 are asked for their own text.
    assert found.values["image_to_text_recall@1"].tolist() == [0, 1, 1]
    assert found.protocol["positives"] == "pairs"
    assert found.groups["length"]["0-16"].keys() == {"texts"} | {f"text_to_image_recall@{k}" for k in (1, 5, 10)}


def test_truncated_texts_are_counted_and_grouped_by_length() -> None:
    texts = ["a", " ".join(["b"] * 16), " ".join(["c"] * 17), " ".join(["d"] * 78), " ".join(["e"] * 600)]
    data = RetrievalData.from_captions(numbered_images(5), [[text] for text in texts])
    vectors = torch.eye(5)
    # The third text finds the image of the fourth.
    session = FakeSession(vectors, dict(zip(texts, vectors[[0, 1, 3, 3, 4]], strict=True)), max_words=20)
    found = RetrievalProtocol().measure(session, data)
    assert found.counts["truncated_texts"] == 2
    lengths = found.groups["length"]
    assert list(lengths) == ["0-16", "17-32", "78-128", "513-"]
    assert [group["texts"] for group in lengths.values()] == [2, 1, 1, 1]
    assert [group["text_to_image_recall@1"] for group in lengths.values()] == [1, 0, 1, 1]
    # The third image is at the right angle to all texts; the fourth has two texts on top, of which one is right.
    assert [group["image_to_text_recall@1"] for group in lengths.values()] == pytest.approx([1, 1 / 5, 1 / 2, 1])


def test_languages_share_their_images_and_the_mean_says_of_which() -> None:
    shared = numbered_images(3)
    data = MultilingualData(
        {
            "de": RetrievalData.from_captions(shared, [["Hund"], ["Katze", "Kater"], []]),
            "en": RetrievalData.from_captions(shared, [["dog"], [], []]),
        }
    )
    table = {"Hund": X, "Katze": X, "Kater": Y, "dog": Y}
    session = FakeSession([X, Y, Z], table)
    found = MultilingualRetrieval().measure(session, data)
    assert session.embedded.count(3) == 1
    recalls = {name: group["text_to_image_recall@1"] for name, group in found.groups["language"].items()}
    assert recalls == {"de": pytest.approx(2 / 3), "en": 0.0}
    assert found.scores["text_to_image_recall@1"] == pytest.approx(1 / 3)
    assert found.values["text_to_image_recall@1"].tolist() == [1, 0, 1, 0]
    assert found.strata["text_to_image_recall@1"].tolist() == [0, 0, 0, 1]
    assert found.strata["image_to_text_recall@1"].tolist() == [0, 0, 1]
    assert found.protocol["mean_over"] == ["de", "en"]
    assert [found.counts[name] for name in ("texts", "images", "languages")] == [4, 3, 2]
    assert data.counts() == {"images": 3, "texts": 4, "languages": 2}
    without = MultilingualRetrieval(mean_over=("de", "fr")).measure(session, data)
    assert without.protocol["mean_over"] == ["de"]
    assert without.scores["text_to_image_recall@1"] == pytest.approx(2 / 3)
    assert list(without.groups["language"]) == ["de", "en"]


def test_data_without_captions_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="no caption"):
        RetrievalProtocol().measure(FakeSession([X], {}), RetrievalData.from_captions(numbered_images(1), [[]]))
    with pytest.raises(BenchmarkError, match="no language to average: the data has none"):
        MultilingualRetrieval().measure(FakeSession([X], {}), {})


PAIRS = 40


def test_the_second_caption_of_the_same_image_is_looked_for() -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(2 * PAIRS, 4, generator=generator), dim=1)
    rows[PAIRS:] = torch.nn.functional.normalize(rows[:PAIRS] + 0.3 * rows[PAIRS:], dim=1)
    names = [f"text number {row}" for row in range(2 * PAIRS)]
    # Two images have the same second caption: neither order of them counts.
    names[PAIRS + 1], rows[PAIRS + 1], rows[0], rows[1] = names[PAIRS], rows[PAIRS], rows[PAIRS], rows[PAIRS]
    session = FakeSession(images=[], texts=dict(zip(names, rows, strict=True)), max_words=2)
    found = CaptionRetrievalAccuracy().measure(session, CaptionPairData(names[:PAIRS], names[PAIRS:]))
    hits = 0.5 + 0.5
    for query in range(2, PAIRS):
        nearest = max(range(PAIRS), key=lambda target: float(rows[query] @ rows[PAIRS + target]))
        hits += nearest == query
    assert 1 < hits < PAIRS - 1
    assert found.scores["recall@1"] == pytest.approx(hits / PAIRS)
    metrics = caption_retrieval_metrics(rows[:PAIRS], rows[PAIRS:])
    assert found.scores == {name: pytest.approx(metrics[name]) for name in ("recall@1", "recall@5", "recall@10")}
    assert found.values["recall@1"][:2].tolist() == [0.5, 0.5]
    assert found.counts == {"pairs": PAIRS, "truncated_texts": 2 * PAIRS, "tied_text_queries": 2}
    assert found.protocol["pair"] == "caption 1 to caption 2"
    assert found.protocol["gallery"] == "40 captions"
    with pytest.raises(BenchmarkError, match="no pair of captions"):
        CaptionRetrievalAccuracy().measure(session, CaptionPairData([], []))

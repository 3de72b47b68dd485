"""Queries of texts, of images and of both, and what leaves results out: near-duplicates, and what is not relevant."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm2clip import cli
from llm2clip.encoders.ours import OurEncoder
from llm2clip.search import relevance
from llm2clip.search.queries import AWAY
from llm2clip.search.search_index import SearchIndex

from .helpers import Model, as_json, error, picture, rows

TEXT, OTHER = "two children play football", "a red bus"


def stored(folder: Path) -> dict[str, np.ndarray]:
    """The stored embeddings as unit vectors, by key."""
    embeds = {row["key"]: np.asarray(row["vector"], np.float64) for row in rows(folder)}
    return {key: embed / np.linalg.norm(embed) for key, embed in embeds.items()}


def test_a_batch_is_one_call_of_each_side_of_the_model_and_one_of_the_store(
    indexed: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = SearchIndex.open(indexed)
    opened.encoder()
    queries: list[Any] = [TEXT, pictures / "00.png", (picture(3), OTHER), OTHER, (pictures / "a" / "07.png", TEXT)]
    alone = [opened.search(query, 5, without="a train") for query in queries]
    calls: list[str] = []
    for owner, name in ((OurEncoder, "encode_text"), (OurEncoder, "encode_image"), (type(opened.store), "search")):
        method = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda *given, name=name, method=method, **options: calls.append(name) or method(*given, **options),
        )
    together = opened.search(queries, 5, without="a train")
    assert sorted(calls) == ["encode_image", "encode_text", "search"]
    for found, expected in zip(together, alone, strict=True):
        assert [one.key for one in found] == [one.key for one in expected]
        assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-5)


def test_an_image_and_a_text_are_one_query_by_the_sum_of_their_unit_vectors(
    indexed: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened, file = SearchIndex.open(indexed), pictures / "a" / "07.png"
    text, image, both = opened.embed([TEXT, file, (file, TEXT)])
    np.testing.assert_allclose(both, (text + image) / np.linalg.norm(text + image), atol=1e-6)
    expected = opened.search((file, TEXT), 4)
    assert [one.key for one in expected] == [one.key for one in opened.search([(file, TEXT)], 4)[0]]
    found = as_json(capsys, indexed, TEXT, OTHER, "--image", file, "--combine", "--top", 4)
    assert [(query["text"], query["image"]) for query in found] == [(TEXT, str(file)), (OTHER, str(file))]
    assert [one["key"] for one in found[0]["results"]] == [one.key for one in expected]
    for options in (["--image", file], [TEXT]):
        assert "combine needs texts and --image" in error(capsys, "search", indexed, *options, "--combine")
    for pair in ((TEXT, file), (str(file), TEXT), (file, TEXT, TEXT)):
        with pytest.raises(ValueError, match=r"a pair is \(image, text\)"):
            opened.search(pair)  # type: ignore[arg-type]


def test_results_move_away_from_a_text_by_a_share_of_its_cosine(
    indexed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened, embeds = SearchIndex.open(indexed), stored(indexed)
    query, other = opened.embed([TEXT, OTHER]).astype(np.float64)
    difference = {key: embed @ query - AWAY * (embed @ other) for key, embed in embeds.items()}
    ranked = sorted(difference, key=lambda key: -difference[key])
    plain = [one.key for one in opened.search(TEXT, 12)]
    found = opened.search(TEXT, 12, without=OTHER)
    assert [one.key for one in found] == ranked != plain
    length = np.linalg.norm(query - AWAY * other)
    assert [one.score for one in found] == pytest.approx([difference[key] / length for key in ranked], abs=1e-5)
    (shown,) = as_json(capsys, indexed, TEXT, "--without", OTHER, "--top", 12)
    assert (shown["without"], [one["key"] for one in shown["results"]]) == (OTHER, ranked)
    (again,) = opened.search(query[None], 12, without=OTHER)
    assert [one.key for one in again] == ranked
    assert "without is empty" in error(capsys, "search", indexed, TEXT, "--without", " ")


def test_near_duplicates_of_a_better_result_give_their_places_to_the_next(
    pictures: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(20):
        shutil.copy(pictures / "00.png", pictures / f"copy-{number:02d}.png")
    opened = SearchIndex.build(str(model[0]), pictures, tmp_path / "index", num_workers=0)
    assert [one.key for one in opened.search(picture(0), 12)][1:] == [f"copy-{number:02d}.png" for number in range(11)]
    found, other = opened.search([picture(0), picture(5)], 8, distinct=0.9999)
    assert found[0].key == "00.png"
    assert (len(found), len(other)) == (8, 8)
    for results in (found, other):
        assert sum(one.key == "00.png" or one.key.startswith("copy") for one in results) <= 1
    # Greedily, from the best on.
    embeds, expected = stored(tmp_path / "index"), list[str]()
    for one in opened.search(TEXT, 32):
        if all(embeds[one.key] @ embeds[key] <= 0.9 for key in expected):
            expected.append(one.key)
    assert [one.key for one in opened.search(TEXT, 32, distinct=0.9)] == expected
    (shown,) = as_json(capsys, tmp_path / "index", TEXT, "--distinct", 0.9, "--top", 2)
    assert [one["key"] for one in shown["results"]] == expected[:2]
    assert "distinct is a cosine" in error(capsys, "search", tmp_path / "index", TEXT, "--distinct", 95)
    with pytest.raises(ValueError, match="distinct is a cosine"):
        opened.search(TEXT, distinct=1.5)


def test_what_fits_no_better_than_everyday_captions_is_left_out(
    indexed: Path, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = relevance.CAPTIONS.read_text().splitlines()
    assert len(captions) == len(set(captions)) > 200
    opened, embeds = SearchIndex.open(indexed), stored(indexed)
    background = opened.encoder().encode_text(captions).double().numpy()
    ranked = opened.search(TEXT, 12)
    scores = background @ np.array([embeds[one.key] for one in ranked[:10]]).T
    measured = {one.key: (one.score - scores.mean()) / scores.std() for one in ranked}
    monkeypatch.setattr(relevance, "LEAST", float(np.mean(sorted(measured.values())[5:7])))
    found = opened.search(TEXT, 12, relevant=True)
    assert [one.key for one in found] == [one.key for one in ranked if measured[one.key] >= relevance.LEAST]
    assert [one.relevance for one in found] == pytest.approx([measured[one.key] for one in found], abs=1e-3)
    # That of a result does not depend on how many are asked for.
    assert opened.search(TEXT, 1, relevant=True) == found[:1]
    (shown,) = as_json(capsys, indexed, TEXT, "--relevant", "--top", 12)
    assert [one["relevance"] for one in shown["results"]] == pytest.approx([one.relevance for one in found], abs=1e-3)
    monkeypatch.setattr(relevance, "LEAST", 100.0)
    assert cli.main(["search", str(indexed), TEXT, OTHER, "--relevant"]) == 0
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", f"nothing in the index is relevant to: {TEXT}, {OTHER}\n")
    assert "relevant compares texts" in error(capsys, "search", indexed, "--image", pictures / "00.png", "--relevant")
    with pytest.raises(ValueError, match="relevant compares texts"):
        opened.search([TEXT, picture(1)], relevant=True)


def test_the_everyday_captions_are_embedded_once_and_stored_beside_the_index(
    indexed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    encode = OurEncoder.encode_text

    def counted(self: OurEncoder, texts: list[str], *more: Any, **options: Any) -> Any:
        sizes.append(len(texts))
        return encode(self, texts, *more, **options)

    monkeypatch.setattr(OurEncoder, "encode_text", counted)
    first = SearchIndex.open(indexed).search(TEXT, 12, relevant=True)
    assert sum(sizes) > 200
    sizes.clear()
    opened = SearchIndex.open(indexed)
    assert opened.search(TEXT, 12, relevant=True) == first
    assert opened.search(OTHER, 12, relevant=True) is not None
    assert sizes == [1, 1]
    folder = indexed.with_name("index_background")
    assert cli.main(["verify", str(next(folder.iterdir()))]) == 0
    # Where nothing can be written, a search says so and goes on.
    shutil.rmtree(folder)
    folder.write_text("in the way")
    capsys.readouterr()
    assert cli.main(["search", str(indexed), TEXT, "--relevant", "--json"]) == 0
    assert "everyday captions are not stored" in capsys.readouterr().err

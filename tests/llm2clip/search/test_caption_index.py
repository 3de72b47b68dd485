"""An index of captions: its rows, searches by text and by image, updates, and what is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm2clip import cli
from llm2clip.encoders.ours import OurEncoder
from modeling_llm2clip import LLM2CLIPModel
from tests.builders import embedding_models, tiny
from tests.tars import write_tar

from . import helpers
from .helpers import (
    Model,
    as_json,
    encoded,
    error,
    picture,
    rows,
    save_broken,
    save_table,
    save_vision_half,
)
from .places import content

index = partial(helpers.index, embed="caption")

SHORT = ["a small dog", "a red bus", "a steam train", "a red bus"]
LONG = [["two children play", " football in a park "], [], ["", "a red bus"], None]
ALL = [SHORT[0], "two children play", "football in a park", SHORT[1], SHORT[2], "a red bus", SHORT[3]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four pictures, of which one has three captions, in two columns."""
    keys = [f"row-{number}" for number in range(4)]
    return save_table(tmp_path / "data.parquet", [0, 1, 2, 3], caption=SHORT, long=LONG, key=keys, id=[5, 6, 7, 8])


@pytest.fixture
def captions(data: Path, model: Model, tmp_path: Path) -> Path:
    """An index of the captions of both columns."""
    assert index(data, model[0], tmp_path / "captions", caption_columns=["caption", "long"]) == (7, 0, 0, 0, 7)
    return tmp_path / "captions"


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The captions that a model is asked to embed."""
    found: list[str] = []
    embed = OurEncoder.encode_text

    def counted(self: OurEncoder, captions: list[str], *arguments: Any, **options: Any) -> Any:
        found.extend(captions)
        return embed(self, captions, *arguments, **options)

    monkeypatch.setattr(OurEncoder, "encode_text", counted)
    return found


def test_each_caption_is_a_row_with_the_embedding_of_a_text_query(captions: Path, model: Model) -> None:
    found = rows(captions)
    place = ("key", "row", "caption_column", "caption_number")
    assert [tuple(row[name] for name in place) for row in found] == [
        ("row-0", 0, "caption", 0), ("row-0", 0, "long", 0), ("row-0", 0, "long", 1), ("row-1", 1, "caption", 0),
        ("row-2", 2, "caption", 0), ("row-2", 2, "long", 1), ("row-3", 3, "caption", 0),
    ]  # fmt: skip
    assert [row["caption"] for row in found] == ALL
    actual = torch.tensor([row["vector"] for row in found])
    torch.testing.assert_close(actual, model[1].encode_text(ALL, tiny.processor()), atol=1e-3, rtol=0)
    assert (actual[3] == actual[5]).all()


def test_texts_and_images_find_captions_by_the_models_cosine(
    captions: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(9).save(tmp_path / "query.png")
    found = as_json(capsys, captions, "a blue bus", "--image", tmp_path / "query.png", "--top", 7)
    embeds = model[1].encode_text(ALL, tiny.processor())
    queries = [model[1].encode_text("a blue bus", tiny.processor())[0]]
    queries.append(model[1].encode_image(picture(9), tiny.processor())[0])
    for query, embed in zip(found, queries, strict=True):
        expected = (embeds @ embed).sort(descending=True)
        np.testing.assert_allclose([one["score"] for one in query["results"]], expected.values, atol=2e-3)
        for rank, one in enumerate(query["results"]):
            assert abs(float(embeds[ALL.index(one["caption"])] @ embed) - float(expected.values[rank])) < 2e-3
    first = next(one for one in found[0]["results"] if one["caption"] == "football in a park")
    assert {name: first[name] for name in ("key", "row", "caption_column", "caption_number")} == {
        "key": "row-0", "row": 0, "caption_column": "long", "caption_number": 1,
    }  # fmt: skip
    (found,) = as_json(capsys, captions, "a bus", "--where", "caption_column = 'long' AND caption_number > 0")
    assert sorted(one["key"] for one in found["results"]) == ["row-0", "row-2"]


def test_an_update_embeds_only_new_captions_and_equal_ones_once(
    data: Path, model: Model, tmp_path: Path, embedded: list[str]
) -> None:
    output, settings = tmp_path / "index", {"metadata_columns": ["id"]}
    assert index(data, model[0], output, **settings) == (4, 0, 0, 0, 4)
    assert embedded == ["a small dog", "a red bus", "a steam train"]
    del embedded[:]
    assert index(data, model[0], output, **settings) == (0, 4, 0, 0, 4)
    # Moved, removed, added, and other metadata.
    save_table(data, [0, 1, 2], caption=["a red bus", "a cat", "a small dog"], key=["x", "y", "z"], id=[1, 2, 3])
    assert index(data, model[0], output, **settings) == (1, 2, 1, 0, 3)
    assert embedded == ["a cat"]
    index(data, model[0], tmp_path / "fresh", **settings)
    found, expected = (sorted(rows(place), key=lambda row: row["row"]) for place in (output, tmp_path / "fresh"))
    for row, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(row.pop("vector"), other.pop("vector"), atol=1e-3)
        assert row == other
    assert index(data, model[0], output, **settings, overwrite=True)[:2] == (3, 0)


def test_another_kind_of_index_and_another_text_side_are_refused(
    captions: Path, data: Path, indexed: Path, pictures: Path, model: Model, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = content(captions)
    command = [data, "--model", model[0], "--output-dir"]
    assert "was built with embed caption, not image" in error(capsys, "index", *command, captions)
    assert "was built with embed image, not caption" in error(capsys, "index", *command, indexed, "--embed", "caption")
    message = error(capsys, "index", *command, captions, "--embed", "caption")
    assert "caption_columns caption, long, not kind dataset" in message
    other = LLM2CLIPModel.from_pretrained(model[0])
    with torch.no_grad():
        other.text_adapter.proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    tiny.processor().save_pretrained(tmp_path / "other")
    reason = "other weights, another LLM, tokenizer or adapter"
    assert reason in error(capsys, "search", captions, "a bus", "--model", tmp_path / "other")
    command = [data, "--model", tmp_path / "other", "--output-dir", captions, "--embed", "caption"]
    assert reason in error(capsys, "index", *command, "--caption-columns", "caption", "long")
    assert content(captions) == before
    # The image side is the same.
    query = "--image", pictures / "00.png"
    assert as_json(capsys, captions, *query, "--model", tmp_path / "other") == as_json(capsys, captions, *query)


def test_an_image_finds_captions_without_the_llm(
    captions: Path, pictures: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    half = save_vision_half(model[0], tmp_path / "half")
    helpers.refuse_llm(monkeypatch)
    query = "--image", pictures / "00.png"
    (found,), (others,) = as_json(capsys, captions, *query), as_json(capsys, captions, *query, "--model", half)
    assert found["results"]
    for one, other in zip(found["results"], others["results"], strict=True):
        assert one.pop("score") == pytest.approx(other.pop("score"), abs=1e-6)
        assert one == other


def test_a_model_without_images_finds_by_text_alone_and_one_without_texts_is_refused(
    data: Path, pictures: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_texts = embedding_models.save(tmp_path / "model", next(iter(embedding_models.FAMILIES)))
    assert index(data, tmp_path / "model", tmp_path / "index") == (4, 0, 0, 0, 4)
    (found,) = as_json(capsys, tmp_path / "index", "a blue bus", "--top", 4)
    texts = sorted(set(SHORT))
    expected = of_texts.similarity(of_texts.encode("a blue bus"), of_texts.encode(texts))[0].tolist()
    scores = {one["caption"]: one["score"] for one in found["results"]}
    assert [scores[text] for text in texts] == pytest.approx(expected, abs=2e-3)
    message = error(capsys, "search", tmp_path / "index", "--image", pictures / "00.png")
    assert "embedding model of sentence-transformers" in message
    half = save_vision_half(model[0], tmp_path / "half")
    message = error(capsys, "index", data, "--model", half, "--embed", "caption", "--output-dir", tmp_path / "other")
    assert "is the vision half of a model, which does not embed texts" in message


def test_rows_without_a_caption_are_listed(model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [{"key": "good", "texts": ["a dog"], "id": 1}, {"key": "none", "texts": [" "], "id": 2}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert index(path, model[0], tmp_path / "index", caption_columns=["texts"]) == (1, 0, 0, 1, 1)
    assert content(tmp_path / "index")["failures"] == [{"key": "none", "reason": "it has no text in texts"}]
    assert "none: it has no text in texts" in caplog.text
    with pytest.raises(ValueError, match="none of the 2 files or rows"):
        index(path, model[0], tmp_path / "numbers", caption_columns=["id"])
    with pytest.raises(ValueError, match=r"has no column 'caption'; it has key, texts, id"):
        index(path, model[0], tmp_path / "other")


def test_captions_of_image_folders_and_of_records_in_shards_are_indexed(model: Model, tmp_path: Path) -> None:
    folder, shard = tmp_path / "folder", tmp_path / "shard.tar"
    folder.mkdir()
    picture(1).save(folder / "1.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "caption": "a red bus"}))
    assert index(folder, model[0], tmp_path / "of_folder") == (1, 0, 0, 0, 1)
    record = json.dumps({"texts": ["a dog", "a cat"]}).encode()
    write_tar(shard, [("one.png", encoded(picture(2))), ("one.json", record)])
    assert index(shard, model[0], tmp_path / "of_shard", caption_columns=["json.texts"]) == (2, 0, 0, 0, 2)
    found = [(row["key"], row["caption_column"], row["caption"]) for row in rows(tmp_path / "of_shard")]
    assert found == [("one", "json.texts", "a dog"), ("one", "json.texts", "a cat")]


def test_captions_are_shown_with_their_images_unless_those_were_replaced(
    captions: Path, data: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    command = ["search", str(captions), "a bus", "--html", str(page), "--top", "7"]
    assert cli.main(command) == 0
    assert page.read_text().count("<img") == 7
    assert page.read_text().count("<div class='caption'>a red bus</div>") == 3
    save_table(data, [0, 1, 2, 3], caption=["a small dog", "other", "other", "a red bus"], long=[None, None, None, []])
    assert cli.main(command) == 0
    assert page.read_text().count("<img") == 2
    assert page.read_text().count("no longer available") == 5


def test_captions_with_broken_embeddings_end_with_one_error_and_leave_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = save_broken(tmp_path / "broken", "text_adapter.proj")
    message = error(capsys, "index", data, "--model", broken, "--output-dir", tmp_path / "index", "--embed", "caption")
    assert "3 of 3 texts are NaN or infinite: a small dog, a red bus, a steam train." in message
    assert not (tmp_path / "index").exists()

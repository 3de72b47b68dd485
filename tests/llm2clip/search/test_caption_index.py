"""An index of captions: its rows, searches by text and by image, updates, and what is refused."""

from __future__ import annotations

import json
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm2clip import cli
from llm2clip.encoders.ours import OurEncoder
from llm2clip.search.index import IndexConfig, run
from llm2clip.search.search_index import SearchIndex
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModelWithProjection
from tests.llm2clip import embedding_models
from tests.modeling_llm2clip import tiny

from .conftest import as_json, content, encoded, error, picture, rows, save_broken, save_table, stored_rows
from .test_postgres_store import failures

Model = tuple[Path, LLM2CLIPModel]
SHORT = ["a small dog", "a red bus", "a steam train", "a red bus"]
LONG = [["two children play", " football in a park "], [], ["", "a red bus"], None]
ALL = [
    "a small dog",
    "two children play",
    "football in a park",
    "a red bus",
    "a steam train",
    "a red bus",
    "a red bus",
]


def index(path: Path | str, model: Path, output: Path | None = None, **settings: Any) -> tuple[int, ...]:
    """Run `llm2clip index --embed caption`; return its counts."""
    place = {} if output is None else {"output_dir": str(output)}
    result = run(IndexConfig(folder=str(path), model=str(model), embed="caption", **place, **settings))
    return tuple(result[name] for name in ("embedded", "kept", "removed", "failed", "captions"))


def everything(place: Path | str, postgres: str | None = None) -> list[dict[str, Any]]:
    """All rows of an index with all columns, in the order of the captions; PostgreSQL stores no zeros in texts."""
    opened = SearchIndex.open(place, postgres)
    found = stored_rows(opened, "_id", "vector")
    found = [row | {"caption": row["caption"].replace("\0", "\N{REPLACEMENT CHARACTER}")} for row in found]
    return sorted(found, key=lambda row: (row["row"], row["caption_column"], row["caption_number"]))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four pictures, of which one has three captions, in two columns."""
    keys = [f"row-{number}" for number in range(4)]
    return save_table(tmp_path / "data.parquet", [0, 1, 2, 3], caption=SHORT, long=LONG, key=keys, id=[5, 6, 7, 8])


BOTH = {"caption_columns": ["caption", "long"]}


@pytest.fixture
def indexed(data: Path, model: Model, tmp_path: Path) -> Path:
    assert index(data, model[0], tmp_path / "index", **BOTH) == (7, 0, 0, 0, 7)
    return tmp_path / "index"


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


def test_each_caption_is_a_row_with_the_embedding_of_a_text_query(indexed: Path, model: Model) -> None:
    found = rows(indexed)
    place = ("key", "row", "caption_column", "caption_number")
    assert [tuple(row[name] for name in place) for row in found] == [
        ("row-0", 0, "caption", 0), ("row-0", 0, "long", 0), ("row-0", 0, "long", 1), ("row-1", 1, "caption", 0),
        ("row-2", 2, "caption", 0), ("row-2", 2, "long", 1), ("row-3", 3, "caption", 0),
    ]  # fmt: skip
    assert [row["caption"] for row in found] == ALL
    actual = torch.tensor([row["vector"] for row in found])
    torch.testing.assert_close(actual, model[1].encode_text(ALL, tiny.processor()), atol=1e-3, rtol=0)
    assert (actual[3] == actual[5]).all()
    manifest = json.loads((indexed / "manifest.json").read_text())
    assert (manifest["embed"], manifest["images"]) == ("caption", 7)
    assert manifest["source"]["caption_columns"] == ["caption", "long"]


def test_texts_and_images_find_captions_by_the_models_cosine(
    indexed: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(9).save(tmp_path / "query.png")
    found = as_json(capsys, indexed, "a blue bus", "--image", tmp_path / "query.png", "--top", 7)
    captions = model[1].encode_text(ALL, tiny.processor())
    queries = [model[1].encode_text("a blue bus", tiny.processor())[0]]
    queries.append(model[1].encode_image(picture(9), tiny.processor())[0])
    for query, embed in zip(found, queries, strict=True):
        expected = (captions @ embed).sort(descending=True)
        np.testing.assert_allclose([one["score"] for one in query["results"]], expected.values, atol=2e-3)
        for rank, one in enumerate(query["results"]):
            assert abs(float(captions[ALL.index(one["caption"])] @ embed) - float(expected.values[rank])) < 2e-3
    first = next(one for one in found[0]["results"] if one["caption"] == "football in a park")
    assert {name: first[name] for name in ("key", "row", "caption_column", "caption_number")} == {
        "key": "row-0", "row": 0, "caption_column": "long", "caption_number": 1,
    }  # fmt: skip
    (found,) = as_json(capsys, indexed, "a bus", "--where", "caption_column = 'long' AND caption_number > 0")
    assert sorted(one["key"] for one in found["results"]) == ["row-0", "row-2"]


def test_an_image_finds_captions_without_the_llm(
    indexed: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the LLM was built")

    half = tmp_path / "half"
    LLM2CLIPVisionModelWithProjection.from_pretrained(model[0]).save_pretrained(half)
    tiny.processor().image_processor.save_pretrained(half)
    monkeypatch.setattr(LLM2CLIPTextModel, "__init__", refuse)
    picture(9).save(tmp_path / "query.png")
    query = "--image", tmp_path / "query.png"
    (found,), (others,) = as_json(capsys, indexed, *query), as_json(capsys, indexed, *query, "--model", half)
    for one, other in zip(found["results"], others["results"], strict=True):
        assert one.pop("score") == pytest.approx(other.pop("score"), abs=1e-6)
        assert one == other


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


@pytest.mark.parametrize("in_database", [False, True])
def test_a_killed_run_is_resumed_with_an_equal_result(
    in_database: bool, data: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    captions = [f"a picture of number {number}" for number in range(12)]
    save_table(data, list(range(12)), caption=captions)
    url = request.getfixturevalue("url") if in_database else None
    settings: dict[str, Any] = {"part_size": 4, "batch_size": 4, "postgres": url}
    places = ("whole", "captions") if in_database else (tmp_path / "whole", tmp_path / "index")

    def build(place: Any) -> tuple[int, ...]:
        where = {"table": place} if in_database else {"output_dir": str(place)}
        return index(data, model[0], **where, **settings)

    build(places[0])
    embed, calls = OurEncoder.encode_text, []

    def killed(self: OurEncoder, texts: list[str], *arguments: Any, **options: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(texts)
        return embed(self, texts, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(OurEncoder, "encode_text", killed)
        with pytest.raises(KeyboardInterrupt):
            build(places[1])
    with pytest.raises(FileNotFoundError, match="it is not finished; run the same llm2clip index again"):
        SearchIndex.open(places[1], url)
    with monkeypatch.context() as patch:
        patch.setattr(OurEncoder, "encode_text", lambda *a, **o: calls.append(a[1]) or embed(*a, **o))
        assert build(places[1]) == (12, 0, 0, 0, 12)
    assert [text for texts in calls for text in texts] == captions
    assert everything(places[0], url) == everything(places[1], url)
    whole, resumed = (SearchIndex.open(place, url) for place in places)
    assert whole.manifest.content() == resumed.manifest.content()


def test_postgres_and_lancedb_have_the_same_captions(
    data: Path, model: Model, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def both(**settings: Any) -> tuple[int, ...]:
        counts = index(data, model[0], postgres=url, **BOTH, **settings)
        assert index(data, model[0], tmp_path / "index", **BOTH, **settings) == counts
        assert everything("data_parquet_captions", url) == everything(tmp_path / "index")
        assert failures("data_parquet_captions", url) == failures(tmp_path / "index")
        return counts

    assert both() == (7, 0, 0, 0, 7)
    query = "a bus", "--top", 5, "--where", "caption_column = 'caption'"
    there = as_json(capsys, tmp_path / "index", *query)
    here = as_json(capsys, "data_parquet_captions", *query, "--postgres", url)
    results = [[(one["caption"], one["score"]) for one in found[0]["results"]] for found in (there, here)]
    np.testing.assert_allclose(*[[score for _, score in one] for one in results], atol=1e-3)
    assert [caption for caption, _ in results[0]] == [caption for caption, _ in results[1]]
    captions = ["a\0b", "a red bus", None, "a cat"]
    save_table(data, [0, 1, 2, 3], caption=captions, long=[None] * 3 + [["new"]], key=list("abcd"))
    assert both(allow_removals=True) == (3, 1, 4, 1, 4)
    assert both() == (0, 4, 0, 1, 4)
    message = error(capsys, "index", data, "--model", model[0], "--postgres", url, "--table", "data_parquet_captions")
    assert "was built with embed caption, not image; choose another --output-dir or --table" in message


def test_an_index_of_captions_is_not_updated_as_another_one(
    indexed: Path, data: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(indexed)
    command = [data, "--model", model[0], "--output-dir"]
    assert "was built with embed caption, not image" in error(capsys, "index", *command, indexed)
    run(IndexConfig(folder=str(data), model=str(model[0]), output_dir=str(tmp_path / "images"), num_workers=0))
    captions = ["--embed", "caption"]
    message = error(capsys, "index", *command, tmp_path / "images", *captions)
    assert "was built with embed image, not caption; choose another" in message
    message = error(capsys, "index", *command, indexed, *captions)
    assert re.search(
        r"was built with source kind dataset, .* caption_columns caption, long, not kind dataset", message
    )
    assert content(indexed) == before


def test_another_text_side_is_refused_for_updates_and_texts_but_finds_captions_by_image(
    indexed: Path, data: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = LLM2CLIPModel.from_pretrained(model[0])
    with torch.no_grad():
        other.text_adapter.proj.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    tiny.processor().save_pretrained(tmp_path / "other")
    reason = "other weights, another LLM, tokenizer or adapter"
    assert reason in error(capsys, "search", indexed, "a bus", "--model", tmp_path / "other")
    command = [data, "--model", tmp_path / "other", "--output-dir", indexed, "--embed", "caption"]
    assert reason in error(capsys, "index", *command, "--caption-columns", "caption", "long")
    picture(9).save(tmp_path / "query.png")
    assert as_json(capsys, indexed, "--image", tmp_path / "query.png", "--model", tmp_path / "other")


def test_rows_without_a_caption_are_listed(model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [{"key": "good", "texts": ["a dog"], "id": 1}, {"key": "none", "texts": [" "], "id": 2}]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert index(path, model[0], tmp_path / "index", caption_columns=["texts"]) == (1, 0, 0, 1, 1)
    assert json.loads((tmp_path / "index" / "failures.json").read_text()) == [
        {"key": "none", "reason": "it has no text in texts"}
    ]
    assert "none: it has no text in texts" in caplog.text
    assert index(path, model[0], tmp_path / "index", caption_columns=["texts"]) == (0, 1, 0, 1, 1)
    with pytest.raises(ValueError, match="none of the 2 files or rows"):
        index(path, model[0], tmp_path / "numbers", caption_columns=["id"])
    assert not (tmp_path / "numbers").exists()
    with pytest.raises(ValueError, match=r"has no column 'caption'; it has key, texts, id"):
        index(path, model[0], tmp_path / "other")


def test_captions_without_images_are_found_and_shown_without(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, page = tmp_path / "data.jsonl", tmp_path / "page.html"
    path.write_text("\n".join(json.dumps({"text": f"<b>{text}</b>"}) for text in SHORT))
    index(path, model[0], tmp_path / "index")
    assert cli.main(["search", str(tmp_path / "index"), "a bus", "--html", str(page)]) == 0
    assert page.read_text().count("&lt;b&gt;a red bus&lt;/b&gt;</div>") == 2
    assert "<img" not in page.read_text()
    assert "class='frame'" not in page.read_text()
    shown = capsys.readouterr().out
    assert re.fullmatch(r"(<b>a .*</b>\t-?\d\.\d{4}\t\d\n)+", shown), "a pipe"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.stdout, "isatty", lambda: True)
        patch.setenv("TERM", "dumb")
        assert cli.main(["search", str(tmp_path / "index"), "a bus"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"rank ┃ score ┃ caption +┃ row ", shown)
    assert re.search(r"│ +1 │ +-?\d\.\d{3} │ <b>a .*</b> +│ \d", shown)


def test_captions_are_shown_with_their_images(indexed: Path, data: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    command = ["search", str(indexed), "a bus", "--html", str(page), "--top", "7"]
    assert cli.main(command) == 0
    assert page.read_text().count("<img") == 7
    assert page.read_text().count("<div class='caption'>a red bus</div>") == 3
    # What has been replaced since is not shown.
    save_table(data, [0, 1, 2, 3], caption=["a small dog", "other", "other", "a red bus"], long=[None, None, None, []])
    assert cli.main(command) == 0
    assert page.read_text().count("<img") == 2
    assert page.read_text().count("no longer available") == 5


def test_captions_of_image_folders_and_of_records_in_shards_are_indexed(model: Model, tmp_path: Path) -> None:
    folder, shard = tmp_path / "folder", tmp_path / "shard.tar"
    folder.mkdir()
    picture(1).save(folder / "1.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "caption": "a red bus"}))
    assert index(folder, model[0], tmp_path / "of_folder") == (1, 0, 0, 0, 1)
    with tarfile.open(shard, "w") as tar:
        for suffix, data in (
            ("png", encoded(picture(2))),
            ("json", json.dumps({"texts": ["a dog", "a cat"]}).encode()),
        ):
            (tmp_path / "member").write_bytes(data)
            tar.add(tmp_path / "member", f"one.{suffix}")
    assert index(shard, model[0], tmp_path / "of_shard", caption_columns=["json.texts"]) == (2, 0, 0, 0, 2)
    found = rows(tmp_path / "of_shard")
    assert [(row["key"], row["caption_column"], row["caption"]) for row in found] == [
        ("one", "json.texts", "a dog"), ("one", "json.texts", "a cat"),
    ]  # fmt: skip


def test_a_model_with_broken_embeddings_ends_with_one_error(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = save_broken(tmp_path / "broken", "text_adapter.proj")
    command = [data, "--model", broken, "--output-dir", tmp_path / "index", "--embed", "caption"]
    message = error(capsys, "index", *command)
    assert "3 of 3 texts are NaN or infinite: a small dog, a red bus, a steam train. A model gives such" in message
    assert not (tmp_path / "index").exists()


def test_long_captions_are_cut_and_counted_once(
    model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2clip.search.index_update.PARTS_AT_ONCE", 1)
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in ("a dog", "a dog and a cat " * 40, "a cat")))
    index(path, model[0], tmp_path / "index", part_size=1, batch_size=1)
    assert [record.getMessage() for record in caplog.records if "were cut" in record.getMessage()] == [
        "1 of 3 distinct captions were cut to the length that the model reads."
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"caption_columns": ["long"]}, "caption_columns is long, but images are embedded: add --embed caption"),
        ({"embed": "caption", "kind": "folder"}, "kind is folder, but captions are those of a data set"),
        ({"embed": "caption", "image_backend": "fast"}, "image_backend is fast, but captions are embedded"),
        ({"embed": "caption", "caption_column": "a", "caption_columns": ["b"]}, "are both given"),
        ({"embed": "text"}, "embed is 'text', but it has to be one of image, caption"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        IndexConfig(folder="data", model="model", **settings)


def test_a_text_model_of_sentence_transformers_embeds_captions_and_finds_them_by_text(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = embedding_models.save(tmp_path / "model", next(iter(embedding_models.FAMILIES)))
    assert index(data, tmp_path / "model", tmp_path / "index") == (4, 0, 0, 0, 4)
    (found,) = as_json(capsys, tmp_path / "index", "a blue bus", "--top", 4)
    expected = model.similarity(model.encode("a blue bus"), model.encode(sorted(set(SHORT))))[0].tolist()
    scores = {one["caption"]: one["score"] for one in found["results"]}
    assert [scores[text] for text in sorted(scores)] == pytest.approx(expected, abs=2e-3)
    picture(9).save(tmp_path / "query.png")
    message = error(capsys, "search", tmp_path / "index", "--image", tmp_path / "query.png")
    assert "embedding model of sentence-transformers" in message


def test_the_vision_half_of_a_model_is_refused(
    data: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half"
    LLM2CLIPVisionModelWithProjection.from_pretrained(model[0]).save_pretrained(half)
    tiny.processor().image_processor.save_pretrained(half)
    message = error(capsys, "index", data, "--model", half, "--embed", "caption", "--output-dir", tmp_path / "index")
    assert "is the vision half of a model, which does not embed texts" in message

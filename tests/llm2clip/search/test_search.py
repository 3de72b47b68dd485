"""Searching: the order of results, every form of output, and errors."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import sys
from datetime import date, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip import cli
from llm2clip.command_line.logs import CONTROL_CHARACTERS
from llm2clip.data import decode_image
from llm2clip.encoders import load_encoder
from llm2clip.models.embeddings import NonFiniteError
from llm2clip.search.search_index import SearchIndex
from tests.builders import tiny
from tests.builders.students import add_query_encoder

from .helpers import Model, as_json, error, index, picture, refuse_llm, save_broken, save_table, save_vision_half

TEXT = "two children play football"


def test_text_queries_rank_images_by_the_models_cosine(
    indexed: Path, pictures: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(capsys, indexed, TEXT, "a red bus", "--top", 4)
    files = sorted(pictures.rglob("*.png"))
    images = model[1].encode_image([str(file) for file in files], tiny.processor())
    for query, text in zip(found, (TEXT, "a red bus"), strict=True):
        scores = images @ model[1].encode_text([text], tiny.processor())[0]
        expected = scores.topk(4)
        assert query["text"] == text
        assert [result["path"] for result in query["results"]] == [str(files[i]) for i in expected.indices]
        np.testing.assert_allclose([result["score"] for result in query["results"]], expected.values, atol=2e-3)
        assert [result["rank"] for result in query["results"]] == [1, 2, 3, 4]


def test_an_image_query_finds_its_image_without_loading_the_llm(
    indexed: Path, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, image_open = [], Image.open
    refuse_llm(monkeypatch)
    monkeypatch.setattr(
        Image, "open", lambda file, *more, **options: (opened.append(file), image_open(file, *more, **options))[1]
    )
    (found,) = as_json(capsys, indexed, "--image", pictures / "a" / "07.png")
    assert found["results"][0]["key"] == "a/07.png"
    assert found["results"][0]["score"] == pytest.approx(1, abs=2e-3)
    assert len(found["results"]) == 10
    assert len(opened) == 1, "an image query is decoded once"


def test_a_fast_search_asks_the_query_encoder_and_loads_no_llm(
    pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, folder = tmp_path / "model", tmp_path / "index"
    shutil.copytree(model[0], own)
    assert cli.main(["index", str(pictures), "--model", str(own), "--output-dir", str(folder)]) == 0
    assert "has no query_encoder/; `llm2clip distill-text" in error(capsys, "search", folder, TEXT, "--fast")
    (row,) = add_query_encoder(own).encode([TEXT]).numpy()
    embeds = load_encoder(str(own)).encode_image([decode_image(path, path) for path in sorted(pictures.rglob("*.*"))])
    refuse_llm(monkeypatch)
    (found,) = as_json(capsys, folder, TEXT, "--fast", "--top", "3")
    expected = np.sort(embeds.numpy() @ row)[::-1][:3]
    np.testing.assert_allclose([result["score"] for result in found["results"]], expected, atol=2e-3)
    assert "--image alone needs no LLM" in error(
        capsys, "search", folder, "--image", next(pictures.rglob("*.*")), "--fast"
    )


def test_a_pipe_gets_a_line_for_each_result(
    indexed: Path, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    expected = as_json(capsys, indexed, TEXT, "a\tbus\n", "--top", 3)
    assert cli.main(["search", str(indexed), TEXT, "--top", "3"]) == 0
    lines = [f"{found['path']}\t{found['score']:.4f}" for found in expected[0]["results"]]
    assert capsys.readouterr().out.splitlines() == lines
    assert cli.main(["search", str(indexed), TEXT, "a\tbus\n", "--top", "3"]) == 0
    found = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in found] == [TEXT] * 3 + [r"a\tbus\n"] * 3
    assert [line[1] for line in found] == [entry["path"] for query in expected for entry in query["results"]]
    monkeypatch.chdir(pictures)
    assert cli.main(["search", str(indexed), "--image", "a/07.png", "--top", "1"]) == 0
    assert capsys.readouterr().out.startswith("a/07.png\t1.0000\n")
    assert cli.main(["search", str(indexed), TEXT, "--where", "size < 0"]) == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "no row of the index fulfils --where size < 0\n")


def test_a_terminal_gets_a_table_under_the_query_as_it_was_given(
    indexed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    for query in ("a sign that says [/stop]", "[a dog] on grass", "{", "photo of a [bold] cat", ":dog:"):
        assert [found["text"] for found in as_json(capsys, indexed, query)] == [query]
        assert cli.main(["search", str(indexed), query, "--top", "2"]) == 0
        shown = capsys.readouterr().out
        assert shown.splitlines()[0].strip() == query
        assert len(re.findall(r"│ +[12] │ +-?0\.\d{3} │ .*", shown)) == 2


def test_where_and_top_restrict_the_results(indexed: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranked = [result["key"] for result in as_json(capsys, indexed, TEXT, "--top", 10**30)[0]["results"]]
    assert len(ranked) == 12
    (found,) = as_json(capsys, indexed, TEXT, "--where", "folder = 'a' AND size > 0")
    assert [result["key"] for result in found["results"]] == [key for key in ranked if key.startswith("a/")]
    both = as_json(
        capsys, indexed, TEXT, "--image", pictures / "a" / "07.png", "--where", "folder = 'b/c'", "--top", 2
    )
    assert [query.get("text") or query["image"] for query in both] == [TEXT, str(pictures / "a" / "07.png")]
    assert {str(Path(result["key"]).parent) for query in both for result in query["results"]} == {"b/c"}


def test_a_reader_that_has_read_enough_is_no_error(
    indexed: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        assert cli.main(["search", str(indexed), "dog", "--top", "12"]) == 0
    assert "Broken pipe" not in capfd.readouterr().err


def test_escape_sequences_do_not_reach_the_terminal(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "\x1b[2J\x1b]0;title\x07 red \x9b31m \u202ereversed"
    save_table(tmp_path / "data.parquet", [0], caption=[hostile])
    folder = tmp_path / "index"
    index(tmp_path / "data.parquet", model[0], folder)
    (found,) = as_json(capsys, folder, hostile)
    assert (found["text"], found["results"][0]["caption"]) == (hostile, hostile)
    for is_terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        monkeypatch.setenv("TERM", "dumb")
        for options in ([f"query {hostile}", "b"], [hostile, "--json"]):
            assert cli.main(["search", str(folder), *options]) == 0
            shown = capsys.readouterr()
            assert not CONTROL_CHARACTERS.search(shown.out + shown.err)
            assert "\\u001b" in shown.out


def test_the_page_embeds_thumbnails_escapes_texts_and_marks_what_is_gone(model: Model, tmp_path: Path) -> None:
    data = save_table(tmp_path / "data.parquet", [0, 1, 2, 3], caption=["<b>bold</b> & more"] * 4)
    index(data, model[0], tmp_path / "index")
    command = ["search", str(tmp_path / "index"), "<i>text</i>", "--html", str(tmp_path / "page.html")]
    assert cli.main(command) == 0
    page = (tmp_path / "page.html").read_text()
    assert "&lt;i&gt;text&lt;/i&gt;" in page
    assert page.count("&lt;b&gt;bold&lt;/b&gt; &amp; more</div>") == 4
    assert "<i>" not in page
    assert "<b>" not in page
    sources = re.findall(r"(?:src|href)='([^']*)'", page)
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    images = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]
    assert [image.size for image in images] == [(32, 32)] * 4
    # One row is replaced, one is gone.
    save_table(data, [0, 5, 2], caption=["<b>bold</b> & more"] * 3)
    assert cli.main(command) == 0
    page = (tmp_path / "page.html").read_text()
    assert (page.count("no longer available"), page.count("<img")) == (2, 2)


def test_thumbnails_of_files_link_to_them(pictures: Path, model: Model, tmp_path: Path) -> None:
    (pictures / "00.png").rename(pictures / "it's 0%.png")
    index(pictures, model[0], tmp_path / "index")
    page = tmp_path / "page.html"
    assert cli.main(["search", str(tmp_path / "index"), TEXT, "--top", "20", "--html", str(page)]) == 0
    links = re.findall(r"<a href='([^']*)'><img ", page.read_text())
    assert {Path(url2pathname(urlsplit(link).path)) for link in links} == set(pictures.rglob("*.png"))


def test_metadata_columns_are_shown_with_each_result(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    days, license_of = [date(2026, 1, 2), None, date(2025, 1, 1)], ["CC0", "<MIT>", None]
    times = [datetime(2026, 1, 2, 3, 4, 5)] * 3
    columns: dict[str, list[Any]] = {"size": [1, 2, 3], "license": license_of, "day": days, "time": times}
    data = save_table(tmp_path / "data.parquet", [0, 1, 2], caption=["one", "two", "three"], **columns)
    shown = {
        "0": {"day": "2026-01-02", "license": "CC0", "size": 1, "time": "2026-01-02T03:04:05"},
        "1": {"day": None, "license": "<MIT>", "size": 2, "time": "2026-01-02T03:04:05"},
        "2": {"day": "2025-01-01", "license": None, "size": 3, "time": "2026-01-02T03:04:05"},
    }
    for embed in ("image", "caption"):
        folder = tmp_path / embed
        index(data, model[0], folder, embed=embed, metadata_columns=["day", "license", "size", "time"])
        found = SearchIndex.open(folder).search(TEXT, where="day = '2026-01-02' OR size > 1")
        assert {one.key: one.metadata for one in found} == shown
        (query,) = as_json(capsys, folder, TEXT, "--html", tmp_path / "page.html")
        assert {one["key"]: one["metadata"] for one in query["results"]} == shown
        page = (tmp_path / "page.html").read_text()
        assert page.count("day: 2026-01-02; license: CC0; size: 1; time: 2026-01-02T03:04:05</div>") == 1
        assert page.count("license: &lt;MIT&gt;; size: 2") == 1
        assert cli.main(["search", str(folder), TEXT]) == 0
        lines = [line.split("\t")[3:] for line in capsys.readouterr().out.splitlines()]
        assert sorted(lines)[1] == ["2025-01-01", "", "3", "2026-01-02T03:04:05"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["search", str(folder), TEXT]) == 0
    assert re.search(r"rank .* score .* caption .* row .* day .* license .* size .* time ", capsys.readouterr().out)


def test_another_model_is_refused_with_both_names_and_a_copy_is_not(
    indexed: Path, pictures: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    tiny.save(tmp_path / "other")
    for query in ([TEXT], ["--image", pictures / "00.png"]):
        message = error(capsys, "search", indexed, *query, "--model", tmp_path / "other")
        assert f"made by {model[0]} (width 24" in message
        assert f"the model is {tmp_path / 'other'} (width 24" in message
    shutil.copytree(model[0], tmp_path / "copy")
    assert as_json(capsys, indexed, TEXT, "--model", tmp_path / "copy")


def test_unusable_queries_are_named_and_images_need_half_a_model(
    indexed: Path, pictures: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "a query is empty" in error(capsys, "search", indexed, " ")
    (pictures / "bad.png").write_bytes(b"words")
    assert "does not recognize its format" in error(capsys, "search", indexed, "--image", pictures / "bad.png")
    Image.new("1", (1, 70_000)).save(tmp_path / "strip.png")
    assert "strip.png" in error(capsys, "search", indexed, "--image", tmp_path / "strip.png")
    half = save_vision_half(model[0], tmp_path / "half")
    assert "need the whole model" in error(capsys, "search", indexed, TEXT, "--model", half)
    assert as_json(capsys, indexed, "--image", pictures / "00.png", "--model", half)


@pytest.mark.parametrize(("part", "query"), [("visual_projection", "--image"), ("text_adapter.proj", TEXT)])
def test_a_query_with_a_broken_embedding_ends_the_search(
    part: str, query: str, indexed: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("llm2clip.search.search_index.IndexManifest.require_model", lambda *_: None)
    queries = [query, pictures / "00.png"] if query == "--image" else [query]
    broken = save_broken(tmp_path / "broken", part)
    assert f"NaN or infinite: {queries[-1]}. " in error(capsys, "search", indexed, *queries, "--model", broken)
    if query == "--image":
        with pytest.raises(NonFiniteError, match=r"NaN or infinite: query\. "):
            SearchIndex.open(indexed, encoder=str(broken)).search(picture(1))

"""Searching: the order of results, every form of output, and errors."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip import cli
from llm2clip.data import decode_image
from llm2clip.search.image_index import ImageIndex
from llm2clip.search.index import IndexConfig
from llm2clip.search.index import run as index
from llm2clip.utils.logs import OBEYED
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModelWithProjection
from tests.modeling_llm2clip import tiny

from .conftest import encoded, picture, save_broken

Model = tuple[Path, LLM2CLIPModel]
TEXT = "two children play football"


@pytest.fixture
def indexed(pictures: Path, model: Model, tmp_path: Path) -> Path:
    folder = tmp_path / "index"
    index(IndexConfig(folder=str(pictures), model=str(model[0]), output_dir=str(folder), num_workers=0))
    return folder


def as_json(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[dict[str, Any]]:
    """Return the queries in the output of `llm2clip search --json`."""
    capsys.readouterr()
    assert cli.main(["search", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["queries"]


def error(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """Return the error message of a search."""
    capsys.readouterr()
    assert cli.main(["search", *map(str, arguments)]) == 2
    return capsys.readouterr().err


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
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the LLM was built")

    opened, image_open = [], Image.open
    monkeypatch.setattr(LLM2CLIPTextModel, "__init__", refuse)
    monkeypatch.setattr(
        Image, "open", lambda file, *more, **options: (opened.append(file), image_open(file, *more, **options))[1]
    )
    (found,) = as_json(capsys, indexed, "--image", pictures / "a" / "07.png")
    assert found["results"][0]["key"] == "a/07.png"
    assert found["results"][0]["score"] == pytest.approx(1, abs=2e-3)
    assert len(found["results"]) == 10
    assert len(opened) == 1, "an image query is decoded once"


def test_texts_and_an_image_can_be_searched_together(
    indexed: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(capsys, indexed, "--image", pictures / "00.png", TEXT, "--top", 1)
    assert [query.get("text") or query["image"] for query in found] == [TEXT, str(pictures / "00.png")]
    assert found[1]["results"][0]["key"] == "00.png"


def test_the_table_shows_rank_score_and_path(indexed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", str(indexed), TEXT, "--top", "2"]) == 0
    shown = capsys.readouterr().out
    assert TEXT in shown
    assert len(re.findall(r"│ +[12] │ +-?0\.\d{3} │ .*", shown)) == 2


def test_markup_in_queries_is_printed_literally(indexed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    queries = ["a sign that says [/stop]", "[a dog] on grass", "{", "photo of a [bold] cat", ":dog:"]
    assert [found["text"] for found in as_json(capsys, indexed, *queries)] == queries
    for query in (*queries, "[cat]"):
        assert [found["text"] for found in as_json(capsys, indexed, query)] == [query]
        assert cli.main(["search", str(indexed), query]) == 0
        assert capsys.readouterr().out.splitlines()[0].strip() == query


def test_escape_sequences_do_not_reach_the_terminal(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "\x1b[2J\x1b]0;title\x07 red \x9b31m \u202ereversed"
    data = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(picture(0)), "path": None}], "caption": [hostile]},
        features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}),
    )
    data.to_parquet(tmp_path / "data.parquet")
    folder = str(tmp_path / "index")
    settings = {"model": str(model[0]), "output_dir": folder, "num_workers": 0}
    index(IndexConfig(folder=str(tmp_path / "data.parquet"), **settings))
    capsys.readouterr()
    assert cli.main(["search", folder, f"query {hostile}"]) == 0
    shown = capsys.readouterr()
    assert not OBEYED.search(shown.out + shown.err)
    assert shown.out.count("\\u001b") == 4
    (found,) = as_json(capsys, folder, hostile)
    assert (found["text"], found["results"][0]["caption"]) == (hostile, hostile)
    assert cli.main(["search", folder, hostile, "--json"]) == 0
    assert not OBEYED.search(capsys.readouterr().out)


def test_the_page_embeds_thumbnails_and_escapes_texts(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"image": [{"bytes": encoded(picture(seed)), "path": None} for seed in range(3)]}
    rows["caption"] = ["<b>bold</b> & more"] * 3
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    data = tmp_path / "data.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(data)
    index(IndexConfig(folder=str(data), model=str(model[0]), output_dir=str(tmp_path / "index"), num_workers=0))
    assert cli.main(["search", str(tmp_path / "index"), "<i>text</i>", "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "&lt;i&gt;text&lt;/i&gt;" in page
    assert page.count("&lt;b&gt;bold&lt;/b&gt; &amp; more</div>") == 3
    assert "<i>" not in page
    assert "<b>" not in page
    sources = re.findall(r"(?:src|href)='([^']*)'", page)
    images = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]
    assert all(source.startswith("data:image/webp;base64,") for source in sources)
    assert [image.size for image in images] == [(32, 32)] * 3
    (found,) = as_json(capsys, tmp_path / "index", TEXT)
    assert found["results"][0]["caption"] == "<b>bold</b> & more"
    assert {result["row"] for result in found["results"]} == {0, 1, 2}


def test_the_page_marks_removed_images(indexed: Path, pictures: Path, tmp_path: Path) -> None:
    (pictures / "00.png").unlink()
    assert cli.main(["search", str(indexed), TEXT, "--top", "12", "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("no longer available") == 1
    assert page.count("<img") == 11


def test_the_page_does_not_show_a_replaced_row(model: Model, tmp_path: Path) -> None:
    def save(seeds: list[int]) -> None:
        rows = {"image": [{"bytes": encoded(picture(seed)), "path": None} for seed in seeds]}
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data.parquet")

    save([0, 1, 2, 3])
    settings = {"folder": str(tmp_path / "data.parquet"), "model": str(model[0]), "num_workers": 0}
    index(IndexConfig(output_dir=str(tmp_path / "index"), **settings))
    save([0, 5, 2])
    assert cli.main(["search", str(tmp_path / "index"), TEXT, "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("no longer available") == 2
    assert page.count("<img") == 2


def test_thumbnails_use_the_max_pixels_of_the_index(
    pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def decode(value: Any, key: str, max_pixels: int) -> Image.Image:
        decoded.append(max_pixels)
        return decode_image(value, key, max_pixels)

    output = str(tmp_path / "index")
    index(IndexConfig(folder=str(pictures), model=str(model[0]), output_dir=output, num_workers=0, max_pixels=10**9))
    monkeypatch.setattr("llm2clip.search.results.decode_image", decode)
    assert cli.main(["search", output, TEXT, "--html", str(tmp_path / "page.html")]) == 0
    assert decoded == [10**9] * 10


def test_the_picture_has_a_row_per_query(indexed: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.png"
    heights = []
    for queries in ([TEXT], [TEXT, "costs $5 or $6"]):
        assert cli.main(["search", str(indexed), *queries, "--top", "4", "--picture", str(path)]) == 0
        with Image.open(path) as drawn:
            assert (drawn.format, drawn.width) == ("PNG", 1000)
            heights.append(drawn.height)
    assert heights[1] > 1.6 * heights[0]


def test_another_model_is_refused_with_both_names(
    indexed: Path, pictures: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    tiny.save(tmp_path / "other")
    tiny.save(tmp_path / "wide", projection_dim=40)
    for name in ("other", "wide"):
        for query in ([TEXT], ["--image", pictures / "00.png"]):
            message = error(capsys, indexed, *query, "--model", tmp_path / name)
            assert f"made by {model[0]} (width 24" in message
            assert f"the model is {tmp_path / name} (width {40 if name == 'wide' else 24}" in message


def test_a_copy_of_the_model_is_accepted(
    indexed: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model[0], tmp_path / "copy")
    assert as_json(capsys, indexed, TEXT, "--model", tmp_path / "copy")


def test_missing_or_invalid_inputs_are_named_in_the_error(
    indexed: Path, pictures: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there is no index in /no/such (no manifest.json)" in error(capsys, "/no/such", TEXT)
    assert "there is no image file /no/such.png" in error(capsys, indexed, "--image", "/no/such.png")
    assert "the query is missing" in error(capsys, indexed)
    assert "a query is empty" in error(capsys, indexed, " ")
    assert "top must be at least 1" in error(capsys, indexed, TEXT, "--top", 0)
    (pictures / "bad.png").write_bytes(b"words")
    assert "does not recognize its format" in error(capsys, indexed, "--image", pictures / "bad.png")
    half = tmp_path / "half"
    LLM2CLIPVisionModelWithProjection.from_pretrained(model[0]).save_pretrained(half)
    tiny.processor().image_processor.save_pretrained(half)
    assert "A text query needs the whole model" in error(capsys, indexed, TEXT, "--model", half)
    assert as_json(capsys, indexed, "--image", pictures / "00.png", "--model", half)
    manifest = json.loads((indexed / "manifest.json").read_text())
    (indexed / "manifest.json").write_text(json.dumps({**manifest, "model": "/moved/away"}))
    assert "the model in /moved/away, which no longer exists" in error(capsys, indexed, TEXT)


@pytest.mark.parametrize("damage", ["images.lance/data/*.lance", "images.lance/_versions/*", "manifest.json"])
@pytest.mark.parametrize("deleted", [False, True])
def test_a_damaged_index_is_an_error(
    damage: str, deleted: bool, indexed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in list(indexed.glob(damage)):
        path.unlink() if deleted else path.write_bytes(path.read_bytes()[:40])
    message = error(capsys, indexed, TEXT)
    assert "build it again: add --overwrite" in message or "run the same llm2clip index again" in message


def test_where_restricts_the_results(indexed: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = as_json(capsys, indexed, TEXT, "--top", 12)[0]["results"]
    (found,) = as_json(capsys, indexed, TEXT, "--where", "folder = 'a' AND size > 0")
    expected = [result["key"] for result in everything if result["key"].startswith("a/")]
    assert [result["key"] for result in found["results"]] == expected
    assert len(expected) == 4
    (found,) = as_json(capsys, indexed, "--image", pictures / "a" / "07.png", "--where", "folder = 'b/c'", "--top", 2)
    assert {str(Path(result["key"]).parent) for result in found["results"]} == {"b/c"}
    assert as_json(capsys, indexed, TEXT, "--where", "extension = 'jpg'")[0]["results"] == []
    assert len(as_json(capsys, indexed, TEXT, "--where", "folder = 'a'", "--top", 10**30)[0]["results"]) == 4
    # Conditions, names and strings may hold anything; what LanceDB would leave out without a word may not follow.
    ignored = [f"folder = 'a'{rest}" for rest in ("; DROP TABLE images", " LIMIT 1", " ORDER BY size", " garbage")]
    for where in ("source = 'noto'", "folder = = 'a'", "folder", *ignored, "1 / 0 = 1", "cast(folder AS int) = 1"):
        message = error(capsys, indexed, TEXT, "--where", where)
        assert f"where is {where!r}, which is no condition on the columns key, folder, extension, size" in message
        assert ".rs:" not in message
    assert as_json(capsys, indexed, TEXT, "--where", "key = '; LIMIT 1 -- \x00)' OR (false)")[0]["results"] == []
    assert "where is empty" in error(capsys, indexed, TEXT, "--where", "")


def test_any_number_of_results_can_be_asked_for(indexed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(as_json(capsys, indexed, TEXT, "--top", 10**30)[0]["results"]) == 12
    opened = ImageIndex.open(indexed)
    for top in (0, -1):
        with pytest.raises(ValueError, match="top must be at least 1"):
            opened.search(np.ones((1, opened.manifest.width), np.float32), top)


@pytest.mark.parametrize(("part", "query"), [("visual_projection", "--image"), ("text_adapter.proj", "a dog")])
def test_a_query_with_a_broken_embedding_ends_the_search(
    part: str, query: str, indexed: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def nothing(*arguments: Any) -> None:
        pass

    broken = save_broken(tmp_path / "broken", part)
    monkeypatch.setattr("llm2clip.search.image_index.IndexManifest.require_model", nothing)
    queries = [query, pictures / "00.png"] if query == "--image" else [query]
    message = error(capsys, indexed, *queries, "--model", broken)
    assert f"NaN or infinite: {queries[-1]}. A model gives such values after a training that diverged" in message

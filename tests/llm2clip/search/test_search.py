"""Searching: the order of results, every form of output, and errors."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from llm2clip import cli
from llm2clip.data import decode_image
from llm2clip.encoders import load_encoder
from llm2clip.search.index import IndexConfig
from llm2clip.search.index import run as index
from llm2clip.search.search_index import SearchIndex
from llm2clip.utils.logs import OBEYED
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModelWithProjection
from tests.llm2clip.encoders import models
from tests.llm2clip.students import add_query_encoder
from tests.modeling_llm2clip import tiny

from .conftest import as_json, encoded, error, picture, save_broken

Model = tuple[Path, LLM2CLIPModel]
TEXT = "two children play football"


@pytest.fixture
def indexed(pictures: Path, model: Model, tmp_path: Path) -> Path:
    folder = tmp_path / "index"
    index(IndexConfig(folder=str(pictures), model=str(model[0]), output_dir=str(folder), num_workers=0))
    return folder


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let standard output be a terminal, one without colours."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")


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


def test_a_fast_search_asks_the_query_encoder_and_loads_no_llm(
    pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, folder = tmp_path / "model", tmp_path / "index"
    shutil.copytree(model[0], own)
    assert cli.main(["index", str(pictures), "--model", str(own), "--output-dir", str(folder)]) == 0
    assert "has no query_encoder/; `llm2clip distill-text" in error(capsys, "search", folder, TEXT, "--fast")
    (row,) = add_query_encoder(own).encode([TEXT]).numpy()
    embeds = load_encoder(str(own)).encode_image([decode_image(path, path) for path in sorted(pictures.rglob("*.*"))])

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the LLM was loaded")

    monkeypatch.setattr(LLM2CLIPTextModel, "from_pretrained", refuse)
    (found,) = as_json(capsys, folder, TEXT, "--fast", "--top", "3")
    expected = np.sort(embeds.numpy() @ row)[::-1][:3]
    np.testing.assert_allclose([result["score"] for result in found["results"]], expected, atol=2e-3)
    assert "--image alone needs no LLM" in error(
        capsys, "search", folder, "--image", next(pictures.rglob("*.*")), "--fast"
    )


def test_texts_and_an_image_can_be_searched_together(
    indexed: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(capsys, indexed, "--image", pictures / "00.png", TEXT, "--top", 1)
    assert [query.get("text") or query["image"] for query in found] == [TEXT, str(pictures / "00.png")]
    assert found[1]["results"][0]["key"] == "00.png"


def test_the_table_shows_rank_score_and_path(
    indexed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_terminal(monkeypatch)
    assert cli.main(["search", str(indexed), TEXT, "--top", "2"]) == 0
    shown = capsys.readouterr().out
    assert TEXT in shown
    assert len(re.findall(r"│ +[12] │ +-?0\.\d{3} │ .*", shown)) == 2


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


def test_a_reader_that_has_read_enough_is_no_error(indexed: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m llm2clip search {indexed} dog --top 12 2> {tmp_path / 'errors'} | true"
    command += "; echo ${PIPESTATUS[0]}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
    assert "Broken pipe" not in (tmp_path / "errors").read_text()


def test_markup_in_queries_is_printed_literally(
    indexed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_terminal(monkeypatch)
    queries = ["a sign that says [/stop]", "[a dog] on grass", "{", "photo of a [bold] cat", ":dog:"]
    assert [found["text"] for found in as_json(capsys, indexed, *queries)] == queries
    for query in (*queries, "[cat]"):
        assert [found["text"] for found in as_json(capsys, indexed, query)] == [query]
        assert cli.main(["search", str(indexed), query]) == 0
        assert capsys.readouterr().out.splitlines()[0].strip() == query


def test_escape_sequences_do_not_reach_the_terminal(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_terminal(monkeypatch)
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
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    assert cli.main(["search", folder, f"query {hostile}", "b"]) == 0
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


def test_another_model_is_refused_with_both_names(
    indexed: Path, pictures: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    tiny.save(tmp_path / "other")
    tiny.save(tmp_path / "wide", projection_dim=40)
    for name in ("other", "wide"):
        for query in ([TEXT], ["--image", pictures / "00.png"]):
            message = error(capsys, "search", indexed, *query, "--model", tmp_path / name)
            assert f"made by {model[0]} (width 24" in message
            assert f"the model is {tmp_path / name} (width {40 if name == 'wide' else 24}" in message


def save_of_another_library(library: str, folder: Path) -> str:
    """Save a tiny model of another library; return its name."""
    if library == "open_clip":
        name, weights = models.register_open_clip(folder)
        return f"open_clip:{name}/{weights}"
    models.save_transformers("clip", folder)
    return str(folder)


@pytest.mark.parametrize("library", ["transformers", "open_clip"])
def test_an_index_is_searched_with_the_model_of_any_library_that_made_it(
    library: str, pictures: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, folder = save_of_another_library(library, tmp_path / library), tmp_path / "index"
    encoder = load_encoder(name)
    SearchIndex.build(encoder, pictures, folder)
    texts, found = as_json(capsys, folder, TEXT, "--image", pictures / "00.png", "--top", 12)
    files = sorted(pictures.rglob("*.png"))
    cosines = encoder.encode_text(TEXT) @ encoder.encode_image([str(file) for file in files]).T
    scores = {str(file): score for file, score in zip(files, cosines[0].tolist(), strict=True)}
    assert {result["path"]: result["score"] for result in texts["results"]} == pytest.approx(scores, abs=2e-3)
    assert found["results"][0]["key"] == "00.png"
    assert f"made by {name} (width 24" in error(capsys, "search", folder, TEXT, "--model", model[0])


def test_a_copy_of_the_model_is_accepted(
    indexed: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model[0], tmp_path / "copy")
    assert as_json(capsys, indexed, TEXT, "--model", tmp_path / "copy")


def test_missing_or_invalid_inputs_are_named_in_the_error(
    indexed: Path, pictures: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "a query is empty" in error(capsys, "search", indexed, " ")
    (pictures / "bad.png").write_bytes(b"words")
    assert "does not recognize its format" in error(capsys, "search", indexed, "--image", pictures / "bad.png")
    half = tmp_path / "half"
    LLM2CLIPVisionModelWithProjection.from_pretrained(model[0]).save_pretrained(half)
    tiny.processor().image_processor.save_pretrained(half)
    assert "Texts and images need the whole model with its LLM" in error(
        capsys, "search", indexed, TEXT, "--model", half
    )
    assert as_json(capsys, indexed, "--image", pictures / "00.png", "--model", half)


def test_mistakes_are_found_before_libraries_are_imported(indexed: Path, pictures: Path, tmp_path: Path) -> None:
    away = shutil.copytree(indexed, tmp_path / "away")
    manifest = json.loads((away / "manifest.json").read_text())
    (away / "manifest.json").write_text(json.dumps({**manifest, "model": "/moved/away"}))
    mistakes = {
        "there is no index in /no/such": ["/no/such", TEXT],
        f"did you mean '{indexed.name}'? To create one: llm2clip index": [f"{indexed}s", TEXT],
        f"there is no index in {pictures} (no manifest.json). If these are the images": [str(pictures), TEXT],
        "the query is missing": [str(indexed)],
        "there is no image file /no/such.png": [str(indexed), "--image", "/no/such.png"],
        "there is no model ./no/such": [str(indexed), TEXT, "--model", "./no/such"],
        "the file no.py does not exist": [str(indexed), TEXT, "--model", "no.py:function"],
        "the model in /moved/away, which no longer exists": [str(away), TEXT],
        "top must be at least 1": [str(indexed), TEXT, "--top", "0"],
    }
    script = f"""
import sys
from llm2clip import cli
assert [cli.main(["search", *mistake]) for mistake in {list(mistakes.values())}] == [2] * {len(mistakes)}
print(sorted({{"torch", "transformers", "lancedb", "datasets", "matplotlib", "rich"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    for message, shown in zip(mistakes, errors, strict=True):
        assert message in shown


@pytest.mark.parametrize("damage", ["images.lance/data/*.lance", "images.lance/_versions/*", "manifest.json"])
@pytest.mark.parametrize("deleted", [False, True])
def test_a_damaged_index_is_an_error(
    damage: str, deleted: bool, indexed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in list(indexed.glob(damage)):
        path.unlink() if deleted else path.write_bytes(path.read_bytes()[:40])
    message = error(capsys, "search", indexed, TEXT)
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
        message = error(capsys, "search", indexed, TEXT, "--where", where)
        assert f"where is {where!r}, which is no condition on the columns key, folder, extension, size" in message
        assert ".rs:" not in message
    assert as_json(capsys, indexed, TEXT, "--where", "key = '; LIMIT 1 -- \x00)' OR (size < 0)")[0]["results"] == []
    assert "where is empty" in error(capsys, "search", indexed, TEXT, "--where", "")


def test_any_number_of_results_can_be_asked_for(indexed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(as_json(capsys, indexed, TEXT, "--top", 10**30)[0]["results"]) == 12
    opened = SearchIndex.open(indexed)
    for top in (0, -1):
        with pytest.raises(ValueError, match="k must be at least 1"):
            opened.search(np.ones((1, opened.manifest.width), np.float32), top)


@pytest.mark.parametrize(("part", "query"), [("visual_projection", "--image"), ("text_adapter.proj", "a dog")])
def test_a_query_with_a_broken_embedding_ends_the_search(
    part: str, query: str, indexed: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def nothing(*arguments: Any) -> None:
        pass

    broken = save_broken(tmp_path / "broken", part)
    monkeypatch.setattr("llm2clip.search.search_index.IndexManifest.require_model", nothing)
    queries = [query, pictures / "00.png"] if query == "--image" else [query]
    message = error(capsys, "search", indexed, *queries, "--model", broken)
    assert f"NaN or infinite: {queries[-1]}. A model gives such values after a training that diverged" in message

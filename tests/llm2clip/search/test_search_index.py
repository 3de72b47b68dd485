"""`SearchIndex` in Python: any encoder, any store, any images, with equal answers."""

from __future__ import annotations

import inspect
import os
import runpy
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

import llm2clip
from llm2clip.encoders import Encoder, load_encoder
from llm2clip.search.index_settings import IndexSettings
from llm2clip.search.lance_rows import LanceRows
from llm2clip.search.lance_store import LanceStore
from llm2clip.search.search_index import SearchIndex
from llm2clip.search.store import VECTOR, IndexStore
from tests.documents.reading import blocks
from tests.llm2clip.encoders import models

from .helpers import QUERY, Model, as_json, encoded, error, picture
from .helpers import index as run_index
from .updates import build, new_rows

TEXTS = ["two children play football", "a red bus", "a steam train"]


def encoder_of(library: str, model: Model, folder: Path) -> Encoder:
    """Open a tiny model with random weights."""
    if library == "ours":
        return load_encoder(str(model[0]))
    if library == "open_clip":
        name, weights = models.register_open_clip(folder)
        return load_encoder(f"open_clip:{name}/{weights}")
    models.save_transformers("clip", folder / "clip")
    return load_encoder(str(folder / "clip"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("library", ["ours", "transformers", "open_clip"])
def test_all_stores_give_equal_answers_with_any_model(
    library: str,
    dtype: str,
    pictures: Path,
    model: Model,
    url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encoder = encoder_of(library, model, tmp_path)
    indexes = [
        SearchIndex.build(encoder, pictures, tmp_path / "lance", stored_dtype=dtype),
        SearchIndex.build(encoder, pictures, tmp_path / "codes", stored_dtype=dtype, index_type="ivf_rq"),
        SearchIndex.build(
            encoder, pictures, "pictures", postgres=url, stored_dtype=dtype, rows_dir=str(tmp_path / "rows")
        ),
    ]
    queries: list[Any] = [*TEXTS, *(picture(1000 + number) for number in range(5)), pictures / "a" / "07.png"]
    # Embeddings of two runs may differ by a rounding to 16 bits.
    tolerance = 2e-3 if dtype == "float16" else 1e-5
    files = {str(path.relative_to(pictures)): path for path in pictures.rglob("*.png")}
    embeds = encoder.encode_image([str(path) for path in files.values()])
    rows = torch.stack([encoder.encode_text(one)[0] if isinstance(one, str) else encoder.encode_image(one)[0]
                        for one in queries])  # fmt: skip
    for where, is_right in (
        (None, lambda key: True),
        ("folder = 'a' AND size > 0", lambda key: key.startswith("a/")),
        ("key LIKE '%1.png'", lambda key: key.endswith("1.png")),
    ):
        answers = [index.search(queries, 10, where) for index in indexes]
        for answer in answers:
            assert [[one.key for one in found] for found in answer] == [
                [one.key for one in found] for found in answers[0]
            ]
            for row, found in zip(rows, answer, strict=True):
                cosines = dict(zip(files, (embeds @ row).tolist(), strict=True))
                best = sorted((cosine for key, cosine in cosines.items() if is_right(key)), reverse=True)[:10]
                assert [one.score for one in found] == pytest.approx(best, abs=tolerance)
                assert [cosines[one.key] for one in found] == pytest.approx(best, abs=tolerance)
                assert [one.path for one in found] == [str(files[one.key]) for one in found]
    # The command knows the model, and refuses others.
    assert as_json(capsys, tmp_path / "lance", TEXTS[0])
    if library != "ours":
        assert "width 24" in error(capsys, "search", tmp_path / "lance", TEXTS[0], "--model", model[0])


def test_a_folder_is_walked_through_once(
    pictures: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk, walked = os.walk, []
    monkeypatch.setattr(os, "walk", lambda *places, **options: walked.append(places) or walk(*places, **options))
    SearchIndex.build(str(model[0]), pictures, tmp_path / "index")
    assert walked.count((pictures,)) == 1


def test_an_index_is_built_searched_and_updated_in_five_lines(pictures: Path, model: Model, tmp_path: Path) -> None:
    index = llm2clip.SearchIndex.build(str(model[0]), pictures, tmp_path / "index")
    assert (len(index), index.counts["embedded"]) == (12, 12)
    found = index.search(picture(7), k=3)
    assert (found[0].key, found[0].path) == ("a/07.png", str(pictures / "a" / "07.png"))
    both = index.search([TEXTS[0], pictures / "a" / "07.png"], k=3)
    assert [[one.key for one in some] for some in both] == [
        [one.key for one in some] for some in (index.search(TEXTS[0], k=3), found)
    ]
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    assert index.update()["embedded"] == 1
    assert index.search(picture(50), 1)[0].key == "new.png"
    again = llm2clip.SearchIndex.open(tmp_path / "index")
    assert again.search(picture(50), 1) == index.search(picture(50), 1)
    assert again.manifest.identity["name"] == str(model[0])
    with pytest.raises(ValueError, match=r"queries have to be rows of width 24, and are \(1, 3\)"):
        again.search(np.ones((1, 3), np.float32))
    for given in (
        {"revision": "v2"},
        *({"encoder": index.encoder(), name: "query"} for name in ("text_encoder", "dtype")),
    ):
        with pytest.raises(ValueError, match="which is for a model by name"):
            llm2clip.SearchIndex.open(tmp_path / "index", **given)
    with pytest.raises(ValueError, match="index_type is hnsw, but such an index has one of auto, flat, ivf_rq"):
        llm2clip.SearchIndex.build(str(model[0]), pictures, tmp_path / "other", index_type="hnsw")


def test_an_update_keeps_the_settings_of_each_type(pictures: Path, model: Model, url: str, tmp_path: Path) -> None:
    encoder = load_encoder(str(model[0]))
    rows_dir = {"rows_dir": str(tmp_path / "rows")}
    hnsw = SearchIndex.build(encoder, pictures, "pictures", postgres=url, index_type="hnsw", ef_search=50, **rows_dir)
    codes = SearchIndex.build(encoder, pictures, tmp_path / "codes", index_type="ivf_rq", probes=3, refine=7)
    (pictures / "new.png").write_bytes(encoded(picture(50)))
    for index, where in ((hnsw, rows_dir), (codes, {})):
        before = index.manifest.index
        assert index.update(**where)["embedded"] == 1
        assert index.manifest.index == before


def test_the_command_finds_the_model_of_a_function(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, weights = models.register_open_clip(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import open_clip\n\ndef load():\n"
        f"    made = open_clip.create_model_and_transforms({name!r}, {str(weights)!r})\n"
        f"    return made[0], made[2], open_clip.get_tokenizer({name!r})\n"
    )
    run_index(pictures, f"{tmp_path}/mine.py:load", tmp_path / "index")
    (found,) = as_json(capsys, tmp_path / "index", "--image", pictures / "a" / "07.png")
    assert found["results"][0]["key"] == "a/07.png"
    (tmp_path / "mine.py").unlink()
    assert "which no longer exists; give its new place" in error(capsys, "search", tmp_path / "index", "a dog")


def test_a_list_of_paths_and_images_and_an_open_data_set_are_indexed(
    pictures: Path, model: Model, tmp_path: Path
) -> None:
    encoder, files = load_encoder(str(model[0])), sorted(pictures.rglob("*.png"))
    index = SearchIndex.build(encoder, [*files[:5], picture(90)], tmp_path / "index")
    assert index.search(files[3], 1)[0].key == str(files[3])
    assert index.search(picture(90), 1)[0].key == "5"
    with pytest.raises(ValueError, match="the index is of images in memory: give them"):
        index.update()
    assert index.update([*files[1:5], picture(90)]) | {"index": ""} == {
        "embedded": 0, "kept": 5, "removed": 1, "failed": 0, "images": 5, "index": "",
    }  # fmt: skip
    table = datasets.Dataset.from_dict({"image": [picture(1), picture(2)], "caption": ["one", "two"]})
    found = SearchIndex.build(encoder, table, tmp_path / "table").search(picture(2), 1)[0]
    assert (found.key, found.caption) == ("1", "two")


@pytest.mark.parametrize("index_type", ["flat", "ivf_rq"])
def test_many_queries_read_the_rows_once_and_find_what_each_finds_alone(
    index_type: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rows = LanceStore(tmp_path / "index"), new_rows(0, 20_000 if index_type == "flat" else 900)
    build(store, [rows, rows.slice(0, 50)], IndexSettings(index_type))  # some are there twice
    queries = np.array(new_rows(1, 40)[VECTOR].to_pylist(), np.float32)
    opened, read = SearchIndex.open(store), LanceRows.scan
    expected = [opened.search(queries[[number]], 10)[0] for number in range(40)]
    scans: list[Any] = []
    monkeypatch.setattr(LanceRows, "scan", lambda *given: scans.append(given) or read(*given))
    monkeypatch.setattr(LanceRows, "_nearest", lambda *_: pytest.fail("a query was searched alone"))
    assert opened.search(queries, 10) == expected
    assert len(scans) == 1
    assert [len(found) for found in opened.search(queries, 10, "key LIKE '0-1_'")] == [10] * 40
    assert opened.search(queries, 10, "key = 'none'") == [[]] * 40


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e300])
def test_the_length_of_a_query_does_not_matter(scale: float, indexed: Path) -> None:
    opened, row = SearchIndex.open(indexed), np.random.default_rng(0).normal(size=(1, 24))
    (found,), (expected,) = opened.search(row * scale, 12), opened.search(row, 12)
    assert len(found) == 12
    assert [one.key for one in found] == [one.key for one in expected]
    assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-6)


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
def test_a_query_without_a_direction_is_named(value: float, indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.ones((3, 24), np.float32)
    rows[1] *= value
    with pytest.raises(ValueError, match=r"of 1 of 3 queries are zero, NaN or infinite: 1\. "):
        SearchIndex.open(indexed).search(rows)
    opened = SearchIndex.open(indexed)
    monkeypatch.setattr(type(opened.encoder()), "encode_text", lambda *_: torch.full((2, 24), float(value)))
    with pytest.raises(ValueError, match=r"of 2 of 2 queries are zero, NaN or infinite: a dog, a cat\. "):
        opened.search(["a dog", "a cat"])


@pytest.mark.parametrize("k", [2.5, 0, -1, "3", True])
def test_the_number_of_results_is_a_whole_number(k: Any, indexed: Path) -> None:
    with pytest.raises(ValueError, match=f"k must be a whole number of at least 1, not {k!r}"):
        SearchIndex.open(indexed).search(QUERY, k)
    assert len(SearchIndex.open(indexed).search(QUERY, np.int64(2))[0]) == 2


class OwnStore(LanceStore):
    """A store of the user."""


def test_an_index_is_in_a_store_of_the_user(pictures: Path, model: Model, tmp_path: Path) -> None:
    built = SearchIndex.build(str(model[0]), pictures, OwnStore(tmp_path / "index"))
    opened = SearchIndex.open(OwnStore(tmp_path / "index"))
    assert opened.search(picture(7), 1) == built.search(picture(7), 1)


def test_the_store_that_the_documents_sketch_has_the_methods_of_one(tmp_path: Path) -> None:
    sketch = tmp_path / "sketch.py"
    sketch.write_text(next(content for _, content in blocks("docs/search.md") if "class QdrantStore" in content))
    made = runpy.run_path(str(sketch))["QdrantStore"]
    methods = [name for name, value in vars(IndexStore).items() if inspect.isfunction(value) and name[0] != "_"]
    assert len(methods) == 6
    for name in methods:
        shown, expected = (inspect.signature(getattr(one, name)).parameters.values() for one in (made, IndexStore))
        assert [(one.name, one.default) for one in shown] == [(one.name, one.default) for one in expected]


def test_an_index_of_codes_misses_nothing_and_shows_exact_scores(tmp_path: Path) -> None:
    store, rows = LanceStore(tmp_path / "index"), new_rows(0, 4000)
    build(store, [rows], IndexSettings("ivf_rq"))
    index, queries = SearchIndex.open(store), np.array(new_rows(1, 100)[VECTOR].to_pylist(), np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    embeds = np.array(rows[VECTOR].to_pylist(), np.float64)
    cosines = queries @ (embeds / np.linalg.norm(embeds, axis=1, keepdims=True)).T
    hits = 0
    for found, exact in zip(index.search(queries, 10), cosines, strict=True):
        best = np.argsort(-exact)[:10]
        hits += len({one.key for one in found} & {f"0-{number}" for number in best})
        assert [one.score for one in found] == pytest.approx([exact[int(one.key[2:])] for one in found], abs=1e-5)
    assert hits >= 990
    files = tmp_path.glob("index/images-*.lance/_indices/*/*")
    assert sum(path.stat().st_size for path in files) < 4000 * 60, "bytes per row of width 64"


@pytest.mark.parametrize("library", ["ours", "transformers"])
def test_an_index_of_truncated_embeddings_opens_its_model_with_their_width(
    library: str, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = encoder_of(library, model, tmp_path).name
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(4):
        (pictures / f"{number}.png").write_bytes(encoded(picture(number)))
    arguments = ["--model", name, "--truncate-dim", "7", "--output-dir", str(tmp_path / "index"), "--num-workers", "0"]
    assert llm2clip.main(["index", str(pictures), *arguments]) == 0
    index = SearchIndex.open(tmp_path / "index")
    assert index.manifest.width == 7
    assert index.search(picture(2), k=1)[0].key == "2.png"
    assert len(index.search("a red bus", k=3)) == 3
    whole = [*arguments[:2], *arguments[4:]]
    message = error(capsys, "index", pictures, *whole)
    assert "have 24 values" in message
    assert "have 7; if that is the same model, add --truncate-dim 7." in message

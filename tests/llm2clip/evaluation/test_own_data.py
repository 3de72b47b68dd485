"""One's own images and captions: a benchmark as the published ones, for models of any library, on any processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from llm2clip import cli
from llm2clip.data import CaptionSource, PairSource
from llm2clip.encoders import embed, load_encoder
from llm2clip.encoders.ours import OurEncoder
from llm2clip.encoders.stored import StoredEncoder
from llm2clip.evaluation import caption_retrieval_metrics, retrieval_metrics
from llm2clip.evaluation.comparison import compare_results
from llm2clip.evaluation.data import CaptionPairData, RetrievalData
from llm2clip.evaluation.evaluate import evaluate
from llm2clip.evaluation.protocols.retrieval import image_text_metrics
from llm2clip.evaluation.session import Session
from llm2clip.models.embeddings import NonFiniteError
from llm2clip.store import Store
from tests.builders import tiny
from tests.llm2clip.encoders.models import save_transformers
from tests.pictures import encode

# The captions of six images: two share one, one has one twice in other case, one has an empty one, and one has none.
CAPTIONS = [["a dog", "a cat"], ["a dog"], ["a bus", "a bus", "A Bus", ""], ["a red park"], [], ["two trees, old"]]
ROWS = ["a dog", "a cat", "a dog", "a bus", "a bus", "A Bus", "a red park", "two trees, old"]
DISTINCT = ["a dog", "a cat", "a bus", "A Bus", "a red park", "two trees, old"]


def write_table(path: Path, broken: int | None = None) -> str:
    """Write the images, of which one may be broken, with keys and captions."""
    rows: dict[str, list[Any]] = {"key": [f"k{number}" for number in range(6)], "image": [], "caption": CAPTIONS}
    for number in range(6):
        picture = encode(tiny.IMAGES[number % 2].rotate(10 * number))
        rows["image"].append(b"no image" if number == broken else picture)
    datasets.Dataset.from_dict(rows).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models `ours` and `clip`, own data `own.parquet`, and the published set `data/Urban1k`."""
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    tiny.save(folder / "ours")
    save_transformers("clip", folder / "clip")
    write_table(folder / "own.parquet")
    for part in ("image", "caption"):
        (folder / "data/Urban1k" / part).mkdir(parents=True)
    for number, text in enumerate(("a long street", "an old house", "a park in snow"), 1):
        tiny.IMAGES[0].rotate(40 * number).save(folder / f"data/Urban1k/image/{number}.jpg")
        (folder / f"data/Urban1k/caption/{number}.txt").write_text(text)
    return folder


def command(place: Path, output: Path, *options: str) -> int:
    paths = ["--data", str(place / "data"), "--output", str(output), "--num-workers", "0"]
    return cli.main(["evaluate", *options, *paths])


def results_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(output.glob("*.json"))]


def source(path: str, **fields: Any) -> CaptionSource:
    return CaptionSource(path, split="train", **fields)


def test_rows_are_queries_with_one_right_image_and_equal_captions_one_with_all(place: Path) -> None:
    own = source(str(place / "own.parquet"))
    rows = RetrievalData.from_source(own, "rows")
    assert rows.texts == ROWS
    assert rows.pairs.tolist() == [[0, 0], [1, 0], [2, 1], [3, 2], [4, 2], [5, 2], [6, 3], [7, 5]]
    assert rows.qrels is None
    # Without the second image.
    chosen = rows.select([0, 2, 3, 4, 5])
    assert chosen.texts == [*ROWS[:2], *ROWS[3:]]
    assert chosen.pairs.tolist() == [[0, 0], [1, 0], [2, 1], [3, 1], [4, 1], [5, 2], [6, 4]]
    distinct = RetrievalData.from_source(own)
    assert distinct.texts == DISTINCT
    # "a bus" and "A Bus" are one caption, whose forms are kept.
    assert distinct.pairs.tolist() == [[0, 0], [0, 1], [1, 0], [2, 2], [3, 2], [4, 3], [5, 5]]
    with pytest.raises(ValueError, match=r"no row of .* has a caption in caption"):
        RetrievalData.from_source(CaptionSource(own.path, split="train[4:5]"))


def test_rows_that_name_one_file_are_one_image(place: Path, tmp_path: Path) -> None:
    for number in range(2):
        tiny.IMAGES[number].save(tmp_path / f"{number}.png")
    lines = ["image,caption", "1.png,a dog", "0.png,a cat", "1.png,a pet", "0.png,a dog"]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    own = source(str(tmp_path / "rows.csv"))
    rows, distinct = RetrievalData.from_source(own, "rows"), RetrievalData.from_source(own)
    assert rows.texts == ["a dog", "a pet", "a cat", "a dog"]
    assert (rows.owners.tolist(), len(rows.images)) == ([0, 0, 1, 1], 2)
    assert (distinct.texts, distinct.pairs.tolist()) == (["a dog", "a pet", "a cat"], [[0, 0], [0, 1], [1, 0], [2, 1]])
    [result] = evaluate(place / "clip", own, num_workers=0)
    assert result.counts["tied_text_queries"] == 0


def test_each_name_has_one_file_and_each_slice_and_precision_its_own(place: Path, tmp_path: Path) -> None:
    own, clip = f"{place}/./own.parquet", f"{place / 'clip'}/"
    options = [["--split", "train[:3]"], ["--split", "train[3:]"], ["--truncate-dim", "4", "--precision", "int8"], []]
    for some in options:
        assert command(place, tmp_path, clip, "--benchmark", own, *some) == 0
    # `train` is all rows of a file, and the result of the last run.
    assert command(place, tmp_path, clip, "--benchmark", own, "--split", "train") == 0
    results = results_of(tmp_path)
    assert len(results) == len(options)
    assert {one["model"]["given"] for one in results} == {str(place / "clip")}
    names = [f"{place}/own.parquet{part}" for part in ("", "", " [train[3:]]", " [train[:3]]")]
    assert sorted(one["benchmark"] for one in results) == names
    labels = [row.label for row in compare_results([tmp_path]).rows]
    assert sorted(labels) == [clip[:-1], f"{clip[:-1]} (truncate dim 4, precision int8)"]


def test_models_of_two_libraries_on_own_data_and_a_published_set_in_one_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models, own = [str(place / name) for name in ("clip", "ours")], str(place / "own.parquet")
    options = ("--benchmark", own, "urban1k", "--allow-counts", "--positives", "rows")
    assert command(place, tmp_path, *models, *options) == 0
    results = results_of(tmp_path)
    assert "Protocol: retrieval, positives rows, " in capsys.readouterr().out
    assert [(one["model"]["given"], one["benchmark"]) for one in results] == [
        (model, benchmark) for model in models for benchmark in (own, "urban1k")
    ]
    assert len({json.dumps([sorted(one), one["protocol"]]) for one in results}) == 1
    for one in results[::2]:
        assert (one["counts"]["images"], one["counts"]["texts"], one["counts"]["image_queries"]) == (6, 8, 5)
        assert {"path": own, "split": "train"}.items() <= one["data"].items()
        assert one["protocol"]["positives"] == "rows"
    # Those of the encoder itself.
    for model, one in zip(models, results[::2], strict=True):
        encoder, data = load_encoder(model), RetrievalData.from_source(source(own), "rows")
        images = encoder.encode_image([data.image(row) for row in range(6)])
        expected = retrieval_metrics(images, encoder.encode_text(data.texts), data.pairs)
        assert one["scores"] == pytest.approx({name: expected[name] for name in one["scores"]})
        assert one["ranks"] == pytest.approx({name: expected[name] for name in one["ranks"]})
    assert cli.main(["report", str(tmp_path), "--baseline", models[0], "--output", str(tmp_path / "page.md")]) == 0
    page = (tmp_path / "page.md").read_text()
    assert f"## {own}" in page
    assert "## Urban1k (not the published set" in page
    # The second run reads all.
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert command(place, tmp_path, *models, *options) == 0
    assert stored == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}


def test_sources_are_measured_as_paths_are(place: Path, tmp_path: Path) -> None:
    model, own = place / "clip", str(place / "own.parquet")
    [by_path], [by_source] = (evaluate(model, one, num_workers=0) for one in (place / "own.parquet", source(own)))
    assert (by_source.benchmark, by_source.scores) == (own, by_path.scores)
    sources = [source(own, max_samples=3), CaptionSource(own, split="train[:2]")]
    found = evaluate(str(model), sources, positives="rows", num_workers=0)
    assert [one.counts["texts"] for one in found] == [6, 3]
    (tmp_path / "pairs.csv").write_text("a,b\na dog,one dog\na cat,one cat\n")
    [by_pairs] = evaluate(model, PairSource(str(tmp_path / "pairs.csv"), caption_columns=["a", "b"]))
    assert by_pairs.protocol["id"] == "caption-retrieval"
    with pytest.raises(ValueError, match=r"two sources are called .*, as their results would be: use two calls"):
        evaluate(model, [source(own), sources[0]])
    with pytest.raises(ValueError, match="split is test, but none of"):
        evaluate(model, sources, split="test")


def test_fields_that_only_training_follows_are_refused(place: Path) -> None:
    path = str(place / "own.parquet")
    with pytest.raises(
        ValueError, match=r"embedding_cache is x, but .* is read without it here; .* unset, or set it to null\."
    ):
        RetrievalData.from_source(CaptionSource(path, embedding_cache="x"))
    # The source of a training, whose draws have no meaning here.
    assert RetrievalData.from_source(CaptionSource(path, caption_weights=[1.0], weight=2.0)).texts
    source = PairSource(path, anchor_column="a", positive_column="b", instruction="Find it: ")
    with pytest.raises(ValueError, match="instruction is Find it: , but"):
        CaptionPairData.from_source(source)


def test_images_that_cannot_be_read_end_a_run_or_are_skipped_and_counted(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    own, data = write_table(tmp_path / "own.parquet", broken=3), tmp_path / "data"
    shutil.copytree(place / "data", data)
    (data / "Urban1k/image/2.jpg").write_bytes(b"no image")
    options = (str(place / "clip"), "--benchmark", own, "urban1k", "--allow-counts")
    assert command(tmp_path, tmp_path / "raise", *options) == 2
    assert "The image 'k3' cannot be used" in capsys.readouterr().err
    for _ in range(2):  # the second time from stored rows
        assert command(tmp_path, tmp_path / "out", *options, "--on-error", "skip", "--overwrite") == 0
    assert "1 image skipped" in capsys.readouterr().out
    assert "Skipping 1 images that cannot be read: k3" in caplog.text
    mine, urban = results_of(tmp_path / "out")
    assert (mine["counts"]["images"], mine["counts"]["skipped_images"], mine["counts"]["texts"]) == (5, 1, 5)
    assert urban["differences"][-1] == "1 images cannot be read"
    # The scores are those without the image.
    encoder, rows = load_encoder(str(place / "clip")), RetrievalData.from_source(source(own)).select([0, 1, 2, 4, 5])
    images = encoder.encode_image([rows.image(row) for row in range(5)])
    expected = retrieval_metrics(images, encoder.encode_text(rows.texts), rows.pairs)
    assert mine["scores"] == pytest.approx({name: expected[name] for name in mine["scores"]})


def test_captions_are_read_from_a_cache_instead_of_embedded_by_the_llm(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, model = str(place / "own.parquet"), str(place / "ours")
    recipe = {"sources": [{"path": own}], "output_dir": str(tmp_path / "cache")}
    tiny_model = tiny.LLM2CLIPModel.from_pretrained(model)
    tiny_model.text_model.save_pretrained(tmp_path / "llm")
    tiny.processor().tokenizer.save_pretrained(tmp_path / "llm")
    embed.run(embed.EmbedConfig(text_model_name_or_path=str(tmp_path / "llm"), **recipe))
    options = ("--benchmark", own, "--embeddings", str(tmp_path / "rows"))
    assert command(place, tmp_path / "llm-out", model, *options) == 0
    with monkeypatch.context() as patched:
        patched.setattr(OurEncoder, "tokenized", lambda *_: pytest.fail("the LLM is not used"))
        cached = ("--embedding-cache", str(tmp_path / "cache"))
        assert command(place, tmp_path / "cache-out", model, *options, *cached) == 0
    [by_llm], [by_cache] = results_of(tmp_path / "llm-out"), results_of(tmp_path / "cache-out")
    assert by_cache["scores"] == pytest.approx(by_llm["scores"], abs=1e-9)
    assert by_cache["model"]["fingerprint"] != by_llm["model"]["fingerprint"]
    # Rows of 16 bits are near those of the LLM, and lie apart from them.
    texts = [Store.open(folder) for folder in sorted((tmp_path / "rows").glob("*/texts"))]
    first, second = (store.read(store.find(texts[0].shards[0].keys())) for store in texts)
    assert not first.equal(second)
    torch.testing.assert_close(first, second, atol=3e-3, rtol=0)
    (tmp_path / "other.csv").write_text("image,caption\nx.png,never seen\n")
    tiny.IMAGES[0].save(tmp_path / "x.png")
    capsys.readouterr()
    assert command(place, tmp_path / "no", model, "--benchmark", str(tmp_path / "other.csv"), *cached) == 2
    assert "lacks 1 of 1 captions, such as 'never seen'" in capsys.readouterr().err
    assert command(place, tmp_path / "no", str(place / "clip"), "--benchmark", own, *cached) == 2
    assert "clip is not an LLM2CLIP model: it contains model_type 'clip'" in capsys.readouterr().err


def test_captions_find_those_of_the_same_image_with_a_text_tower_too(place: Path, tmp_path: Path) -> None:
    tower = tiny.text_model()
    tower.save_pretrained(tmp_path / "tower")
    tiny.processor().tokenizer.save_pretrained(tmp_path / "tower")
    rows = ["a,b", "a dog,one dog", "A DOG,a pet", "a cat,one cat", "a bus,one dog"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    # Equal texts are one query, or one target.
    data = CaptionPairData.from_source(PairSource(str(tmp_path / "pairs.csv"), anchor_column="a", positive_column="b"))
    assert (data.queries, data.targets) == (["a dog", "a cat", "a bus"], ["one dog", "a pet", "one cat"])
    assert data.qrels is not None
    assert data.qrels.tolist() == [[0, 0], [0, 1], [1, 2], [2, 0]]
    models = [str(tmp_path / "tower"), str(place / "ours"), str(place / "clip")]
    for columns, pair in (
        (("--query-column", "a", "--target-column", "b"), "query to target"),
        (("--task", "caption_retrieval", "--caption-columns", "a", "b"), "caption 1 to caption 2"),
    ):
        output = tmp_path / pair
        assert command(place, output, *models, "--benchmark", str(tmp_path / "pairs.csv"), *columns) == 0
        found = {one["model"]["given"]: one for one in results_of(output)}
        assert set(found) == set(models)
        for model, one in found.items():
            assert one["protocol"]["pair"] == pair
            embeds = load_encoder(model).encode_text
            expected = caption_retrieval_metrics(embeds(data.queries), embeds(data.targets), data.qrels)
            assert one["scores"] == pytest.approx({name: expected[name] for name in one["scores"]})


def test_broken_embeddings_of_a_model_in_training_end_its_retrieval_by_name(place: Path) -> None:
    model, processor = tiny.joint_model().eval(), tiny.processor()
    data = RetrievalData.from_source(source(str(place / "own.parquet")))
    encoder = OurEncoder(model.text_model, processor)

    def llm(texts: list[str]) -> torch.Tensor:
        return encoder.embed(texts)[0]

    def broken_llm(texts: list[str]) -> torch.Tensor:
        rows = llm(texts)
        rows[texts.index("a bus")] = float("nan")
        return rows

    def measure(embed: Any) -> Any:
        return image_text_metrics(Session(StoredEncoder(model, processor, embed), on_error="skip"), data)

    assert measure(llm)["num_texts"] == 6
    with pytest.raises(NonFiniteError, match=r"1 of 6 texts are NaN or infinite: a bus\."):
        measure(broken_llm)
    torch.nn.init.constant_(model.text_adapter.proj.weight, float("nan"))
    with pytest.raises(NonFiniteError, match=r"6 of 6 texts are NaN or infinite: a dog"):
        measure(llm)
    torch.nn.init.constant_(model.visual_projection.weight, float("inf"))
    with pytest.raises(NonFiniteError, match=r"6 of 6 images are NaN or infinite: k0, k1"):
        measure(llm)

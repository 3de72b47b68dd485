"""Queries by another text encoder for image vectors that stay as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from sklearn.linear_model import Ridge
from torch.nn import functional as F

from llm2clip import SearchIndex, create_app, load_encoder
from llm2clip import main as llm2clip
from llm2clip.encoders import Encoder
from llm2clip.encoders.load import load_query_encoder
from llm2clip.encoders.query_encoder import SPACE_FILE
from llm2clip.serving.serve import open_index
from llm2clip.trainers.keep_images import fit_query_map
from tests.llm2clip.encoders.models import save_transformers
from tests.llm2clip.search.helpers import index, picture
from tests.postgres import postgres_server

TEXTS = [
    f"{colour} {thing}" for colour in ("red", "blue", "old", "a small") for thing in ("bus", "dog", "tree", "sea")
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept") / "clip"
    save_transformers("clip", folder)
    return folder


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    for number in range(len(TEXTS)):
        picture(number).save(folder / f"{number:02d}.png")
    return folder


def align(images: Path, text: Path, output: Path, *options: Any) -> int:
    return llm2clip(
        ["align", "--keep-images", str(images), "--text-model", str(text), "--output-dir", str(output)]
        + [str(option) for option in options]
    )


def write_pairs(path: Path, keys: list[str]) -> Path:
    lines = [json.dumps({"key": key, "caption": text}) for key, text in zip(keys, TEXTS, strict=True)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def expected_queries(text: Encoder, vectors: torch.Tensor, ridge: float, asked: list[str]) -> np.ndarray:
    """By scikit-learn."""
    rows = F.normalize(text.encode_text(TEXTS), dim=-1).double().numpy()
    fitted = Ridge(alpha=ridge * rows.var(axis=0).mean() * len(rows)).fit(rows, F.normalize(vectors).double().numpy())
    queries = fitted.predict(F.normalize(text.encode_text(asked), dim=-1).double().numpy())
    return queries / np.linalg.norm(queries, axis=1, keepdims=True)


def test_a_folder_of_clip_retrieval_gets_queries_by_an_llm(
    clip: Path, drawings: Path, saved_model: Path, tmp_path: Path
) -> None:
    vectors = load_encoder(str(clip)).encode_image(sorted(drawings.iterdir()))
    for folder in ("img_emb", "metadata"):
        (tmp_path / "made" / folder).mkdir(parents=True)
    for part, rows in enumerate((slice(0, 9), slice(9, 16))):
        np.save(tmp_path / f"made/img_emb/img_emb_{part}.npy", vectors[rows].numpy().astype(np.float16))
        table = pa.table({"image_path": [f"{row}.png" for row in range(16)][rows], "caption": TEXTS[rows]})
        parquet.write_table(table, tmp_path / f"made/metadata/metadata_{part}.parquet")
    assert align(tmp_path / "made", saved_model, tmp_path / "queries", "--ridge", 0.3) == 0
    found = load_encoder(str(tmp_path / "queries")).encode_text(["a red dog", "tree"])
    text = load_encoder(str(saved_model), needs=["text"])
    np.testing.assert_allclose(found, expected_queries(text, vectors, 0.3, ["a red dog", "tree"]), atol=2e-3)
    assert "16 pairs" in (tmp_path / "queries/README.md").read_text(encoding="utf-8")


def test_an_index_is_searched_with_texts_of_another_model_and_its_own_images(
    clip: Path, drawings: Path, saved_model: Path, tmp_path: Path
) -> None:
    index(drawings, clip, tmp_path / "index")
    keys = sorted(path.name for path in drawings.iterdir())
    pairs = write_pairs(tmp_path / "pairs.jsonl", keys)
    assert align(tmp_path / "index", saved_model, tmp_path / "queries", "--pairs", pairs, "--ridge", 0.3) == 0
    opened = SearchIndex.open(tmp_path / "index", query_encoder=tmp_path / "queries")
    vectors = load_encoder(str(clip)).encode_image(sorted(drawings.iterdir()))
    text = load_encoder(str(saved_model), needs=["text"])
    expected = expected_queries(text, vectors, 0.3, ["a red dog"])
    np.testing.assert_allclose(opened.embed(["a red dog"]), expected, atol=2e-3)
    assert opened._encoder is None  # the image model was not opened
    np.testing.assert_allclose(opened.embed([picture(3)]), vectors[3:4], atol=1e-5)
    both = opened.embed([(picture(3), "a red dog")])
    np.testing.assert_allclose(both, F.normalize(torch.from_numpy(expected).float() + vectors[3]), atol=2e-3)
    arguments = ["search", str(tmp_path / "index"), "a red dog", "--query-encoder", str(tmp_path / "queries")]
    assert llm2clip(arguments) == 0


def test_a_pgvector_table_gets_queries_by_an_llm(
    clip: Path, drawings: Path, saved_model: Path, tmp_path: Path
) -> None:
    psycopg = pytest.importorskip("psycopg")
    vectors = load_encoder(str(clip)).encode_image(sorted(drawings.iterdir()))
    with postgres_server() as url, psycopg.connect(url) as connection:
        connection.execute("CREATE EXTENSION vector")
        connection.execute("CREATE TABLE photos (id bigint, embedding vector(24), caption text)")
        for number, (row, caption) in enumerate(zip(vectors.tolist(), TEXTS, strict=True)):
            connection.execute("INSERT INTO photos VALUES (%s, %s::vector, %s)", [number, str(row), caption])
        rows = connection.execute("SELECT id::text, embedding::real[], caption FROM photos").fetchall()
        table = pandas.DataFrame(rows, columns=["key", "vector", "caption"])
        table.to_parquet(tmp_path / "photos.parquet")
        assert align(tmp_path / "photos.parquet", saved_model, tmp_path / "queries", "--ridge", 0.3) == 0
        query = load_encoder(str(tmp_path / "queries")).encode_text("a red dog")[0].tolist()
        ordered = "SELECT id FROM photos ORDER BY embedding <=> %s::vector LIMIT 10"
        found = [number for (number,) in connection.execute(ordered, [str(query)])]
    text = load_encoder(str(saved_model), needs=["text"])
    scores = expected_queries(text, vectors, 0.3, ["a red dog"])[0] @ vectors.double().numpy().T
    assert found == np.argsort(-scores)[:10].tolist()


def test_another_image_side_is_refused(clip: Path, drawings: Path, saved_model: Path, tmp_path: Path) -> None:
    index(drawings, clip, tmp_path / "index")
    pairs = write_pairs(tmp_path / "pairs.jsonl", sorted(path.name for path in drawings.iterdir()))
    assert align(tmp_path / "index", saved_model, tmp_path / "queries", "--pairs", pairs, "--ridge", 1) == 0
    record = json.loads((tmp_path / "queries" / SPACE_FILE).read_text(encoding="utf-8"))
    other = {**record, "image_fingerprint": "another"}
    (tmp_path / "queries" / SPACE_FILE).write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(ValueError, match="was fitted to image vectors of 24 values of another"):
        SearchIndex.open(tmp_path / "index", query_encoder=tmp_path / "queries").search("a red dog")


def test_texts_alone_meet_the_old_text_side(clip: Path, saved_model: Path, tmp_path: Path) -> None:
    old, text = load_encoder(str(clip)), load_encoder(str(saved_model), needs=["text"])
    np.save(tmp_path / "images.npy", np.eye(3, old.width, dtype=np.float32))
    (tmp_path / "images.txt").write_text("a\nb\nc", encoding="utf-8")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    options = ("--texts", tmp_path / "texts.txt", "--old-text-model", clip, "--ridge", 0.1)
    assert align(tmp_path / "images.npy", saved_model, tmp_path / "queries", *options) == 0
    found = load_encoder(str(tmp_path / "queries")).encode_text(["a red dog"])
    expected = expected_queries(text, old.encode_text(TEXTS), 0.1, ["a red dog"])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_text_counts_as_often_as_it_occurs_and_is_in_one_fold() -> None:
    generator = torch.Generator().manual_seed(0)
    table = {str(number): torch.randn(6, generator=generator) for number in range(40)}
    vectors = torch.randn(120, 5, generator=generator)
    texts = [str(number % 40 if number < 80 else number % 4) for number in range(120)]

    def embed(asked: Any) -> torch.Tensor:
        return torch.stack([table[text] for text in asked])

    found = fit_query_map(texts, embed, lambda start, stop: vectors[start:stop], ridge=0.2)
    rows = F.normalize(embed(texts), dim=-1).double().numpy()
    alpha = 0.2 * rows.var(axis=0).mean() * len(rows)
    expected = Ridge(alpha=alpha).fit(rows, F.normalize(vectors, dim=-1).double().numpy())
    np.testing.assert_allclose(found.weight, expected.coef_, atol=1e-5)
    # Noise: nothing can be learned, which a text in two folds would hide.
    assert fit_query_map(texts, embed, lambda start, stop: vectors[start:stop]).ridge == 10.0


def test_a_server_embeds_texts_by_the_query_encoder_and_searches_the_index(
    clip: Path, drawings: Path, saved_model: Path, tmp_path: Path
) -> None:
    from fastapi.testclient import TestClient

    index(drawings, clip, tmp_path / "index")
    pairs = write_pairs(tmp_path / "pairs.jsonl", sorted(path.name for path in drawings.iterdir()))
    assert align(tmp_path / "index", saved_model, tmp_path / "queries", "--pairs", pairs, "--ridge", 1) == 0
    encoder = load_query_encoder(tmp_path / "queries", images=load_encoder(str(clip), needs=["image"]))
    with TestClient(create_app(encoder, open_index(str(tmp_path / "index"), encoder))) as client:
        answer = client.post("/v1/embeddings", json={"input": ["a red dog"], "model": "queries"}).json()
    found = np.array(answer["data"][0]["embedding"])
    np.testing.assert_allclose(found, encoder.encode_text("a red dog")[0], atol=1e-5)

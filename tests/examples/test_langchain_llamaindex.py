"""The example's adapter gives the model's own rows, and what it prints is nearest."""

from __future__ import annotations

import runpy
from pathlib import Path

import datasets
import torch

from tests.builders import tiny
from tests.builders.tiny import CAPTIONS, IMAGES
from tests.examples.conftest import EXAMPLES, Run

SCRIPT = "langchain_llamaindex.py"


def test_rows_are_the_models(tmp_path: Path) -> None:
    model, processor = tiny.save(tmp_path), tiny.processor()
    embeddings = runpy.run_path(str(EXAMPLES / SCRIPT))["Embeddings"](str(tmp_path))
    text, image = model.encode_text(CAPTIONS, processor), model.encode_image(IMAGES, processor)
    for method, inputs, expected in (
        (embeddings.embed_documents, CAPTIONS, text),
        (embeddings.embed_query, CAPTIONS[0], text[0]),
        (embeddings.embed_image, IMAGES, image),
        (embeddings.get_text_embedding_batch, CAPTIONS, text),
        (embeddings.get_text_embedding, CAPTIONS[1], text[1]),
        (embeddings.get_query_embedding, CAPTIONS[2], text[2]),
        (embeddings.get_image_embedding, IMAGES[1], image[1]),
        (embeddings.get_image_embedding_batch, IMAGES, image),
    ):
        torch.testing.assert_close(torch.tensor(method(inputs)), expected, atol=1e-5, rtol=0)


def test_it_prints_what_is_nearest(run: Run, tmp_path: Path) -> None:
    model, processor = tiny.save(tmp_path), tiny.processor()
    data = datasets.load_dataset(str(EXAMPLES / "data" / "concepts"), split="test")
    shelf = data.select(range(0, len(data), 3))
    images = model.encode_image(shelf["image"][:], processor)
    expected = []
    queries = (model.encode_text(CAPTIONS[0], processor), model.encode_image(data[214]["image"], processor))
    for title, query in zip((CAPTIONS[0], "[a drawing of: monorail]"), queries, strict=True):
        scores, rows = (images @ query[0]).topk(3)
        found = zip(scores, rows.tolist(), strict=True)
        expected += [title, *(f"  {score:.3f}  {shelf['caption'][row]}" for score, row in found)]
    assert run(SCRIPT, "--model", tmp_path, "--query", CAPTIONS[0]).splitlines() == expected

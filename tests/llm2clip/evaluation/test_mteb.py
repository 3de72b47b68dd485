"""mteb measures a built folder by its own wrapper of sentence-transformers: the numbers of our metrics, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import datasets
import mteb
import pytest
import torch
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer

from llm2clip.encoders import load_encoder
from llm2clip.evaluation import caption_retrieval_metrics
from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from tests.builders import tiny

CONCEPTS = Path(__file__).parents[3] / "examples" / "data" / "concepts" / "test.parquet"
PICTURES = 40
UNSTATED = (
    "reference", "date", "domains", "task_subtypes", "license", "annotations_creators", "dialect", "sample_creation",
)  # fmt: skip


def concepts() -> datasets.Dataset:
    """The first pictures whose names differ."""
    table = datasets.Dataset.from_parquet(str(CONCEPTS), keep_in_memory=True)
    first = {caption.lower(): row for row, caption in reversed(list(enumerate(table["caption"])))}
    return table.select(sorted(first.values())[:PICTURES])


def metadata(name: str, kind: str, category: str, modalities: list[str]) -> TaskMetadata:
    return TaskMetadata(
        name=name, description="Bundled drawings and their names.", type=kind, category=category,
        modalities=modalities, main_score="recall_at_1", dataset={"path": "local/concepts", "revision": "1"},
        eval_splits=["test"], eval_langs=["eng-Latn"], bibtex_citation="", **dict.fromkeys(UNSTATED),
    )  # fmt: skip


class NameToKeywords(AbsTaskRetrieval):
    """Text retrieval: find the keywords of a name."""

    metadata: ClassVar = metadata("NameToKeywords", "Retrieval", "t2t", ["text"])

    def load_data(self, **kwargs: Any) -> None:
        table = concepts()
        ids = [str(row) for row in range(len(table))]
        queries = self.queries(table).add_column("id", ids)
        corpus = self.corpus(table).add_column("id", ids)
        right = {row: {row: 1} for row in ids}
        split = {"queries": queries, "corpus": corpus, "relevant_docs": right, "top_ranked": None}
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True

    def queries(self, table: datasets.Dataset) -> datasets.Dataset:
        return table.select_columns("caption").rename_column("caption", "text")

    def corpus(self, table: datasets.Dataset) -> datasets.Dataset:
        return table.select_columns("keywords").rename_column("keywords", "text")


class NameToPicture(NameToKeywords):
    """Image-text retrieval: find the picture of a name."""

    metadata: ClassVar = metadata("NameToPicture", "Any2AnyRetrieval", "t2i", ["text", "image"])

    def corpus(self, table: datasets.Dataset) -> datasets.Dataset:
        return table.select_columns("image").add_column("modality", ["image"] * len(table))


class PictureAndNameToKeywords(NameToKeywords):
    """Retrieval with an image and a text as one query."""

    metadata: ClassVar = metadata("PictureAndNameToKeywords", "Any2AnyRetrieval", "it2t", ["text", "image"])

    def queries(self, table: datasets.Dataset) -> datasets.Dataset:
        both = table.select_columns(["image", "caption"]).rename_column("caption", "text")
        return both.add_column("modality", ["image,text"] * len(table))


def test_retrieval_equals_our_metrics(tmp_path: Path) -> None:
    folder = tmp_path / "llm2clip-tiny"
    torch.manual_seed(0)
    tiny.save(folder)
    write_sentence_transformers_files(folder)
    # The wrapper that mteb makes of a model takes it for one of texts alone.
    model = SentenceTransformerEncoderWrapper(SentenceTransformer(str(folder), trust_remote_code=True, device="cpu"))
    meta = {"name": "owner/name", "revision": "1", "modalities": ["text", "image"]}
    model.mteb_model_meta = model.mteb_model_meta.model_copy(update=meta)
    encoder, table = load_encoder(str(folder), device="cpu"), concepts()
    names, keywords = (encoder.encode_text(table[column][:]) for column in ("caption", "keywords"))
    pictures = encoder.encode_image(table["image"][:])
    both = torch.nn.functional.normalize(names + pictures, dim=-1)
    for task, queries, candidates in (
        (NameToKeywords(), names, keywords),
        (NameToPicture(), names, pictures),
        (PictureAndNameToKeywords(), both, keywords),
    ):
        result = mteb.evaluate(model, task, cache=None, co2_tracker=False, encode_kwargs={"batch_size": 7})
        found, expected = result.task_results[0].scores["test"][0], caption_retrieval_metrics(queries, candidates)
        assert 0 < expected["recall@10"] < 1
        for k in (1, 5, 10):
            assert found[f"recall_at_{k}"] == pytest.approx(expected[f"recall@{k}"], abs=1e-5)

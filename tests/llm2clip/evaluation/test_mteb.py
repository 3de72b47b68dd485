"""mteb measures a built folder by its own wrapper of sentence-transformers: the numbers of our metrics, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import datasets
import mteb
import pytest
import torch
from mteb.abstasks import AbsTask
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer

from llm2clip.encoders import Encoder, load_encoder
from llm2clip.evaluation import caption_retrieval_metrics
from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from tests.modeling_llm2clip import tiny

CONCEPTS = Path(__file__).parents[3] / "examples" / "data" / "concepts" / "test.parquet"
PICTURES = 40


UNSTATED = (
    "reference", "date", "domains", "task_subtypes", "license", "annotations_creators", "dialect", "sample_creation",
)  # fmt: skip


def metadata(name: str, kind: str, category: str, modalities: list[str], main_score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name, description="Bundled drawings and their names.", type=kind, category=category,
        modalities=modalities, main_score=main_score, dataset={"path": "local/concepts", "revision": "1"},
        eval_splits=["test"], eval_langs=["eng-Latn"], bibtex_citation="", **dict.fromkeys(UNSTATED),
    )  # fmt: skip


def concepts() -> datasets.Dataset:
    """The first pictures whose names differ."""
    table = datasets.Dataset.from_parquet(str(CONCEPTS), keep_in_memory=True)
    first = {caption.lower(): row for row, caption in reversed(list(enumerate(table["caption"])))}
    return table.select(sorted(first.values())[:PICTURES])


def retrieval(queries: datasets.Dataset, corpus: datasets.Dataset) -> dict[str, Any]:
    ids = [str(row) for row in range(len(queries))]
    split = {
        "queries": queries.add_column("id", ids),
        "corpus": corpus.add_column("id", ids),
        "relevant_docs": {row: {row: 1} for row in ids},
        "top_ranked": None,
    }
    return {"default": {"test": split}}


class NameToKeywords(AbsTaskRetrieval):
    """Text retrieval: find the keywords of a name."""

    metadata: ClassVar = metadata("NameToKeywords", "Retrieval", "t2t", ["text"], "recall_at_1")

    def load_data(self, **kwargs: Any) -> None:
        table = concepts().remove_columns("image")
        queries = table.select_columns("caption").rename_column("caption", "text")
        corpus = table.select_columns("keywords").rename_column("keywords", "text")
        self.dataset = retrieval(queries, corpus)
        self.data_loaded = True


class NameToPicture(AbsTaskRetrieval):
    """Image-text retrieval: find the picture of a name."""

    metadata: ClassVar = metadata("NameToPicture", "Any2AnyRetrieval", "t2i", ["text", "image"], "recall_at_1")

    def load_data(self, **kwargs: Any) -> None:
        table = concepts()
        queries = table.select_columns("caption").rename_column("caption", "text")
        self.dataset = retrieval(queries, table.select_columns("image").add_column("modality", ["image"] * len(table)))
        self.data_loaded = True


def scores(model: SentenceTransformer, task: AbsTask) -> dict[str, Any]:
    """Measure by the wrapper that mteb makes of a model, which takes it for one of texts alone."""
    encoder = SentenceTransformerEncoderWrapper(model)
    meta = {"name": "owner/name", "revision": "1", "modalities": ["text", "image"]}
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update=meta)
    result = mteb.evaluate(encoder, task, cache=None, co2_tracker=False, encode_kwargs={"batch_size": 7})
    return result.task_results[0].scores["test"][0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("mteb") / "llm2clip-tiny"
    tiny.save(folder)
    write_sentence_transformers_files(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return load_encoder(str(folder), device="cpu")


def test_retrieval_equals_our_metrics(model: SentenceTransformer, encoder: Encoder) -> None:
    table = concepts()
    images = encoder.encode_image(table["image"][:])
    names, keywords = (encoder.encode_text(table[column][:]) for column in ("caption", "keywords"))
    for task, candidates in ((NameToKeywords(), keywords), (NameToPicture(), images)):
        found, expected = scores(model, task), caption_retrieval_metrics(names, candidates)
        assert 0 < expected["recall@10"] < 1
        for k in (1, 5, 10):
            assert found[f"recall_at_{k}"] == pytest.approx(expected[f"recall@{k}"], abs=1e-5)

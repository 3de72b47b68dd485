"""mteb evaluates the folder of a model on local tasks with real captions and pictures, offline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

import datasets
import huggingface_hub
import mteb
import pytest
import torch
from mteb.abstasks import AbsTask
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification
from torch.nn import functional as F
from transformers import AutoImageProcessor

from llm2clip.evaluation import caption_retrieval_metrics, retrieval_metrics
from llm2clip.evaluation.mteb_encoder import LLM2CLIPEncoder
from tests.modeling_llm2clip import tiny

CONCEPTS = Path(__file__).parents[3] / "examples" / "data" / "concepts" / "test.parquet"
PICTURES = 40


def metadata(name: str, kind: str, category: str, modalities: list[str], main_score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        description="Bundled drawings and their names.",
        type=kind,
        category=category,
        modalities=modalities,
        main_score=main_score,
        dataset={"path": "local/concepts", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        reference=None,
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation="",
    )


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


class PictureNaming(AbsTaskZeroShotClassification):
    """Zero-shot classification: the name of a picture among all names."""

    metadata: ClassVar = metadata("PictureNaming", "ZeroShotClassification", "i2t", ["image", "text"], "accuracy")

    def load_data(self, **kwargs: Any) -> None:
        table = concepts()
        split = table.select_columns("image").add_column("label", list(range(len(table))))
        self.dataset = datasets.DatasetDict({"test": split})
        self.data_loaded = True

    def get_candidate_labels(self) -> list[str]:
        return concepts()["caption"][:]


class PictureAndNameToPicture(AbsTaskRetrieval):
    """Queries of both modalities."""

    metadata: ClassVar = metadata("PictureAndName", "Any2AnyRetrieval", "it2i", ["text", "image"], "recall_at_1")

    def load_data(self, **kwargs: Any) -> None:
        table = concepts()
        queries = table.select_columns(["caption", "image"]).rename_column("caption", "text")
        self.dataset = retrieval(queries, table.select_columns("image"))
        self.data_loaded = True


def scores(encoder: LLM2CLIPEncoder, task: AbsTask, **options: Any) -> dict[str, Any]:
    result = mteb.evaluate(encoder, task, **{"cache": None, "co2_tracker": False, **options})
    return result.task_results[0].scores["test"][0]


@pytest.fixture(scope="module")
def encoder(saved_model: Path) -> LLM2CLIPEncoder:
    return LLM2CLIPEncoder(str(saved_model), device="cpu")


def test_text_retrieval_equals_our_metrics(encoder: LLM2CLIPEncoder) -> None:
    found = scores(encoder, NameToKeywords())
    table = concepts()
    names, keywords = (encoder.model.encode_text(table[column][:]) for column in ("caption", "keywords"))
    expected = caption_retrieval_metrics(names, keywords)
    assert expected["recall@1"] > 2 / PICTURES
    for k in (1, 5, 10):
        assert found[f"recall_at_{k}"] == pytest.approx(expected[f"recall@{k}"], abs=1e-5)


def test_image_text_retrieval_equals_our_metrics(encoder: LLM2CLIPEncoder) -> None:
    found = scores(encoder, NameToPicture(), encode_kwargs={"batch_size": 7})
    table = concepts()
    images = encoder.model.encode_image(table["image"][:])
    texts = encoder.model.encode_text(table["caption"][:])
    expected = retrieval_metrics(images, texts, torch.arange(PICTURES)[:, None].expand(-1, 2))
    assert 0 < expected["text_to_image_recall@10"] < 1
    for k in (1, 5, 10):
        assert found[f"recall_at_{k}"] == pytest.approx(expected[f"text_to_image_recall@{k}"], abs=1e-5)


def test_zero_shot_classification_equals_the_nearest_caption(encoder: LLM2CLIPEncoder) -> None:
    found = scores(encoder, PictureNaming())
    table = concepts()
    images = encoder.model.encode_image(table["image"][:])
    texts = encoder.model.encode_text(table["caption"][:])
    right = (images @ texts.t()).argmax(dim=1) == torch.arange(PICTURES)
    assert found["accuracy"] == pytest.approx(right.float().mean().item())


def test_embedding_of_an_image_with_a_text_is_their_sum(encoder: LLM2CLIPEncoder) -> None:
    found = scores(encoder, PictureAndNameToPicture())
    table = concepts()
    images = encoder.model.encode_image(table["image"][:])
    texts = encoder.model.encode_text(table["caption"][:])
    expected = caption_retrieval_metrics(images + texts, images)
    assert found["recall_at_1"] == pytest.approx(expected["recall@1"], abs=1e-5)


def test_text_tower_is_a_model_for_texts_only(tmp_path: Path) -> None:
    tower, tokenizer = tiny.text_model(), tiny.processor().tokenizer
    tower.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = LLM2CLIPEncoder(str(tmp_path), device="cpu")
    assert encoder.mteb_model_meta.modalities == ["text"]
    table = concepts()
    names, keywords = (tower.encode(table[column][:], tokenizer) for column in ("caption", "keywords"))
    expected = caption_retrieval_metrics(names, keywords)["recall@1"]
    assert scores(encoder, NameToKeywords())["recall_at_1"] == pytest.approx(expected, abs=1e-5)


def test_cached_results_belong_to_weights_not_to_the_folder_name(saved_model: Path, tmp_path: Path) -> None:
    cache = mteb.ResultCache(tmp_path / "cache")
    first = LLM2CLIPEncoder(str(saved_model), device="cpu")
    before = scores(first, NameToKeywords(), cache=cache)
    torch.manual_seed(1)
    tiny.save(tmp_path / saved_model.name)
    other = LLM2CLIPEncoder(str(tmp_path / saved_model.name), device="cpu")
    assert other.mteb_model_meta.name == first.mteb_model_meta.name == "local/llm2clip-tiny"
    assert scores(other, NameToKeywords(), cache=cache)["ndcg_at_10"] != before["ndcg_at_10"]
    again = LLM2CLIPEncoder(str(saved_model), device="cpu")
    kept = scores(again, NameToKeywords(), cache=cache, overwrite_strategy="only-cache")
    assert kept["ndcg_at_10"] == before["ndcg_at_10"]


def batches(**columns: list[Any]) -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(datasets.Dataset.from_dict(columns), batch_size=2)


def test_images_are_resized_with_pillow(saved_model: Path) -> None:
    assert AutoImageProcessor.from_pretrained(saved_model).backend != "pil"
    assert LLM2CLIPEncoder(str(saved_model), device="cpu").encoder.transform.image_processor.backend == "pil"


def test_empty_texts_are_refused_or_rows_of_zeros(saved_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["a small dog", " ", "a red bus", ""]
    encoder = LLM2CLIPEncoder(str(saved_model), device="cpu")
    task = NameToKeywords.metadata
    with pytest.raises(ValueError, match="2 of 4 texts of task NameToKeywords are empty; with on_empty='skip'"):
        encoder.encode(batches(text=texts), task_metadata=task)
    skipping = LLM2CLIPEncoder(str(saved_model), device="cpu", on_empty="skip")
    rows = skipping.encode(batches(text=texts), task_metadata=task)
    assert "2 of 4 texts of task NameToKeywords are empty" in caplog.text
    assert rows[1].count_nonzero() == rows[3].count_nonzero() == 0
    torch.testing.assert_close(rows[[0, 2]], encoder.model.encode_text(["a small dog", "a red bus"]))


def test_unsupported_models_and_inputs_are_refused(saved_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_empty must be 'raise' or 'skip', not 'drop'"):
        LLM2CLIPEncoder(str(saved_model), on_empty="drop")
    tiny.decoder_config().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"is not an LLM2CLIP model, a text tower or .*: it contains model_type 'llama'"
    ):
        LLM2CLIPEncoder(str(tmp_path))
    vision = LLM2CLIPEncoder(str(saved_model), device="cpu", text_model=False)
    assert vision.mteb_model_meta.modalities == ["image"]
    task = NameToKeywords.metadata
    with pytest.raises(ValueError, match="loaded without its LLM"):
        vision.encode(batches(text=["a dog"]), task_metadata=task)
    with pytest.raises(ValueError, match="precision 'int8' is not available"):
        vision.encode(batches(text=["a dog"]), task_metadata=task, precision="int8")
    with pytest.raises(ValueError, match="neither texts nor images"):
        vision.encode(batches(audio=["a dog"]), task_metadata=task)


def test_embeddings_have_unit_length(encoder: LLM2CLIPEncoder) -> None:
    rows = encoder.encode(batches(text=tiny.CAPTIONS), task_metadata=NameToKeywords.metadata)
    torch.testing.assert_close(rows, F.normalize(rows, dim=-1))


def test_hub_models_are_identified_by_commit(
    saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is in the layout of the Hub cache and is read offline."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--llm2clip-tiny"
    shutil.copytree(saved_model, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    meta = LLM2CLIPEncoder("someone/llm2clip-tiny", device="cpu").mteb_model_meta
    assert (meta.name, meta.revision) == ("someone/llm2clip-tiny", commit)

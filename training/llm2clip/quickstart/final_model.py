"""The model at the end of the quickstart: its folder, and what it finds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoProcessor

from llm2clip.data.table_identity import data_revision
from llm2clip.encoders.stored import StoredEncoder
from llm2clip.evaluation.data import RetrievalData
from llm2clip.evaluation.session import Session
from llm2clip.hub import build
from llm2clip.hub.cards.facts import Evaluation, public_name
from llm2clip.quickstart.config import Arm
from llm2clip.quickstart.data import BUNDLED
from llm2clip.quickstart.image_steps import step_name, stored_encoder
from llm2clip.quickstart.run_context import RunContext
from llm2clip.search.top_k import top_k
from modeling_llm2clip import LLM2CLIPModel

NAME = "llm2clip-quickstart"
# What somebody would type, and which of the bundled test pictures are right for it: judged once, and committed.
TYPED_QUERIES, SHOWN = BUNDLED / "typed_queries.json", 5


class FinalModel(NamedTuple):
    """The model at the end, and the test images as it embeds them.

    Attributes:
        model, processor: The model with its text encoder, and its processor.
        encoder: The model, with the embeddings of captions that are stored.
        retrieval: The test set.
        image_embeds, rows: Unit embeddings of the readable images, and their row numbers.
    """

    model: Any
    processor: Any
    encoder: StoredEncoder
    retrieval: RetrievalData
    image_embeds: Tensor
    rows: list[int]


def build_final(run: RunContext, arm: Arm, test: dict[str, Any], folder: Path, resume: bool) -> dict[str, Any]:
    """Build a folder that bundles the text encoder, with the test results on its card.

    Args:
        test: The metrics of each kind of queries.
    """
    data, trained = run.data, run.folder / step_name(arm)
    revision, columns = data_revision(data.path), data.queries(arm.kind)
    evaluations = [
        Evaluation("image-text retrieval", public_name(data.path), data.test, revision, metrics, note=columns[name])
        for name, metrics in test.items()
    ]
    retrieval = RetrievalData.from_source(data.test_source())
    example = run.folder / "example.png"
    retrieval.image(0).save(example)
    settings = build.BuildConfig(
        model=str(trained),
        destination=str(folder),
        bundle_text_model=True,
        name=NAME,
        example_image=str(example),
        example_captions=retrieval.texts[:3],
        overwrite=True,
    )
    build.run(settings, evaluations)
    return {"name": settings.name}


def open_final(run: RunContext, arm: Arm, folder: Path) -> FinalModel:
    """Open the model at the end; its images come from their stored features."""
    retrieval = RetrievalData.from_source(run.data.test_source())
    model: Any = LLM2CLIPModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    encoder = stored_encoder(run, arm, model, processor, retrieval.images)
    embeds = Session(encoder, on_error="skip", show_progress_bar=False).embed_images(retrieval.images)
    rows = (~embeds.isnan().any(dim=1)).nonzero()[:, 0]
    return FinalModel(model, processor, encoder, retrieval, embeds[rows], rows.tolist())


@torch.no_grad()
def sample_logits(final: FinalModel) -> dict[str, Any]:
    """Compute a few logits, to compare a model that is loaded elsewhere with."""
    captions, images = final.retrieval.texts[:4], [final.retrieval.image(row) for row in range(4)]
    output = final.model(**final.processor(text=captions, images=images, return_tensors="pt"))
    return {
        "captions": captions,
        "images": "the first four of the test split",
        "logits_per_image": output.logits_per_image.tolist(),
    }


def search_typed(final: FinalModel) -> dict[str, Any]:
    """Search the test pictures with the typed queries, whose right pictures are named by their captions.

    Returns:
        The number of `queries`; those whose `first` picture is right, and those with a right one `found` among the
        first `shown`; and of each query the rows that it finds, and whether they are right, as `results`.
    """
    typed = json.loads(TYPED_QUERIES.read_text(encoding="utf-8"))
    embeds = final.model.encode_text([entry["query"] for entry in typed], final.processor)
    results = []
    for entry, images in zip(typed, top_k(embeds, final.image_embeds, SHOWN)[1].tolist(), strict=True):
        rows = [final.rows[image] for image in images]
        right = [bool(set(final.retrieval.captions_of(row)) & set(entry["captions"])) for row in rows]
        results.append({"query": entry["query"], "rows": rows, "right": right})
    return {
        "queries": len(results),
        "first": sum(result["right"][0] for result in results),
        "found": sum(any(result["right"]) for result in results),
        "shown": SHOWN,
        "results": results,
    }

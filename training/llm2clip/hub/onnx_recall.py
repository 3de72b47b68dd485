"""How well exported graphs find images, beside torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from llm2clip.encoders import Encoder
from llm2clip.evaluation.metrics import KS, retrieval_metrics
from llm2clip.evaluation.own_data import retrieval_sets
from llm2clip.hub.onnx_writing import graph_rows
from llm2clip.utils.progress import track

RECALLS = [f"text_to_image_recall@{k}" for k in KS]


def compare_recall(
    encoder: Encoder,
    files: Mapping[str, Path],
    tokenize: Callable[[str], list[np.ndarray]],
    sources: Mapping[str, Any],
) -> dict[str, float]:
    """Measure text to image retrieval with torch and with exported graphs, each text and image by itself.

    Args:
        encoder: The model in torch, which also prepares the images.
        files: Files of the graphs: `text` and `vision`.
        tokenize: Makes the inputs of the graph of texts.
        sources: See [`retrieval_sets`].

    Returns:
        `SET_KIND_text_to_image_recall@K`. KIND is `torch`; `exported`; and `exported_texts`, which are those of the
        graph among images of torch, such as those of an index.
    """
    found: dict[str, float] = {}
    galleries: dict[int, list[Tensor]] = {}
    for name, data in retrieval_sets(sources).items():
        rows, width = range(len(data.images)), encoder.width
        if id(data.images) not in galleries:
            images = encoder.encode_image_rows(data.images, rows, show_progress_bar=True).embeds
            pixels = (
                [encoder.prepare(data.image(row), data.images.key(row))["pixel_values"][None].numpy()]
                for row in track(rows, "Images through the graph", "image")
            )
            galleries[id(data.images)] = [images, graph_rows(files["vision"], pixels)[:, :width]]
        images, exported_images = galleries[id(data.images)]
        tokens = (tokenize(text) for text in track(data.texts, "Texts through the graph", "text"))
        exported_texts = graph_rows(files["text"], tokens)[:, :width]  # without the zeros of some layouts
        for kind, gallery, queries in (
            ("torch", images, encoder.encode_text(data.texts)),
            ("exported_texts", images, exported_texts),
            ("exported", exported_images, exported_texts),
        ):
            metrics = retrieval_metrics(gallery, queries, data.pairs)
            found |= {f"{name}_{kind}_{recall}": metrics[recall] for recall in RECALLS}
    return found

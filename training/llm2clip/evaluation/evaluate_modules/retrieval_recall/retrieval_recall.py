"""Retrieval between images and captions, from embeddings, for the evaluate library."""

# evaluate parses these lines to find the required packages; it understands one import per line.
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch

from llm2clip.evaluation import retrieval_metrics

DESCRIPTION = """Recall@k, mean and median rank in both directions between images and captions, by cosine similarity.
A text is a hit if any image that it belongs to is among the first k images; an image is a hit if any of its texts is
among the first k texts. Ties count by their expected value."""

INPUTS = """
Args:
    text_embeds: One text embedding per pair of a text and an image that belong together.
    image_embeds: The image embedding of each pair.
    image_ids: Identifier of the image of each row, if an image has several texts: numbers or strings, such as file
        names. An argument of compute(), also after add_batch().
    text_ids: Identifier of the text of each row, if a text has several images: numbers or strings.
    ks: Values of k for recall@k; (1, 5, 10) by default.
Returns:
    `text_to_image_recall@K`, `image_to_text_recall@K` (0 to 1), `_mean_rank` and `_median_rank` of both
    directions (from 1), `num_texts`, `num_images`.
Examples:
    >>> metric = evaluate.load(metric_path("retrieval_recall"))
    >>> metric.compute(text_embeds=texts, image_embeds=images, image_ids=[0, 0, 1, 1])
"""
EMBEDDING = datasets.Sequence(datasets.Value("float32"))


class RetrievalRecall(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"text_embeds": EMBEDDING, "image_embeds": EMBEDDING}),
        )

    def _compute(self, text_embeds, image_embeds, image_ids=None, text_ids=None, ks=(1, 5, 10)):
        texts, text_rows = _distinct(torch.tensor(text_embeds), text_ids, "text_ids")
        images, image_rows = _distinct(torch.tensor(image_embeds), image_ids, "image_ids")
        qrels = torch.stack([text_rows, image_rows], dim=1).unique(dim=0)
        metrics = retrieval_metrics(images, texts, qrels, ks=ks)
        # Rows are pairs: every image has a text.
        del metrics["num_images_with_text"]
        return metrics


def _distinct(embeds: torch.Tensor, ids: Sequence[int | str] | None, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first embedding of each id, and the index of each row into them."""
    if ids is None:
        return embeds, torch.arange(len(embeds))
    if len(ids) != len(embeds):
        raise ValueError(f"there are {len(embeds)} rows, but {name} has {len(ids)} ids; pass one id per row.")
    _, first, rows = np.unique(np.asarray(ids), return_index=True, return_inverse=True)
    return embeds[torch.from_numpy(first)], torch.from_numpy(rows)

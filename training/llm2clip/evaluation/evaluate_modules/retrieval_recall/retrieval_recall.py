"""Retrieval between images and captions, from embeddings, for the evaluate library."""

# evaluate reads these lines to find out what has to be installed; it knows one import to a line.
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch

from llm2clip.evaluation import retrieval_metrics

DESCRIPTION = """Recall@k, mean and median rank in both directions between images and captions, by cosine similarity.
A text counts as hit if any image that it belongs to is among the first k images, an image if any of its texts is among
the first k texts. Ties count by their expected value."""

INPUTS = """
Args:
    text_embeds: One text embedding per pair of a text and an image that belong together.
    image_embeds: The image embedding of each pair.
    image_ids: For every row, which image that is, where one image has several texts: numbers or strings, such as file
        names. Goes to compute(), also after add_batch().
    text_ids: For every row, which text that is, where one text has several images: numbers or strings.
    ks: The k of recall@k; (1, 5, 10) by default.
Returns:
    `text_to_image_recall@K`, `image_to_text_recall@K` (shares, 0 to 1), `_mean_rank` and `_median_rank` of both
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
        matches = torch.stack([text_rows, image_rows], dim=1).unique(dim=0)
        metrics = retrieval_metrics(images, texts, matches, ks=ks)
        # Every image has a text here, since the rows are pairs.
        del metrics["num_images_with_text"]
        return metrics


def _distinct(embeds: torch.Tensor, ids: Sequence[int | str] | None, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first embedding of every id, and each row's index into them."""
    if ids is None:
        return embeds, torch.arange(len(embeds))
    if len(ids) != len(embeds):
        raise ValueError(f"there are {len(embeds)} rows, but {name} has {len(ids)}; give one id for every row.")
    _, first, rows = np.unique(np.asarray(ids), return_index=True, return_inverse=True)
    return embeds[torch.from_numpy(first)], torch.from_numpy(rows)

"""R7: recall@k in both directions, which every evaluation during training computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work

WIDTH = 512
CAPTIONS = 5
KS = (1, 5, 10)
# Duplicate images without captions: equal scores among wrong images, for every caption.
DISTRACTORS = 20
# Every tenth image has two equal captions: equal scores among its right texts, and among wrong texts of others.
REPEATED = 10
# With this seed, no score at rank k is within 1e-6 of the next one, so that rounding does not affect the hits.
SEED = 0
# Default of the CLIP_benchmark command.
BATCH = 64


def _embeddings(images: int) -> tuple:
    """Generate unit embeddings of images and texts, and the image of each text; recalls are between 0.3 and 0.9."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    seen = torch.randn(images, WIDTH, generator=generator)
    captioned = torch.arange(images - DISTRACTORS)
    seen[-DISTRACTORS // 2 :] = seen[-DISTRACTORS : -DISTRACTORS // 2]
    owner = captioned.repeat_interleave(CAPTIONS)
    noise = torch.randn(len(owner), WIDTH, generator=generator)
    repeated = torch.arange(0, len(owner), CAPTIONS * REPEATED)
    noise[repeated + 1] = noise[repeated]
    written = seen[owner] + 6 * noise
    return torch.nn.functional.normalize(seen, dim=1), torch.nn.functional.normalize(written, dim=1), owner


def _contestant(make_measure: Callable[[], Callable], images: int) -> Work:
    measure = make_measure()
    inputs = _embeddings(images)
    # A small warm-up loads the code of the libraries, which must not count as memory of the work.
    measure(*_embeddings(4 * DISTRACTORS))

    def work() -> Outcome:
        return Outcome({"hits": measure(*inputs)})

    return work


def _ours() -> Callable:
    import torch

    from llm2clip.evaluation import retrieval_metrics

    def measure(seen: Any, written: Any, owner: Any) -> list[float]:
        matches = torch.stack([torch.arange(len(owner)), owner], dim=1)
        metrics = retrieval_metrics(seen, written, matches, KS)
        hits = [metrics[f"text_to_image_recall@{k}"] * metrics["num_texts"] for k in KS]
        hits += [metrics[f"image_to_text_recall@{k}"] * metrics["num_images_with_text"] for k in KS]
        return [round(count, 2) for count in hits]

    return measure


def _clip_benchmark() -> Callable:
    """The part of `clip_benchmark.metrics.zeroshot_retrieval.evaluate` after the encoding."""
    import torch
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    def measure(seen: Any, written: Any, owner: Any) -> list[float]:
        scores = written @ seen.t()
        positive_pairs = torch.zeros_like(scores, dtype=torch.bool)
        positive_pairs[torch.arange(len(scores)), owner] = True
        hits = []
        for of_queries, pairs in ((scores, positive_pairs), (scores.T, positive_pairs.T)):
            for k in KS:
                recall = (batchify(recall_at_k, of_queries, pairs, BATCH, "cpu", k=k) > 0).float().mean().item()
                hits.append(round(recall * len(of_queries), 2))
        return hits

    return measure


def contests(device: str) -> list[Contest]:
    note = (
        "Right texts (repeated captions) and wrong images (repeated pictures without a caption) have equal scores, so "
        "that hits do not depend on how a sort orders them."
    )
    contests_of_row = []
    for images, time, rounds in ((1000, 0.1, 3), (5000, 0.033, 3)):
        contestants = {
            "ours": Contestant(partial(_contestant, _ours, images)),
            "CLIP_benchmark": Contestant(partial(_contestant, _clip_benchmark, images)),
        }
        goals = (Goal("CLIP_benchmark", "cpu", time), Goal("CLIP_benchmark", "memory", 0.1))
        title = f"{images:,} images x {images * CAPTIONS:,} texts"
        contests_of_row.append(Contest(title, contestants, goals, {"hits": 0.0}, rounds, note=note))
    return contests_of_row


ROW = Row("R7", "recall@1, 5, 10 in both directions, width 512, with equal scores", contests)

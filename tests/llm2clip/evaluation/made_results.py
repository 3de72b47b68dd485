"""Results that were not measured, for tests of what is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm2clip.evaluation.results import Result

RETRIEVAL = {
    "id": "retrieval",
    "name": "retrieval",
    "positives": "rows",
    "ties": "expected value",
    "text_format": "raw",
}
ZERO_SHOT = {
    "id": "zero-shot-classification",
    "name": "zero-shot classification",
    "templates": "openai-80",
    "text_format": "raw",
}
COMPARED = ["image_to_text_recall@1", "text_to_image_recall@1"]


def retrieval(given: str, benchmark: str = "urban1k", t2i: float = 0.5, i2t: float = 0.25, **fields: Any) -> Result:
    """A result of retrieval; recall@5 and 10 are 10 and 20 points higher."""
    scores = {
        f"{side}_recall@{k}": value + more
        for side, value in (("text_to_image", t2i), ("image_to_text", i2t))
        for k, more in ((1, 0.0), (5, 0.1), (10, 0.2))
    }
    intervals = {name: [value - 0.03, value + 0.02] for name, value in scores.items()}
    lengths = {"17-32": t2i, "513-": t2i + 0.2, "129-256": t2i + 0.1}
    values: dict[str, Any] = {
        "benchmark": benchmark,
        "title": {"urban1k": "Urban1k", "docci": "DOCCI"}.get(benchmark, benchmark),
        "model": {"given": given, "library": "transformers", "fingerprint": "f" * 16},
        "protocol": dict(RETRIEVAL),
        "scores": scores,
        "compared": COMPARED,
        "intervals": intervals,
        "counts": {"images": 1000, "texts": 1000, "truncated_texts": 12, "tied_text_queries": 3},
        "data": {"folder": "/data/urban", "checksum": "0123456789abcdef"},
        "setup": {"protocol": "retrieval", "options": {}, "text_format": "raw"},
        "groups": {"length": {name: {"texts": 5, "text_to_image_recall@1": v} for name, v in lengths.items()}},
    }
    return Result(**{**values, **fields})


def classification(given: str, top1: float = 0.5, **fields: Any) -> Result:
    """A result of zero-shot classification of ImageNet."""
    values: dict[str, Any] = {
        "title": "ImageNet-1k",
        "protocol": dict(ZERO_SHOT),
        "compared": ["top1"],
        "scores": {"top1": top1, "top5": top1 + 0.2, "mean_per_class": top1},
        "intervals": {"top1": [top1 - 0.01, top1 + 0.01]},
        "counts": {"images": 50000, "classes": 1000, "tied_images": 7},
        "setup": {"protocol": "zero-shot-classification", "options": {}, "text_format": "raw"},
        "groups": {"class": {"tench": {"top1": 0.5, "images": 2}}},
    }
    return retrieval(given, "imagenet-1k", **{**values, **fields})


def written(folder: Path, *results: Result) -> list[str]:
    """Write results as numbered files."""
    paths = [folder / f"{number}.json" for number, _ in enumerate(results)]
    for path, result in zip(paths, results, strict=True):
        result.write(path)
    return [str(path) for path in paths]

"""Evaluation: retrieval between images and captions, and between captions."""

from .caption_pairs import CaptionRetrieval
from .image_text import ImageTextRetrieval
from .metrics import metric_path
from .retrieval import caption_retrieval_metrics, rank_of_best_match, retrieval_metrics

__all__ = [
    "CaptionRetrieval",
    "ImageTextRetrieval",
    "caption_retrieval_metrics",
    "metric_path",
    "rank_of_best_match",
    "retrieval_metrics",
]

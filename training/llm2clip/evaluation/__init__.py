"""Retrieval metrics and protocols, between images and captions and between captions."""

from llm2clip.evaluation.caption_pairs import CaptionRetrieval
from llm2clip.evaluation.evaluate_modules import metric_path
from llm2clip.evaluation.image_text import ImageTextRetrieval
from llm2clip.evaluation.metrics import caption_retrieval_metrics, retrieval_metrics

__all__ = [
    "CaptionRetrieval",
    "ImageTextRetrieval",
    "caption_retrieval_metrics",
    "metric_path",
    "retrieval_metrics",
]

"""Evaluation: metrics, protocols, benchmarks, and the results of models on them."""

from llm2clip.evaluation.evaluate_modules import metric_path
from llm2clip.evaluation.metrics import caption_retrieval_metrics, retrieval_metrics

__all__ = ["caption_retrieval_metrics", "metric_path", "retrieval_metrics"]

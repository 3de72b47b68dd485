"""How benchmarks are measured: each protocol turns a session and the data of a benchmark into scores."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from llm2clip.command_line.settings import nearest
from llm2clip.evaluation.benchmark import BenchmarkProtocol

# Module and class of each protocol by its id, which results keep. Only what is measured is imported.
PROTOCOLS = {
    "retrieval": ("retrieval", "RetrievalProtocol"),
    "multilingual-retrieval": ("retrieval", "MultilingualRetrieval"),
    "graded-recall": ("graded", "GradedRecall"),
    "graded-precision": ("graded", "GradedPrecision"),
    "caption-retrieval": ("caption_retrieval", "CaptionRetrievalAccuracy"),
    "zero-shot-classification": ("classification", "ZeroShotClassification"),
    "linear-probe-sgd": ("linear_probe", "LinearProbe"),
    "mean-of-sets": ("mean_of_sets", "MeanOfSets"),
    "pair-scores": ("choices", "PairScores"),
    "image-choice": ("choices", "ImageChoice"),
    "caption-choice": ("choices", "CaptionChoice"),
    "maskclip-segmentation": ("segmentation", "MaskCLIPSegmentation"),
}


def open_protocol(protocol: str | BenchmarkProtocol, options: Mapping[str, Any]) -> BenchmarkProtocol:
    """Make the protocol of a benchmark.

    Args:
        protocol: An id of `PROTOCOLS`, or an object with `measure(session, data)`, which is returned as it is.
        options: Arguments of the protocol of an id.

    Raises:
        ValueError: There is no such protocol.
    """
    if not isinstance(protocol, str):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"there is no protocol {protocol!r}{nearest(protocol, PROTOCOLS)}")
    module, name = PROTOCOLS[protocol]
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)(**options)

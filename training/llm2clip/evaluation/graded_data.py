"""COCO images and captions with the pairs that human judges found right, from the package `eccv_caption`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from llm2clip.evaluation.data import RetrievalData

PACKAGE = "eccv_caption"
# Right candidates of each query, by their ids in COCO.
Qrels = dict[int, list[int]]


@dataclass
class GradedData(RetrievalData):
    """Images and captions, of which those with judgements are queries.

    Attributes:
        image_ids, text_ids: The ids in COCO of the images and of the texts.
        text_qrels: Images that are right for a caption.
        image_qrels: Captions that are right for an image. Judges saw other candidates in the two directions, so that
            these need not be the same pairs. One that is not in the corpus is right all the same, and never found.
    """

    image_ids: list[int] = field(default_factory=list)
    text_ids: list[int] = field(default_factory=list)
    text_qrels: Qrels = field(default_factory=dict)
    image_qrels: Qrels = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Numbers of images and texts, of queries of both kinds, and of what is right for them."""
        return super().counts() | {
            "text_queries": len(self.text_qrels),
            "image_queries": len(self.image_qrels),
            "right_images": sum(map(len, self.text_qrels.values())),
            "right_texts": sum(map(len, self.image_qrels.values())),
        }


def eccv_caption() -> Any:
    """Import the module of metrics and judgements of `eccv_caption`.

    Raises:
        ImportError: The package is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # json is as good as ujson
            from eccv_caption import metrics
    except ImportError as error:
        raise ImportError(f"ECCV Caption and CxC need {PACKAGE}: pip install 'llm2clip[eval]'.") from error
    return metrics

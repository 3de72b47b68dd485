"""Reader of COCO images and captions with the pairs that human judges found right, from the package `eccv_caption`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from llm2clip.evaluation.benchmarks.parquet import Parquet
from llm2clip.evaluation.data import RetrievalData
from llm2clip.evaluation.graded_data import GradedData, Qrels, eccv_caption


def read_graded(folder: Path, judgements: Literal["eccv_gts", "cxc_gts"], captions: Parquet) -> GradedData:
    """Read the Karpathy test split, with the five captions of each image that the package has.

    Args:
        judgements: The attribute of `eccv_caption.Metrics` that holds them.
        captions: How images, captions and their ids are read.
    """
    assert isinstance(captions.image, str)
    assert captions.image_id is not None
    assert captions.text_ids is not None
    known = eccv_caption().Metrics()
    corpus = {caption for five in known.coco_gts["i2t"].values() for caption in five}
    table = captions.table(folder)
    rows = zip(table[captions.text_ids], captions.captions(table), strict=True)
    pairs = [
        [(int(number), text) for number, text in zip(ids, texts, strict=True) if number in corpus]
        for ids, texts in rows
    ]
    data = RetrievalData.from_captions(
        captions.images(table, captions.image), [[text for _, text in own] for own in pairs]
    )
    image_ids, text_ids = [*map(int, table[captions.image_id])], [number for own in pairs for number, _ in own]
    qrels: dict[str, Qrels] = getattr(known, judgements)
    return GradedData(
        data.images,
        data.texts,
        data.owners,
        image_ids=image_ids,
        text_ids=text_ids,
        text_qrels={number: qrels["t2i"][number] for number in text_ids if number in qrels["t2i"]},
        image_qrels={number: qrels["i2t"][number] for number in image_ids if number in qrels["i2t"]},
    )

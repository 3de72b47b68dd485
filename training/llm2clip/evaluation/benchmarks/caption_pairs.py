"""CRA on COCO: the first two captions of each of the 5,000 images of the Karpathy test split."""

from __future__ import annotations

from pathlib import Path

from llm2clip.evaluation.benchmarks.base import Benchmark, BenchmarkError
from llm2clip.evaluation.benchmarks.coco import FOLDER, KARPATHY_FILES, LLM2CLIP_FILES, SALESFORCE_FILES
from llm2clip.evaluation.benchmarks.data import CaptionPairData
from llm2clip.evaluation.benchmarks.files import first_file
from llm2clip.evaluation.benchmarks.karpathy import karpathy_captions
from llm2clip.evaluation.benchmarks.salesforce import salesforce_captions
from llm2clip.evaluation.protocols.caption_retrieval import CaptionRetrievalAccuracy

TITLE = "CRA, COCO 5k"


def read(folder: Path) -> CaptionPairData:
    """Read the captions from the file of Salesforce, or of Karpathy if that is not there; images are not needed.

    Raises:
        BenchmarkError: A row is broken, or an image has one caption.
    """
    file = first_file(folder, (*SALESFORCE_FILES, *KARPATHY_FILES, *LLM2CLIP_FILES))
    is_karpathy = any(file == folder / name for name in KARPATHY_FILES)
    captions = (karpathy_captions if is_karpathy else salesforce_captions)(file)
    single = [image for image, texts in captions if len(texts) < 2]
    if single:
        raise BenchmarkError(f"{TITLE} needs two captions of each image; {single[0]} of {file} has fewer.")
    return CaptionPairData([texts[0] for _, texts in captions], [texts[1] for _, texts in captions])


BENCHMARKS = [
    Benchmark(
        name="cra",
        title=TITLE,
        groups=("paper",),
        folder=FOLDER,
        marker=SALESFORCE_FILES[0],
        other_markers=(*SALESFORCE_FILES[1:], *KARPATHY_FILES),
        own_markers=LLM2CLIP_FILES,
        files="coco_karpathy_test.json or dataset_coco.json; no images",
        counts={"pairs": 5000},
        license="CC BY 4.0",
        source="As coco-salesforce or coco-karpathy.",
        read=read,
        protocol=CaptionRetrievalAccuracy(),
        note="Its published numbers changed from 73.0 to 29.5 between versions: compare only what was measured alike.",
    )
]

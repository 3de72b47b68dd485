"""R8: from the bytes of a JPEG to the input of the vision tower."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work

COUNT = 48
SIZE = 336
SETTINGS: dict[str, Any] = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
# Two of 255 grey levels, relative to the largest magnitude of a normalised pixel, which is about 2
GREY_LEVELS = 0.02


def _photographs() -> list[bytes]:
    """Crop parts of two photographs, 500 to 1,500 pixels long.

    open_clip and transformers round an odd crop offset in different directions; only even ones can be compared.
    """
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    generator = np.random.default_rng(0)
    found: list[bytes] = []
    while len(found) < COUNT:
        photograph = photographs[len(found) % 2]
        width, height = (int(side * generator.uniform(0.6, 1)) for side in photograph.size)
        left, top = (int(generator.integers(0, side)) for side in (641 - width, 428 - height))
        part = photograph.crop((left, top, left + width, top + height))
        scale = generator.integers(500, 1501) / max(part.size)
        size = (round(width * scale), round(height * scale))
        if int(SIZE * max(size) / min(size)) % 2:
            continue
        file = io.BytesIO()
        part.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        found.append(file.getvalue())
    return found


def _work(make: Callable[[], Callable[[bytes], Any]]) -> Work:
    import torch

    images, prepare = _photographs(), make()
    pixels = torch.zeros(COUNT, 3, SIZE, SIZE)  # allocated here, so that allocation is not measured

    def work() -> Outcome:
        for row, data in enumerate(images):
            pixels[row] = torch.as_tensor(prepare(data))
        return Outcome({"pixels": pixels})

    return work


def _decoded(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def _ours(backend: Any) -> Callable[[bytes], Any]:
    from transformers import CLIPImageProcessorPil

    from llm2clip.data import EvalTransform

    transform = EvalTransform(CLIPImageProcessorPil(**SETTINGS), backend)
    return lambda data: transform(transform.decode(data, "image"))


def _open_clip() -> Callable[[bytes], Any]:
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, image_transform

    transform = image_transform(SIZE, is_train=False, mean=OPENAI_DATASET_MEAN, std=OPENAI_DATASET_STD)
    return lambda data: transform(_decoded(data))


def _transformers() -> Callable[[bytes], Any]:
    from transformers import CLIPImageProcessorPil

    image_processor = CLIPImageProcessorPil(**SETTINGS)
    return lambda data: image_processor(_decoded(data), return_tensors="pt")["pixel_values"][0]


def _decoding() -> Work:
    images = _photographs()

    def work() -> Outcome:
        for data in images:
            _decoded(data)
        return Outcome()

    return work


def contests(device: str) -> list[Contest]:
    def contestants(backend: str) -> dict[str, Contestant]:
        return {
            "ours": Contestant(partial(_work, partial(_ours, backend))),
            "open_clip transform": Contestant(partial(_work, _open_clip)),
            "CLIPImageProcessorPil": Contestant(partial(_work, _transformers)),
            "decoding by Pillow": Contestant(_decoding, is_limit=True),
        }

    return [
        Contest(
            "exact, resized by Pillow",
            contestants("exact"),
            (Goal("open_clip transform", "cpu", 1.0), Goal("CLIPImageProcessorPil", "cpu", 1.05)),
            {"pixels": 1e-6},
        ),
        Contest(
            "fast",
            contestants("fast"),
            (Goal("open_clip transform", "cpu", 0.42),),
            {"pixels": GREY_LEVELS},
            note="Differs from Pillow by up to two grey levels of 255. It decodes into tensors, which costs less than "
            "what Pillow does. Decoding at a reduced size (Pillow's draft mode, twice the size that is asked for or "
            "more) was tried and left out: JPEGs of 6 and 12 megapixels took 0.6 to 0.9 of the time, for most of it "
            "goes into the entropy code, and differed by up to 60 grey levels.",
        ),
    ]


SHORTFALL = (
    "the saved image processor prepares the images, whatever it costs, so that nothing else decides on their "
    "pixels: beside it, ours takes no time. It converts each image to an array and back, 1.24 of the time of "
    "open_clip on an AMD EPYC; our own steps, until November 2026, took 0.96 (fast: 0.53 now, 0.34 then). The "
    "crop of training is ours, and works on the decoded image. Tried for fast: decoding at a reduced size, see "
    "the notes."
)
ROW = Row("R8", f"{COUNT} JPEGs of 500 to 1,500 pixels to {SIZE} x {SIZE}", contests, shortfall=SHORTFALL)

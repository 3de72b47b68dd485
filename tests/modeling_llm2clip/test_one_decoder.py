"""Every door decodes an image to the same pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import pipeline
from transformers.image_utils import load_image

from llm2clip.data import EvalTransform, TrainTransform, decode_image
from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from llm2clip.search.index import IndexConfig
from llm2clip.search.index import run as run_index
from modeling_llm2clip import LLM2CLIPModel
from tests.builders import tiny
from tests.modeling_llm2clip import awkward_images

PROCESSOR = tiny.processor(awkward_images.SIDE)


@contextmanager
def recorded_pixels() -> Iterator[list[Tensor]]:
    """Collect the inputs of every patch embedding in this context."""
    pixels: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Conv2d):
            pixels.extend(args[0].detach().float().cpu())

    handle = register_module_forward_pre_hook(record)
    try:
        yield pixels
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its processor and the files of sentence-transformers."""
    folder = tmp_path_factory.mktemp("model") / "llm2clip-doors"
    tiny.save(folder)
    write_sentence_transformers_files(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LLM2CLIPModel:
    return LLM2CLIPModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return awkward_images.write(tmp_path_factory.mktemp("images"))


def processor(files: list[Path], **doors: Any) -> list[Tensor]:
    forms = (str, Image.open, Path.read_bytes)
    batches = [PROCESSOR(images=[form(file) for file in files], return_tensors="pt") for form in forms]
    paths, pictures, encoded = (batch["pixel_values"] for batch in batches)
    assert paths.equal(pictures)
    assert paths.equal(encoded)
    return list(paths)


def encode_image(files: list[Path], model: LLM2CLIPModel, **doors: Any) -> list[Tensor]:
    with recorded_pixels() as pixels:
        model.encode_image(files, PROCESSOR, batch_size=4)
    return pixels


def training(files: list[Path], **doors: Any) -> list[Tensor]:
    evaluate = EvalTransform(PROCESSOR.image_processor)
    train = TrainTransform(PROCESSOR.image_processor, scale=(1, 1), ratio=(1, 1))
    images = [evaluate.decode(file.read_bytes(), file.name) for file in files]
    final = (awkward_images.SIDE, awkward_images.SIDE)
    return [train(image, seed=0) if image.size == final else evaluate(image) for image in images]


def index(files: list[Path], folder: Path, tmp_path: Path, **doors: Any) -> list[Tensor]:
    images = str(files[0].parent)
    with recorded_pixels() as pixels:
        run_index(IndexConfig(folder=images, model=str(folder), output_dir=str(tmp_path / "index"), num_workers=0))
    return pixels


def sentence_transformer(files: list[Path], folder: Path, **doors: Any) -> list[Tensor]:
    encoder = SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")
    with recorded_pixels() as pixels:
        for file in files:
            encoder.encode([Image.open(file)])
    return pixels


def zero_shot_pipeline(files: list[Path], folder: Path, **doors: Any) -> list[Tensor]:
    classify = pipeline("zero-shot-image-classification", model=str(folder), trust_remote_code=True)
    with recorded_pixels() as pixels:
        for file in files:
            classify(Image.open(file), candidate_labels=["a dog", "a cat"])
    return pixels


def feature_pipeline(files: list[Path], folder: Path, **doors: Any) -> list[Tensor]:
    extract = pipeline("image-feature-extraction", model=str(folder), trust_remote_code=True)
    with recorded_pixels() as pixels:
        for file in files:
            extract(str(file), pool=True)
    return pixels


IMAGE_DOORS: list[Callable[..., list[Tensor]]] = [
    *(processor, encode_image, training, index, sentence_transformer, zero_shot_pipeline, feature_pipeline)
]


@pytest.mark.parametrize("door", IMAGE_DOORS, ids=lambda door: door.__name__)
def test_every_door_decodes_to_the_same_pixels(
    door: Any, files: list[Path], folder: Path, model: LLM2CLIPModel, tmp_path: Path
) -> None:
    found = door(files=files, folder=folder, model=model, tmp_path=tmp_path)
    assert len(found) == len(files) >= 25
    for file, pixels in zip(files, found, strict=True):
        expected = PROCESSOR.image_processor(decode_image(file), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0, msg=lambda text, at=file.name: f"{at}: {text}")


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_awkward_files_need_the_decoder(files: list[Path]) -> None:
    """transformers' own conversion to RGB drops transparency and clips 16-bit images."""
    different = {file.name for file in files if decode_image(file).tobytes() != load_image(str(file)).tobytes()}
    assert {"alpha.png", "alpha_grey.png", "palette_alpha.png", "sixteen.png", "sixteen.tiff"} <= different

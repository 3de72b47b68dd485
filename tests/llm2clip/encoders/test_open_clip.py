"""Models of open_clip embed as the library itself does."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch.nn.functional import normalize

from llm2clip.data import decode_image
from llm2clip.encoders.load import OpenClipEncoder, load_encoder

from .models import IMAGES, register_open_clip, stacked

TEXTS = ["a Small dog!", "", "word " * 100, "a red bus"]


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    name, path = register_open_clip(tmp_path_factory.mktemp("open_clip"))
    return f"open_clip:{name}/{path}"


def original(spec: str) -> tuple[Any, Any, Any]:
    name, _, path = spec.removeprefix("open_clip:").partition("/")
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=path)
    return model.eval(), transform, open_clip.get_tokenizer(name)


@torch.no_grad()
def test_embeddings_are_those_of_the_library(spec: str) -> None:
    encoder = load_encoder(spec)
    assert isinstance(encoder, OpenClipEncoder)
    model, transform, tokenizer = original(spec)
    pixels = torch.stack([transform(decode_image(image)) for image in IMAGES])
    inputs = stacked(pickle.loads(pickle.dumps(encoder)), IMAGES)
    assert inputs["pixels"].dtype == torch.uint8
    expected = model.encode_image(pixels)
    torch.testing.assert_close(encoder.forward_images(inputs), normalize(expected, dim=-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(encoder.image_features(inputs), expected)
    pooled = encoder.forward_features(inputs)
    torch.testing.assert_close(pooled @ model.visual.proj, expected)
    assert encoder.model.visual.proj is not None
    texts = model.encode_text(tokenizer(TEXTS), normalize=True)
    torch.testing.assert_close(encoder.encode_text(TEXTS), texts, atol=1e-6, rtol=0)
    assert encoder.width == 24


def test_memory_of_a_loop_is_written_to_outside_of_it(spec: str) -> None:
    """A server embeds without inference mode what its loops have embedded in it."""
    encoder = load_encoder(spec)
    rows = encoder.encode_image(IMAGES)
    torch.testing.assert_close(encoder.forward_images(stacked(encoder, IMAGES)), rows, atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_grey_image_is_as_the_library_reads_it(spec: str) -> None:
    """The library converts to RGB after it has resized, this package before."""
    transform = original(spec)[1]
    encoder = load_encoder(spec)
    grey = IMAGES[1].resize((17, 23))
    expected = transform(grey)
    pixels = encoder.prepare(decode_image(grey), "image")["pixels"]
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    assert torch.equal((pixels.float().div(255) - mean) / std, expected)


def test_lengths_are_counted_before_texts_are_cut(spec: str) -> None:
    lengths, cut = load_encoder(spec).text_lengths(TEXTS)
    assert lengths.tolist() == [6, 2, 102, 5]
    assert cut.tolist() == [False, False, True, False]


def test_the_fingerprint_depends_on_weights_and_activations(spec: str, tmp_path: Path) -> None:
    encoder = load_encoder(spec)
    assert encoder.fingerprint() == load_encoder(spec).fingerprint()
    assert encoder.identity()["library"] == f"open_clip {open_clip.__version__}"
    name, _, path = spec.removeprefix("open_clip:").partition("/")
    model = open_clip.create_model(name, pretrained=path, force_quick_gelu=True).eval()
    same_weights = OpenClipEncoder(spec, model, original(spec)[1], encoder.tokenizer, torch.device("cpu"))
    state = torch.load(path, weights_only=True)
    state["visual.proj"][0, 0] += 1
    torch.save(state, tmp_path / "other.pt")
    other = load_encoder(f"open_clip:{name}/{tmp_path / 'other.pt'}")
    assert len({encoder.fingerprint(), same_weights.fingerprint(), other.fingerprint()}) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-Z/openai", "open_clip has no model 'ViT-Z'"),
        ("ViT-B-32", r"does not name pretrained weights of ViT-B-32\. Its tags: openai"),
        ("ViT-B-32//nowhere.pt", r"'/nowhere\.pt' is neither a file nor pretrained weights"),
    ],
    ids=["model", "tag", "file"],
)
def test_unknown_models_and_random_weights_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_encoder(f"open_clip:{name}")

"""A model that a function of the user loads, by the conventions of open_clip and CLIP_benchmark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import llm2clip
from llm2clip.data import decode_image
from modeling_llm2clip.image_decoding_llm2clip import DamagedImageError

from .models import IMAGES

CODE = """
import torch
from torch import nn
from torchvision.transforms.v2 import functional as V

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.pixels, self.tokens = nn.Linear(3 * 8 * 8, 6), nn.Embedding(256, 6)
    def encode_image(self, pixels):
        return self.pixels(pixels.flatten(1))
    def encode_text(self, tokens):
        tokens = tokens["input_ids"] if isinstance(tokens, dict) else tokens
        return self.tokens(tokens).mean(dim=1)

def preprocess(image):
    return V.to_dtype(V.pil_to_tensor(image.resize((8, 8))), torch.float32, True)

def tokenizer(texts):
    return torch.tensor([[*text.encode()[:9].ljust(9)] for text in texts])

def load():
    return Model(), preprocess, tokenizer

def load_mapping():
    return Model(), preprocess, lambda texts: {"input_ids": tokenizer(texts)}

def load_half():
    return Model()
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return path


def test_a_function_of_the_user_is_an_encoder(file: Path) -> None:
    encoder = llm2clip.load_encoder(f"{file}:load")
    assert encoder.width == 6
    pixels = torch.stack([encoder.prepare(decode_image(image), "")["pixel_values"] for image in IMAGES])
    with torch.no_grad():
        expected = normalize(encoder.model.encode_image(pixels), dim=-1)
    torch.testing.assert_close(encoder.encode_image(IMAGES, batch_size=1), expected)
    torch.testing.assert_close(encoder.encode_image(IMAGES[0]), expected[:1])
    torch.testing.assert_close(encoder.encode_image(np.asarray(decode_image(IMAGES[0]))), expected[:1])
    found = encoder.encode_text(["a dog", "a cat"])
    assert found.norm(dim=1).allclose(torch.ones(2))
    torch.testing.assert_close(encoder.encode_text("a cat"), found[1:])
    other = llm2clip.load_encoder(f"{file}:load_mapping")
    torch.testing.assert_close(other.encode_text(["a dog", "a cat"]), found)
    with pytest.raises(DamagedImageError):
        encoder.encode_image([b"not an image"])
    file.write_text(CODE.replace("manual_seed(0)", "manual_seed(1)"))
    assert llm2clip.load_encoder(f"{file}:load").fingerprint() != encoder.fingerprint()


def test_a_function_that_does_not_fit_is_refused(file: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.py does not exist"):
        llm2clip.load_encoder("nothing.py:load")
    for function, options, message in (
        ("other", {}, "has no function 'other'"),
        ("load_half", {}, r"\(model, preprocess, tokenizer\), .* but returns Model"),
        ("load", {"revision": "main"}, "no revision"),
    ):
        with pytest.raises(ValueError, match=message):
            llm2clip.load_encoder(f"{file}:{function}", **options)

"""LLM2CLIP models under evaluation embed as they do anywhere else, and the empty text too."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoImageProcessor

from llm2clip.encoders import OurEncoder, embed_images
from llm2clip.encoders.load import load_encoder
from modeling_llm2clip import LLM2CLIPModel, with_prompt
from tests.modeling_llm2clip import tiny

from .models import IMAGES, stacked

TEXTS = ["a small dog", "  ", "two children play football in a green park", "", "a red bus"]
KEPT = [0, 2, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("joint")
    tiny.save(folder)
    return folder


def test_images_and_texts_are_those_of_the_public_functions(folder: Path) -> None:
    encoder = load_encoder(str(folder))
    inputs = stacked(pickle.loads(pickle.dumps(encoder)), IMAGES)
    expected = embed_images(IMAGES, str(folder), show_progress_bar=False)
    torch.testing.assert_close(encoder.forward_images(inputs), expected, atol=1e-6, rtol=0)
    texts = [TEXTS[row] for row in KEPT]
    expected = OurEncoder.load(str(folder)).embed(texts)
    torch.testing.assert_close(encoder.encode_text(TEXTS)[KEPT], expected, atol=1e-6, rtol=0)
    pixels = AutoImageProcessor.from_pretrained(folder)(
        [image.convert("RGB") for image in IMAGES[:2]], return_tensors="pt"
    )
    model: Any = LLM2CLIPModel.from_pretrained(folder, text_model=False)
    with torch.no_grad():
        features = model.get_vision_features(**pixels)
    # The processor of transformers resizes with torchvision here.
    torch.testing.assert_close(encoder.forward_features(inputs)[:2], features, atol=0.1, rtol=0.1)
    assert not encoder.forward_features(inputs, projected=True).allclose(expected)


def test_an_empty_text_is_the_pooled_suffix(folder: Path) -> None:
    encoder = load_encoder(str(folder))
    found = encoder.encode_text(TEXTS)
    tokenizer, model = tiny.processor().tokenizer, encoder.model
    ids = torch.tensor([tokenizer("")["input_ids"]])
    with torch.no_grad():
        states = model.text_model.decoder(input_ids=ids).last_hidden_state
        assert (ids[0, -1] == tokenizer.convert_tokens_to_ids(tiny.SUFFIX)).all()
        expected = normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)
        suffix = model.get_text_features(llm_embeds=model.text_model(input_ids=ids).pooler_output).pooler_output
    assert states.shape[1] == model.config.text_config.num_prefix_tokens + 1
    torch.testing.assert_close(found[[1, 3]], expected.expand(2, -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(expected, normalize(suffix, dim=-1))


@pytest.mark.parametrize("prefix", ["", tiny.PREFIX])
def test_an_empty_text_without_suffix_is_what_remains(prefix: str) -> None:
    tokenizer, num_prefix_tokens = with_prompt(tiny.plain_tokenizer(), prefix, "", max_length=64)
    text = tiny.text_config(prompt_prefix=prefix, prompt_suffix="", num_prefix_tokens=num_prefix_tokens)
    encoder = OurEncoder(tiny.joint_model(text=text), tokenizer)
    found = encoder.encode_text([""])
    assert found.isfinite().all()
    ids = torch.tensor([tokenizer("")["input_ids"]])
    assert ids.shape[1] == num_prefix_tokens
    with torch.no_grad():
        expected = encoder.model.get_text_features(input_ids=ids, pooling_mask=torch.ones_like(ids)).pooler_output
    torch.testing.assert_close(found, normalize(expected, dim=-1), atol=1e-6, rtol=0)


def test_lengths_count_the_prompt(folder: Path) -> None:
    encoder = load_encoder(str(folder))
    tokenizer = tiny.processor().tokenizer
    texts = ["a red bus", "", "word " * 100]
    lengths, cut = encoder.text_lengths(texts)
    prompt = len(tokenizer("")["input_ids"])
    assert lengths[1] == prompt
    assert lengths[0] == len(tokenizer("a red bus")["input_ids"]) > prompt
    assert lengths[2] > tokenizer.model_max_length == 64
    assert cut.tolist() == [False, False, True]


def test_the_fingerprint_depends_on_every_part(folder: Path, tmp_path: Path) -> None:
    prints = {load_encoder(str(folder)).fingerprint() for _ in range(2)}
    for name in ("visual_projection.weight", "text_adapter.proj.weight", "text_model.decoder.norm.weight"):
        model: Any = LLM2CLIPModel.from_pretrained(folder)
        model.get_parameter(name).data.view(-1)[3] += 1
        model.config.fingerprint = model.config.text_model_fingerprint = None
        model.save_pretrained(tmp_path / name)
        tiny.processor().save_pretrained(tmp_path / name)
        prints.add(load_encoder(str(tmp_path / name)).fingerprint())
    assert len(prints) == 4

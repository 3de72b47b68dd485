"""LLM2CLIP models under evaluation embed as they do anywhere else, and the empty text too."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from llm2clip.encoders import OurEncoder, embed_images
from llm2clip.encoders.load import load_encoder
from llm2clip.models.prompting import with_prompt
from modeling_llm2clip import LLM2CLIPModel
from tests.builders import tiny

from .models import IMAGES, stacked


def test_features_are_those_of_the_tower(saved_model: Path) -> None:
    encoder = load_encoder(str(saved_model))
    inputs = stacked(pickle.loads(pickle.dumps(encoder)), IMAGES)
    expected = embed_images(IMAGES, str(saved_model), show_progress_bar=False)
    torch.testing.assert_close(encoder.forward_images(inputs), expected, atol=1e-6, rtol=0)
    with torch.no_grad():
        features = encoder.model.get_vision_features(inputs["pixel_values"])
    torch.testing.assert_close(encoder.forward_features(inputs), features)


def test_an_empty_text_is_the_pooled_suffix(saved_model: Path) -> None:
    encoder = load_encoder(str(saved_model))
    tokenizer, model = tiny.processor().tokenizer, encoder.model
    ids = torch.tensor([tokenizer("")["input_ids"]])
    assert ids[0, -1] == tokenizer.convert_tokens_to_ids(tiny.SUFFIX)
    with torch.no_grad():
        suffix = model.text_model.decoder(input_ids=ids).last_hidden_state[:, -1]
        expected = normalize(model.get_text_features(llm_embeds=suffix).pooler_output, dim=-1)
    found = encoder.encode_text(["a small dog", "  ", "two children play football in a green park", ""])
    torch.testing.assert_close(found[[1, 3]], expected.expand(2, -1), atol=1e-6, rtol=0)


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


def test_lengths_count_the_prompt(saved_model: Path) -> None:
    lengths, cut = load_encoder(str(saved_model)).text_lengths(["a red bus", "", "word " * 100])
    tokenizer = tiny.processor().tokenizer
    assert lengths[:2].tolist() == [len(tokenizer(text)["input_ids"]) for text in ("a red bus", "")]
    assert lengths[2] > tokenizer.model_max_length == 64
    assert cut.tolist() == [False, False, True]


def test_the_fingerprint_depends_on_every_part(saved_model: Path, tmp_path: Path) -> None:
    prints = {load_encoder(str(saved_model)).fingerprint() for _ in range(2)}
    for name in ("visual_projection.weight", "text_adapter.proj.weight", "text_model.decoder.norm.weight"):
        model: Any = LLM2CLIPModel.from_pretrained(saved_model)
        model.get_parameter(name).data.view(-1)[3] += 1
        model.config.fingerprint = model.config.text_model_fingerprint = None
        model.save_pretrained(tmp_path / name)
        tiny.processor().save_pretrained(tmp_path / name)
        prints.add(load_encoder(str(tmp_path / name)).fingerprint())
    assert len(prints) == 4

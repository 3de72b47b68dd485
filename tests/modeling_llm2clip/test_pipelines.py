"""transformers' pipelines and Auto classes give the values of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import pipeline

from modeling_llm2clip import LLM2CLIPModel
from tests.builders import tiny
from tests.builders.tiny import CAPTIONS, IMAGES

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module", params=[{}, tiny.FROZEN_TOWER], ids=["default", "frozen tower"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder, **request.param)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LLM2CLIPModel:
    return LLM2CLIPModel.from_pretrained(folder).eval()


@pytest.mark.parametrize(("template", "batch_size"), [("{}", 1), ("a drawing of {}, seen from far away", 2)])
def test_zero_shot_pipeline_gives_the_probabilities_of_the_model(
    folder: Path, model: LLM2CLIPModel, template: str, batch_size: int
) -> None:
    labels = [f"{caption} and {count} trees" for count in range(40) for caption in CAPTIONS]
    classify = pipeline("zero-shot-image-classification", model=str(folder), trust_remote_code=True)
    results = classify(IMAGES, candidate_labels=labels, hypothesis_template=template, batch_size=batch_size)
    processor = tiny.processor()
    text = model.encode_text([template.format(label) for label in labels], processor)
    scores = (model.logit_scale.exp() * model.encode_image(IMAGES, processor) @ text.t()).softmax(dim=-1)
    assert len(results) == len(IMAGES)
    for result, row in zip(results, scores, strict=True):
        found = {answer["label"]: answer["score"] for answer in result}
        torch.testing.assert_close(torch.tensor([found[label] for label in labels]), row.detach(), **CLOSE)
        assert result[0]["label"] == labels[int(row.argmax())]


def test_feature_pipeline_gives_the_token_states_that_are_pooled(folder: Path, model: LLM2CLIPModel) -> None:
    extract = pipeline("feature-extraction", model=str(folder))
    tokenizer = tiny.processor().tokenizer
    expected = model.encode_text(CAPTIONS, tokenizer)
    for caption, states, embedding in zip(CAPTIONS, extract(CAPTIONS, batch_size=3), expected, strict=True):
        tokens = torch.tensor(states)[0, -len(tokenizer(caption)["input_ids"]) :]
        pooled = tokens[model.config.text_config.num_prefix_tokens :].mean(dim=0, keepdim=True)
        features = model.get_text_features(llm_embeds=pooled).pooler_output[0]
        torch.testing.assert_close(F.normalize(features, dim=-1), embedding, **CLOSE)


def test_feature_pipeline_supports_a_text_tower(tmp_path: Path) -> None:
    tower, tokenizer = tiny.text_model(), tiny.processor().tokenizer
    tower.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    extract = pipeline("feature-extraction", model=str(tmp_path))
    states = torch.tensor(extract(CAPTIONS[0]))[0]
    pooled = states[tower.config.num_prefix_tokens :].mean(dim=0)
    torch.testing.assert_close(pooled, tower.encode(CAPTIONS[0], tokenizer)[0], **CLOSE)

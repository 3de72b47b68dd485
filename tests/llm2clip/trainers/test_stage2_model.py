"""The model that stage 2 makes of its settings: new parts, their types and initial values, and those of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel

from llm2clip.losses import sigmoid_loss
from llm2clip.trainers import run_stage2
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPModel
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.test_stage2 import losses, run, weights


def test_trained_parts_are_float32_whatever_they_were_saved_in(inputs: Inputs, tmp_path: Path) -> None:
    tower = AutoModel.from_pretrained(inputs.vision).to(torch.bfloat16)
    tower.save_pretrained(tmp_path / "vision")
    AutoImageProcessor.from_pretrained(inputs.vision).save_pretrained(tmp_path / "vision")
    vision = {"vision_model_name_or_path": str(tmp_path / "vision")}
    run(tmp_path / "out", inputs, **vision, max_steps=1, save_strategy="no")
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.float32}


def test_sigmoid_loss_trains_a_bias_that_the_model_keeps(inputs: Inputs, tmp_path: Path) -> None:
    run(tmp_path / "one", inputs, loss="sigmoid", save_strategy="no", tower_chunk_size=5)
    run(tmp_path / "whole", inputs, loss="sigmoid", save_strategy="no")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "whole"), abs=1e-4)
    trained = weights(tmp_path / "one")
    assert trained["logit_bias"] != -10
    model = AutoModel.from_pretrained(tmp_path / "one", text_model=False).eval()
    assert model.logit_bias.equal(trained["logit_bias"])
    pixels, embeds = torch.randn(3, 3, 28, 28), torch.randn(3, model.config.text_config.hidden_size)
    output = model(pixel_values=pixels, llm_embeds=embeds, return_loss=True)
    cosines = output.image_embeds @ output.text_embeds.T
    torch.testing.assert_close(output.logits_per_image, cosines * output.logit_scale + output.logit_bias)
    expected = sigmoid_loss(output.image_embeds, output.text_embeds, output.logit_scale, output.logit_bias)
    torch.testing.assert_close(output.loss, expected)
    # Trained further it keeps its loss.
    finished = {"vision_model_name_or_path": "", "text_model_name_or_path": "", "projection_dim": None}
    finished["model_name_or_path"] = str(tmp_path / "one")
    run(tmp_path / "two", inputs, **finished, loss="sigmoid", max_steps=1)
    with pytest.raises(ValueError, match="was trained with the sigmoid loss"):
        run(tmp_path / "three", inputs, **finished, max_steps=1)


def test_new_parts_start_as_in_the_original_unless_set(inputs: Inputs, tmp_path: Path) -> None:
    def new_model(**changes: Any) -> LLM2CLIPModel:
        fields = {**tiny.stage2_fields(tmp_path, inputs.vision, inputs.text, inputs.cache), **changes}
        return run_stage2.load_model(build_config(Stage2Recipe, fields))[0]

    assert 0 < new_model().visual_projection.weight.std() < 1e-4
    assert new_model(initializer="normal").visual_projection.weight.std() > 0.01
    assert new_model(logit_scale_init_value="2.5").logit_scale == 2.5
    with pytest.raises(ValueError, match="has no logit scale; set logit_scale_init_value to a number"):
        new_model(logit_scale_init_value="checkpoint")


def test_settings_of_frozen_towers_reach_the_new_model(inputs: Inputs, tmp_path: Path) -> None:
    fields = tiny.stage2_fields(tmp_path, inputs.vision, inputs.text, inputs.cache)
    asked = {"vision_pooling": "cls_mean", "visual_head": "gated", "standardize_features": True}
    fields["freeze_vision"] = "all"
    model, processor = run_stage2.load_model(build_config(Stage2Recipe, {**fields, **asked, "feature_dropout": 0.2}))
    config = model.config
    assert (config.vision_pooling, config.visual_head) == ("cls_mean", "gated")
    assert config.standardize_vision
    assert config.center_text
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    trained = {**fields, "projection_dim": None, "model_name_or_path": str(tmp_path / "model")}
    with pytest.raises(ValueError, match="already trained; leave visual_head, standardize_features unset"):
        run_stage2.load_model(
            build_config(Stage2Recipe, {**trained, "visual_head": "gated", "standardize_features": True})
        )
    with pytest.raises(ValueError, match=r"feature_dropout must be at least 0 and below 1, not 1\.5"):
        build_config(Stage2Recipe, {**fields, "feature_dropout": 1.5})


def test_models_without_a_bias_have_none(inputs: Inputs, tmp_path: Path) -> None:
    run(tmp_path, inputs, save_strategy="no", max_steps=1)
    assert "logit_bias" not in weights(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, text_model=False).logit_bias is None
    for changes in (
        {"loss": "hinge"},
        {"logit_bias_init_value": -5.0},
        {"loss": "sigmoid", "label_smoothing_factor": 0.1},
    ):
        with pytest.raises(ValueError, match="loss"):
            run(tmp_path, inputs, **changes)

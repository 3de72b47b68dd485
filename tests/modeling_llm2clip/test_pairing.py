"""Pairing of a model with its LLM: attaching it, rejecting another one, saving with or without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from llm2clip.models.new_model import from_vision_text_pretrained
from modeling_llm2clip import (
    LLM2CLIPModel,
    LLM2CLIPTextConfig,
    LLM2CLIPTextModel,
    LLM2CLIPVisionModelWithProjection,
)
from tests.builders import tiny


def test_external_llm_stays_out_of_the_checkpoint_unless_asked_for(tmp_path: Path) -> None:
    model = tiny.save_apart(tmp_path)
    assert not [key for key in load_file(tmp_path / "clip" / "model.safetensors") if key.startswith("text_model.")]
    model.save_pretrained(tmp_path / "all", save_text_model=True)
    assert model.config.text_model_name_or_path is not None
    bundled = LLM2CLIPModel.from_pretrained(tmp_path / "all")
    assert bundled.config.text_model_name_or_path is None
    half, info = LLM2CLIPTextModel.from_pretrained(tmp_path / "all", output_loading_info=True)
    assert not any(info.values())
    assert bundled.text_model.fingerprint() == half.fingerprint() == model.text_model.fingerprint()


@pytest.mark.parametrize("of_tower", [False, True], ids=["llm", "tower"])
def test_llm_can_be_a_peft_adapter_of_an_llm_or_of_a_trained_tower(of_tower: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = tiny.text_model()
    (base if of_tower else base.decoder).save_pretrained(tmp_path / "base")
    if of_tower:
        tower = LLM2CLIPTextModel.from_pretrained(tmp_path / "base")
    else:
        decoder = AutoModel.from_pretrained(tmp_path / "base")
        tower = tiny.wrapped(decoder, prompt_prefix=tiny.PREFIX, num_prefix_tokens=3)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    tower.decoder = peft.get_peft_model(tower.decoder, lora)
    tower.decoder.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tower.save_pretrained(tmp_path / "llm")
    ids = torch.randint(1, 400, (2, 9))
    expected = tower.eval()(ids).pooler_output
    loaded = AutoModel.from_pretrained(tmp_path / "llm").eval()
    assert (loaded.config.prompt_prefix, loaded.fingerprint()) == (tiny.PREFIX, tower.fingerprint())
    torch.testing.assert_close(loaded(ids).pooler_output, expected)
    model = from_vision_text_pretrained(tiny.save_vision(tmp_path / "vision"), tmp_path / "llm")
    model.config.text_model_fingerprint = tower.fingerprint()
    model.save_pretrained(tmp_path / "clip")
    joint = LLM2CLIPModel.from_pretrained(tmp_path / "clip")
    torch.testing.assert_close(joint.text_model(ids).pooler_output, expected)
    with pytest.raises(ValueError, match="merge_adapter"):
        joint.save_pretrained(tmp_path / "bundled", save_text_model=True)


def test_error_for_a_wrong_llm_names_both_llms(tmp_path: Path) -> None:
    model = tiny.save_apart(tmp_path)
    pooled = tiny.text_model(pooling="last_token")
    pooled.load_state_dict(model.text_model.state_dict())
    with pytest.raises(ValueError, match="other weights, prompt or pooling"):
        model.set_text_model(pooled)
    with torch.no_grad():
        model.text_model.decoder.layers[0].mlp.up_proj.weight.mul_(1.5)
    other = model.text_model
    other.save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match=rf"{model.config.text_model_fingerprint}.*{other.fingerprint()}"):
        AutoModel.from_pretrained(tmp_path / "clip")
    wide = LLM2CLIPTextModel(LLM2CLIPTextConfig(decoder_config={**tiny.decoder_config().to_dict(), "hidden_size": 64}))
    with pytest.raises(ValueError, match=rf"width {tiny.HIDDEN} .*gives 64"):
        model.set_text_model(wide)
    with pytest.raises(TypeError, match="LlamaModel is not a text tower"):
        model.set_text_model(other.decoder)


def test_a_release_that_changes_a_default_loads_what_was_saved_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny.save_apart(tmp_path), tiny.processor()
    tiny.next_release(monkeypatch)
    loaded = LLM2CLIPModel.from_pretrained(tmp_path / "clip")
    assert loaded.text_model.config.decoder_config.new_setting == 1.5
    rows = [each.encode_text(tiny.CAPTIONS, processor) for each in (model, loaded)]
    torch.testing.assert_close(*rows)


def test_a_recorded_llm_is_compared_by_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save_apart(tmp_path)
    monkeypatch.setattr(LLM2CLIPTextModel, "fingerprint", None)  # which would read its weights
    LLM2CLIPModel.from_pretrained(tmp_path / "clip")
    path = tmp_path / "llm" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "fingerprint": "3-0"}))
    with pytest.raises(ValueError, match="has fingerprint 3-0"):
        LLM2CLIPModel.from_pretrained(tmp_path / "clip")


def test_incomplete_checkpoints_are_rejected(tmp_path: Path) -> None:
    tiny.save_apart(tmp_path)
    with pytest.raises(ValueError, match="does not take images"):
        from_vision_text_pretrained(tmp_path / "llm", tmp_path / "llm")
    config = AutoConfig.from_pretrained(tmp_path / "llm")
    config.decoder_config.num_hidden_layers = 3
    config.save_pretrained(tmp_path / "llm")
    with pytest.raises(ValueError, match=r"not contain all weights of LLM2CLIPTextModel: decoder\.layers\.2"):
        LLM2CLIPTextModel.from_pretrained(tmp_path / "llm")
    LLM2CLIPVisionModelWithProjection(tiny.joint_config()).save_pretrained(tmp_path / "half")
    with pytest.raises(ValueError, match=r"not contain all weights .*logit_scale, text_adapter"):
        LLM2CLIPModel.from_pretrained(tmp_path / "half", text_model=False)


def test_saving_without_an_llm_is_rejected(tmp_path: Path) -> None:
    model = LLM2CLIPModel(tiny.joint_config(), text_model=False)
    with pytest.raises(ValueError, match="there is no LLM to save"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="to the LLM's repository"):
        tiny.joint_model().save_pretrained(tmp_path, save_text_model=False)


def test_the_folder_of_an_llm_is_recorded_as_an_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.text_model().save_pretrained(tmp_path / "llm")
    vision = tiny.save_vision(tmp_path / "vision")
    monkeypatch.chdir(tmp_path)
    model = from_vision_text_pretrained(vision, "llm")
    assert model.config.text_model_name_or_path == str(tmp_path / "llm")


def test_stored_embeddings_of_another_llm_are_refused_by_their_width() -> None:
    with pytest.raises(ValueError, match="llm_embeds have width 7, but this adapter takes 32"):
        tiny.joint_model()(llm_embeds=torch.zeros(2, 7))

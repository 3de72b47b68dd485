"""The joint model: towers, pairing with its LLM, loading and saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from llm2clip.models.new_model import from_vision_text_pretrained
from llm2clip.models.towers import open_text_tower
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPVisionModelWithProjection
from modeling_llm2clip.modeling_llm2clip_utils import evaluating
from tests.builders import tiny
from tests.builders.students import save_student
from tests.builders.tiny import CAPTIONS, IMAGES
from tests.golden import FOLDER


def test_forward_returns_scaled_cosines_and_loss() -> None:
    model = tiny.joint_model()
    inputs = tiny.processor()(text=CAPTIONS[:2], images=IMAGES, return_tensors="pt")
    output = model(**inputs)
    assert output.loss is None
    for embeds in (output.image_embeds, output.text_embeds):
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(2))
    expected = output.logit_scale * output.image_embeds @ output.text_embeds.t()
    torch.testing.assert_close(output.logits_per_image, expected)
    torch.testing.assert_close(output.logits_per_text, expected.t())
    assert model(**inputs, return_loss=True).loss.shape == ()
    assert list(model(**inputs, return_logits=False).keys()) == ["image_embeds", "text_embeds", "logit_scale"]
    torch.testing.assert_close(output.pooler_output, output.image_embeds + output.text_embeds)
    assert model(pixel_values=inputs["pixel_values"][:1], input_ids=inputs["input_ids"]).pooler_output is None


def test_forward_with_one_modality_equals_get_features() -> None:
    model, processor = tiny.joint_model(), tiny.processor()
    texts = processor(text=CAPTIONS, return_tensors="pt")
    images = processor(images=IMAGES, return_tensors="pt")
    features = model.get_text_features(**texts).pooler_output
    assert model(**texts).pooler_output.equal(features)
    assert model(**images).pooler_output.equal(model.get_image_features(**images).pooler_output)
    llm_embeds = model.text_model(**texts).pooler_output
    torch.testing.assert_close(model.get_text_features(llm_embeds=llm_embeds).pooler_output, features)
    with pytest.raises(ValueError, match="pass pixel_values"):
        model()


def test_what_would_be_ignored_is_refused(tmp_path: Path) -> None:
    model = tiny.joint_model()
    with pytest.raises(ValueError, match="pass either input_ids or llm_embeds"):
        model.get_text_features(torch.ones(1, 3, dtype=torch.long), llm_embeds=torch.ones(1, tiny.HIDDEN))
    with pytest.raises(ValueError, match="LLM2CLIPConfig has no field 'projecton_dim'"):
        from_vision_text_pretrained(model.vision_model, model.text_model, projecton_dim=8)
    with pytest.raises(ValueError, match="LLM2CLIPTextConfig has no field 'prompt_prefx'"):
        open_text_tower(str(FOLDER / "llm2vec_llama_a_hf"), prompt_prefx="a ")
    tiny.save(tmp_path)
    with pytest.raises(ValueError, match="text_model=False does not load"):
        LLM2CLIPModel.from_pretrained(tmp_path, text_model=False, text_model_kwargs={"dtype": "bfloat16"})


def test_encode_returns_unit_vectors_in_input_order() -> None:
    model, processor = tiny.joint_model(), tiny.processor()
    expected = model(**processor(text=CAPTIONS, images=IMAGES, return_tensors="pt"))
    for encode, inputs, rows in (
        (model.encode_text, CAPTIONS, expected.text_embeds),
        (model.encode_image, IMAGES, expected.image_embeds),
    ):
        torch.testing.assert_close(encode(inputs, processor, batch_size=1), rows, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(encode(inputs[1], processor), rows[1:2], atol=1e-5, rtol=1e-4)
        assert encode([], processor).shape == (0, 24)


@pytest.mark.parametrize("door", ["encode_text", "encode_image", "tower", "query"])
def test_encoding_is_that_of_evaluation_and_keeps_every_mode(door: str, tmp_path: Path) -> None:
    vision = tiny.vision_config(drop_path_rate=0.5, patch_dropout=0.5)
    model, processor = tiny.joint_model(vision=vision, feature_dropout=0.5), tiny.processor()
    model.text_model.decoder.layers[0].mlp.act_fn = torch.nn.Dropout()
    owner: Any = {"tower": model.text_model, "query": save_student(tmp_path)}.get(door, model)

    def encode() -> torch.Tensor:
        if door == "encode_image":
            return model.encode_image(IMAGES, processor)
        if door == "encode_text":
            return model.encode_text(CAPTIONS, processor)
        return owner.encode(CAPTIONS, *([processor.tokenizer] if door == "tower" else []))

    expected = encode()
    for number, module in enumerate(owner.modules()):
        module.training = number % 3 != 1  # as frozen parts of a training run
    modes = [module.training for module in owner.modules()]
    assert encode().equal(expected)
    assert [module.training for module in owner.modules()] == modes
    with pytest.raises(KeyError), evaluating(owner):
        raise KeyError
    assert [module.training for module in owner.modules()] == modes


def test_a_loaded_model_encodes_without_a_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = tiny.processor()
    tiny.save(tmp_path)
    model = LLM2CLIPModel.from_pretrained(tmp_path)
    assert model.encode_text(CAPTIONS).equal(model.encode_text(CAPTIONS, processor))
    assert model.encode_image(IMAGES).equal(model.encode_image(IMAGES, processor))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    assert len(model.encode_text("a dog")) == 1, "the tokenizer is loaded once"


def test_the_tokenizer_is_of_the_revision_of_the_model_and_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save(tmp_path)
    model = LLM2CLIPModel.from_pretrained(tmp_path, revision="v1", cache_dir=tmp_path, token="secret")
    tokenizer, asked = tiny.processor().tokenizer, {}

    def load(name: str, **options: Any) -> Any:
        asked.update(options, name=str(name))
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    model.encode_text("a dog")
    assert asked.pop("config") is model.config
    assert asked == {"name": str(tmp_path), "revision": "v1", "cache_dir": tmp_path, "trust_remote_code": False}


def test_a_model_without_a_processor_asks_for_one(tmp_path: Path) -> None:
    model = tiny.joint_model()
    for encode, inputs in ((model.encode_text, "a dog"), (model.encode_image, IMAGES)):
        with pytest.raises(ValueError, match="pass processor="):
            encode(inputs)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}; pass processor="):
        LLM2CLIPModel.from_pretrained(tmp_path).encode_text("a dog")


@pytest.mark.parametrize("model_type", ["eva02", *tiny.VISION_TOWERS])
def test_every_vision_tower_is_saved_loaded_and_used_again(model_type: str, tmp_path: Path) -> None:
    model = tiny.joint_model(vision=None if model_type == "eva02" else tiny.other_vision_config(model_type))
    processor = tiny.naflex_processor() if model_type == "siglip2_vision_model" else tiny.processor()
    expected = model.encode_image(IMAGES, processor)
    model.save_pretrained(tmp_path)
    loaded, info = LLM2CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    torch.testing.assert_close(loaded.encode_image(IMAGES, processor), expected)
    second = from_vision_text_pretrained(tmp_path, tmp_path)
    for name, value in model.vision_model.state_dict().items():
        assert value.equal(second.vision_model.state_dict()[name]), name


def test_a_16_bit_model_has_its_scale_logits_and_unit_rows_in_float32(tmp_path: Path) -> None:
    tiny.joint_model().to(torch.bfloat16).save_pretrained(tmp_path)
    loaded, processor = LLM2CLIPModel.from_pretrained(tmp_path), tiny.processor()
    assert loaded.dtype == loaded.text_adapter.proj.weight.dtype == torch.bfloat16
    assert loaded.logit_scale.dtype == torch.float32
    output = loaded(pixel_values=torch.randn(2, 3, 28, 28), llm_embeds=torch.randn(2, tiny.HIDDEN))
    assert output.logits_per_image.dtype == torch.float32
    for rows in (loaded.encode_text(CAPTIONS, processor), loaded.encode_image(IMAGES, processor)):
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(len(rows)), atol=1e-6, rtol=0)


def test_vision_half_loads_alone_and_returns_patch_states(tmp_path: Path) -> None:
    model = tiny.save(tmp_path)
    vision = LLM2CLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 28, 28)
    output = vision(images, output_hidden_states=True)
    assert output.pooler_output.equal(model.get_image_features(images).pooler_output)
    assert [states.shape for states in output.hidden_states] == [(2, 17, 32)] * 3
    assert not hasattr(vision, "text_adapter")


def test_other_image_sizes_need_interpolate_pos_encoding() -> None:
    model = tiny.joint_model()
    with pytest.raises(ValueError, match="pixel_values are 42 x 42, but this tower takes 28 x 28"):
        model.get_image_features(torch.randn(1, 3, 42, 42))
    output = model.get_image_features(torch.randn(1, 3, 42, 56), interpolate_pos_encoding=True)
    assert output.last_hidden_state.shape == (1, 1 + 6 * 8, 32)
    with pytest.raises(ValueError, match="the patch size 7 does not divide"):
        model.get_image_features(torch.randn(1, 3, 30, 30), interpolate_pos_encoding=True)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_gradient_checkpointing_reaches_both_towers() -> None:
    model, calls = tiny.joint_model().train(), []
    model.gradient_checkpointing_enable()
    for tower, layer in (("vision", model.vision_model.blocks[0]), ("text", model.text_model.decoder.layers[0])):
        layer.mlp.register_forward_pre_hook(lambda *_, tower=tower: calls.append(tower))
    ids = torch.randint(1, 400, (2, 9))
    model(input_ids=ids, pixel_values=torch.randn(2, 3, 28, 28), return_loss=True).loss.backward()
    assert sorted(calls) == ["text", "text", "vision", "vision"]


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "proj", "w1", "w2", "w3"])
def test_lora_reaches_every_linear_of_the_vision_tower(name: str) -> None:
    peft = pytest.importorskip("peft")
    model, images = tiny.joint_model(), torch.randn(2, 3, 28, 28)
    before = model.get_image_features(images).pooler_output
    target = rf".*vision_model\.blocks\.\d+\.(attn|mlp)\.{name}"
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=target, init_lora_weights=False))
    after = lora.get_base_model().get_image_features(images).pooler_output
    assert (after - before).abs().max() > 1e-4


def test_patch_dropout_and_stochastic_depth_are_active_in_training_only() -> None:
    model, plain = (
        tiny.joint_model(vision=tiny.vision_config(drop_path_rate=0.5, patch_dropout=0.5)),
        tiny.joint_model(),
    )
    plain.load_state_dict(model.state_dict())
    images = torch.randn(4, 3, 28, 28)
    expected = plain.get_image_features(images).pooler_output
    assert model.get_image_features(images).pooler_output.equal(expected)
    output = model.train().get_image_features(images)
    assert output.last_hidden_state.shape == (4, 1 + 8, 32)
    assert not torch.allclose(output.pooler_output, expected)


def test_patch_dropout_keeps_each_patch_at_its_rotary_position() -> None:
    """Shuffling the patches without dropping any does not change the result."""
    model = tiny.joint_model(vision=tiny.vision_config(patch_dropout=1e-18))
    images = torch.randn(2, 3, 28, 28)
    expected = model.get_image_features(images)
    output = model.train().get_image_features(images)
    torch.testing.assert_close(output.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(output.last_hidden_state, expected.last_hidden_state)

"""Identities of text towers, tokenizers and vision towers: what they depend on, and what not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPImageProcessor

from llm2clip.models.identity import text_tower_fingerprint, tokenizer_fingerprint, vision_fingerprint
from llm2clip.models.new_model import from_vision_text_pretrained
from llm2clip.models.prompting import with_prompt
from llm2clip.models.towers import describe_text_tower, open_text_tower, save_text_tower
from modeling_llm2clip import (
    LLM2CLIPModel,
    LLM2CLIPTextModel,
    LLM2CLIPVisionModelWithProjection,
    with_pillow,
)
from tests.builders import tiny
from tests.llm2clip.conftest import Inputs


@pytest.mark.parametrize("kind", ["tower", "joint", "apart", "adapter"])
def test_what_is_recorded_is_taken(kind: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = open_text_tower(inputs.text)
    if kind == "adapter":
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        model.decoder = peft.get_peft_model(model.decoder, lora)
        model.decoder.peft_config["default"].base_model_name_or_path = inputs.text
    if kind in ("tower", "adapter"):
        save_text_tower(model, tokenizer, tmp_path)
    else:
        text: Any = inputs.text if kind == "apart" else model
        from_vision_text_pretrained(inputs.vision, text, projection_dim=8).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    expected = model.fingerprint()
    monkeypatch.setattr(LLM2CLIPTextModel, "from_pretrained", None)
    assert text_tower_fingerprint(str(tmp_path), None, getattr(config, "text_config", config)) == expected


def test_a_plain_llm_has_the_identity_of_the_tower_that_is_made_of_it(inputs: Inputs, tmp_path: Path) -> None:
    model, tokenizer = open_text_tower(inputs.llm)
    save_text_tower(model, tokenizer, tmp_path)
    config, _ = describe_text_tower(inputs.llm)
    assert text_tower_fingerprint(inputs.llm, None, config) == model.fingerprint() == model.config.fingerprint


def test_identity_of_a_tokenizer_survives_saving(inputs: Inputs, tmp_path: Path) -> None:
    for name in (inputs.text, inputs.llm):
        _, tokenizer = open_text_tower(name)
        expected = tokenizer_fingerprint(tokenizer)
        tokenizer(["a", "a b c"], padding=True, truncation=True)
        tokenizer.padding_side = "right"
        assert tokenizer_fingerprint(tokenizer) == expected
        tokenizer.save_pretrained(tmp_path)
        assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == expected


def test_what_changes_the_tokens_changes_the_identity(tmp_path: Path) -> None:
    def prompted(**changes: Any) -> Any:
        options = {"prefix": tiny.PREFIX, "suffix": tiny.SUFFIX, "max_length": 64, **changes}
        return with_prompt(tiny.plain_tokenizer(), **options)[0]

    tokenizers = [prompted(**changes) for changes in ({}, {"prefix": "a "}, {"suffix": ""}, {"max_length": 32})]
    tokenizers += [prompted(), prompted()]
    tokenizers[-2].add_tokens(["zebra"])
    tokenizers[-1].backend_tokenizer.normalizer = normalizers.Lowercase()
    for change in (lambda model: model["merges"].pop(), lambda model: model["vocab"].update({"zebra": 9999})):
        tokenizers[0].save_pretrained(tmp_path)
        content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
        change(content["model"])
        (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        tokenizers.append(AutoTokenizer.from_pretrained(tmp_path))
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers}) == 8


TOWERS = ("eva02", *tiny.VISION_TOWERS)


def joint(kind: str = "eva02", **fields: Any) -> LLM2CLIPModel:
    return tiny.joint_model(vision=None if kind == "eva02" else tiny.other_vision_config(kind), **fields)


def processor(kind: str = "eva02") -> Any:
    return (tiny.naflex_processor() if kind == "siglip2_vision_model" else tiny.processor()).image_processor


@pytest.mark.parametrize("kind", TOWERS)
def test_saving_halving_and_the_dtype_do_not_change_the_identity(kind: str, tmp_path: Path) -> None:
    model = joint(kind)
    expected = vision_fingerprint(model, processor(kind))
    model.save_pretrained(tmp_path)
    processor(kind).save_pretrained(tmp_path)
    saved: Any = with_pillow(AutoImageProcessor.from_pretrained(tmp_path))
    half = LLM2CLIPVisionModelWithProjection.from_pretrained(tmp_path)
    assert vision_fingerprint(half, saved) == expected
    assert vision_fingerprint(half.to(torch.bfloat16), saved) == expected


HEAD = ("vision_model.", "visual_standardization.", "visual_projection.")


@pytest.mark.parametrize("kind", [*TOWERS, "frozen tower"])
def test_every_value_of_tower_and_projection_counts(kind: str) -> None:
    fields = tiny.FROZEN_TOWER if kind == "frozen tower" else {}
    kind = "eva02" if fields else kind
    model = joint(kind, **fields)

    def found(with_projection: bool = True) -> str:
        return vision_fingerprint(model, processor(kind), with_projection=with_projection)

    seen, tower_alone = {found()}, [found(False)]
    for part in HEAD:
        parts = [value for name, value in model.state_dict().items() if name.startswith(part)]
        assert bool(parts) == (part != HEAD[1] or bool(fields))
        for weight in parts:
            before = len(seen)
            weight.view(-1)[weight.numel() // 2 + 1 if weight.numel() > 2 else 0] += 1
            seen.add(found())
            assert len(seen) == before + 1
        tower_alone.append(found(False))
    assert tower_alone[0] != tower_alone[1] == tower_alone[2] == tower_alone[3]


def test_the_llm_the_adapter_and_training_do_not_count() -> None:
    model = joint()
    expected = vision_fingerprint(model, processor())
    with torch.no_grad():
        model.text_adapter.proj.weight += 1
        model.text_model.decoder.norm.weight += 1
    model.vision_model.config.patch_dropout = model.vision_model.config.drop_path_rate = 0.5
    model.set_attn_implementation("eager")
    assert vision_fingerprint(model, processor()) == expected


@pytest.mark.parametrize("with_projection", [True, False])
def test_the_pooling_of_the_features_counts(with_projection: bool) -> None:
    ways: tuple[dict[str, Any], ...] = ({}, {"vision_pooling": "mean"}, {"vision_layers": [1]})
    models = [joint(**fields) for fields in ways]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    assert len({vision_fingerprint(model, processor(), with_projection=with_projection) for model in models}) == 3


def test_preprocessing_counts_and_its_form_does_not() -> None:
    model = joint()

    def found(**changes: Any) -> str:
        size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
        return vision_fingerprint(model, CLIPImageProcessor(**{**size, **changes}))

    expected = found()
    same = ({"image_mean": (0.48145466, 0.4578275, 0.40821073)}, {"resample": 3}, {"do_convert_rgb": True})
    assert {found(**changes) for changes in same} == {expected}
    assert vision_fingerprint(model, with_pillow(CLIPImageProcessor(**processor().to_dict()))) == expected
    different = (
        *({"image_mean": [0.5, 0.5, 0.5]}, {"resample": 2}, {"size": {"shortest_edge": 32}}),
        *({"do_center_crop": False}, {"do_normalize": False}, {"rescale_factor": 1.0}),
    )
    assert len({expected, *(found(**changes) for changes in different)}) == len(different) + 1
    # A step that is off has no settings.
    assert found(do_normalize=False, image_mean=[0.5, 0.5, 0.5]) == found(do_normalize=False)


def test_weights_that_are_elsewhere_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"vision_model.* cannot be read .*offloaded or quantised"):
        vision_fingerprint(joint().to("meta"), processor())

"""The fingerprint of a text tower: what it depends on and what not, before and after adapters are merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextConfig, LLM2CLIPTextModel
from modeling_llm2clip.identity_llm2clip import WORDS, digest_weight, text_fingerprint
from tests.builders import tiny


@pytest.mark.parametrize("size", [1, 7, 8 * WORDS + 3])
def test_every_value_counts(size: int) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0))
    expected = digest_weight(weight)
    assert digest_weight(weight.to(torch.bfloat16)) == expected
    assert digest_weight(weight.reshape(1, size)) != expected
    for place in {0, 3 % size, size // 2, size - 1}:
        changed = weight.clone()
        changed[place] *= 1.01
        assert digest_weight(changed) != expected
    assert (digest_weight(weight.flip(0)) != expected) == (size > 1)


def test_a_single_weight_changes_the_fingerprint_and_the_order_does_not() -> None:
    model = tiny.text_model()
    expected = model.fingerprint()
    state = model.state_dict()
    assert model.fingerprint(dict(reversed(state.items()))) == expected
    with torch.no_grad():
        model.decoder.layers[0].mlp.up_proj.weight[11, 7] += 0.5
    assert model.fingerprint() != expected


def save_adapter(folder: Path, base_dtype: torch.dtype) -> LLM2CLIPTextModel:
    """Save a tower and an adapter of it, as stage 1 does."""
    peft = pytest.importorskip("peft")
    tiny.text_model().to(base_dtype).save_pretrained(folder / "base")
    tower = LLM2CLIPTextModel.from_pretrained(folder / "base")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    tower.decoder = peft.get_peft_model(tower.decoder, lora)
    tower.decoder.peft_config["default"].base_model_name_or_path = str(folder / "base")
    tower.save_pretrained(folder / "adapter")
    return tower


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_a_rounded_base_is_still_the_llm_of_its_model(base_dtype: torch.dtype, tmp_path: Path) -> None:
    expected = save_adapter(tmp_path, base_dtype).fingerprint()
    tower = LLM2CLIPTextModel.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    # The merge sees other weights than those that were trained, if these were in float32.
    assert (tower.fingerprint() != expected) == (base_dtype == torch.float32)
    assert tower.identity() == expected
    model = tiny.joint_model(text_model_name_or_path=str(tmp_path / "adapter"), text_model_fingerprint=expected)
    model.save_pretrained(tmp_path / "joint", save_text_model=False)
    loaded = LLM2CLIPModel.from_pretrained(tmp_path / "joint", dtype=torch.bfloat16)
    assert loaded.text_model.dtype == torch.bfloat16
    assert loaded.config.text_model_fingerprint == expected


def test_a_tower_without_a_record_is_identified_by_its_weights_if_they_are_exact(tmp_path: Path) -> None:
    tower = tiny.text_model()
    tower.decoder.save_pretrained(tmp_path)
    options: dict[str, Any] = {"default_config": tiny.text_config(fingerprint="3-of another LLM")}
    for dtype, expected in ((torch.bfloat16, tower.fingerprint()), (torch.float16, None)):
        plain = LLM2CLIPTextModel.from_pretrained(tmp_path, dtype=dtype, **options)
        assert plain.identity() == expected


def test_what_follows_the_text_model_counts() -> None:
    dense = [{"out_features": 4, "bias": True, "activation": "tanh"}]
    changes = ({}, {"normalize": True}, {"pool_prompt": True}, {"dense": dense}, {"bidirectional": None})
    configs = [LLM2CLIPTextConfig(decoder_config=BertConfig(**tiny.SIZES), **fields) for fields in changes]
    weights = [("decoder.weight", torch.ones(2))]
    assert len({text_fingerprint(config, weights) for config in configs}) == len(changes)


def adapted(**options: Any) -> LLM2CLIPTextModel:
    peft = pytest.importorskip("peft")
    model = tiny.text_model()
    # As published LLMs are: exact in bfloat16.
    model.to(torch.bfloat16).float()
    lora = peft.LoraConfig(r=4, init_lora_weights=False, **{"target_modules": "all-linear", **options})
    model.decoder = peft.get_peft_model(model.decoder, lora)
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ],
)
def test_identity_of_an_adapter_is_that_of_its_merged_tower(options: dict[str, Any]) -> None:
    model = adapted(**options)
    plain = LLM2CLIPTextModel(copy.deepcopy(model.config), decoder=copy.deepcopy(model.decoder).unload())
    identity = model.fingerprint()
    assert identity not in (None, plain.fingerprint())
    ids = torch.randint(1, 400, (2, 9))
    expected = model(ids).pooler_output
    half = copy.deepcopy(model)
    model.merge_adapter()
    assert model.fingerprint() == identity
    torch.testing.assert_close(model(ids).pooler_output, expected, atol=1e-5, rtol=1e-4)
    for name, parameter in half.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    half.merge_adapter()
    assert half.fingerprint() == identity


def test_merged_weights_do_not_depend_on_how_a_product_is_summed() -> None:
    """Permuting the rank changes the order of the sum, as another device or number of threads does."""
    model = adapted()
    permuted = copy.deepcopy(model)
    for name, weight in permuted.named_parameters():
        if "lora_" in name:
            weight.data = weight.flip(0 if "lora_A" in name else 1)
    assert permuted.fingerprint() == model.fingerprint()
    model.merge_adapter()
    permuted.merge_adapter()
    for name, value in model.state_dict().items():
        assert value.equal(permuted.state_dict()[name]), name


def test_an_adapter_in_a_given_state_has_that_states_identity() -> None:
    """Sharded training passes the weights, which are not in the model then."""
    model = adapted()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in other.state_dict().items():
            if "lora_B" in name:
                value.mul_(2)
    assert model.fingerprint(other.state_dict()) == other.fingerprint() != model.fingerprint()

"""Merging adapters: the same weights on every device and in every dtype, known before the merge."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from modeling_llm2clip import LLM2CLIPTextModel
from tests.modeling_llm2clip import tiny

peft = pytest.importorskip("peft")


def adapted(**options: Any) -> LLM2CLIPTextModel:
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

"""Packing of short captions into shared rows: equal values at fewer tokens."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModel

from modeling_llm2clip import LLM2CLIPTextConfig
from tests.builders import tiny
from tests.modeling_llm2clip.flash import FlashOnCPU

LENGTHS = [3, 17, 1, 5, 9, 2, 2, 7]


def batch(side: str, lengths: list[int] = LENGTHS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    width = max(lengths)
    ids = torch.randint(1, 400, (len(lengths), width), generator=generator)
    places = torch.arange(width)
    places = places if side == "right" else places.flip(0)
    return {"input_ids": ids, "attention_mask": (places < torch.tensor(lengths)[:, None]).long()}


def tokens_of_decoder(model: Any, inputs: dict[str, Any]) -> tuple[Any, int]:
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output))
    output = model(**inputs)
    hook.remove()
    return output, seen[0].shape[0] * seen[0].shape[1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", list(tiny.DECODERS))
def test_packed_states_and_gradients_equal_those_of_padded_rows(model_type: str, attention: str, side: str) -> None:
    model = tiny.text_model(model_type, attention, num_prefix_tokens=0)
    inputs = batch(side)
    packed, cost = tokens_of_decoder(model, inputs)
    padded, padded_cost = tokens_of_decoder(model, {**inputs, "output_hidden_states": True})
    assert cost < 0.5 * padded_cost
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(packed.last_hidden_state[mask], padded.last_hidden_state[mask], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(packed.pooler_output, padded.pooler_output, atol=2e-5, rtol=1e-4)
    gradients = []
    for output in (packed, padded):
        model.zero_grad()
        output.pooler_output.square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, expected in gradients[1].items():
        scale = float(expected.abs().max()) + 1e-6
        torch.testing.assert_close(gradients[0][name] / scale, expected / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", [[6, 6, 6], [*[20] * 9, 10, 10]], ids=["full", "nearly full"])
def test_a_batch_with_little_padding_is_not_packed(lengths: list[int]) -> None:
    inputs = batch("left", lengths)
    assert tokens_of_decoder(tiny.text_model(), inputs)[1] == inputs["input_ids"].numel()


def with_flash(model_type: str = "llama", **fields: Any) -> Any:
    model = tiny.text_model(model_type, num_prefix_tokens=0, **fields)
    # The way that does not ask for the package.
    model.decoder.config._attn_implementation_internal = "flash_attention_2"
    return model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", list(tiny.DECODERS))
def test_flash_attention_equals_sdpa_on_captions_in_a_single_row(
    model_type: str, side: str, flash: FlashOnCPU
) -> None:
    """Some of these decoders have a sliding window, which is shorter than some of the captions."""
    inputs, gradients, pooled = batch(side), [], []
    models = with_flash(model_type), tiny.text_model(model_type, num_prefix_tokens=0)
    models[1].load_state_dict(models[0].state_dict())
    assert tokens_of_decoder(models[0], inputs)[1] == sum(LENGTHS)
    for model in models:
        pooled.append(model(**inputs).pooler_output)
        pooled[-1].square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert flash.sequences
    assert all(lengths == LENGTHS for lengths in flash.sequences)
    torch.testing.assert_close(*pooled, atol=2e-5, rtol=1e-4)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", list(tiny.DECODERS))
def test_flex_attention_equals_sdpa(model_type: str, side: str) -> None:
    model = tiny.text_model(model_type, "flex_attention", num_prefix_tokens=0)
    expected = tiny.text_model(model_type, "sdpa", num_prefix_tokens=0)
    expected.load_state_dict(model.state_dict())
    inputs = batch(side)
    # Without compiling, which takes minutes on a CPU.
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        found = model(**inputs).pooler_output
    torch.testing.assert_close(found, expected(**inputs).pooler_output, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gemma3_text"])
def test_the_window_of_a_plain_llm_is_lifted(model_type: str, flash: FlashOnCPU) -> None:
    decoder = AutoModel.from_config(tiny.decoder_config(model_type))
    model = tiny.wrapped(decoder).eval()
    expected = model(**batch("left")).pooler_output
    decoder.config._attn_implementation_internal = "flash_attention_2"
    torch.testing.assert_close(model(**batch("left")).pooler_output, expected, atol=2e-5, rtol=1e-4)
    assert flash.sequences
    causal = LLM2CLIPTextConfig(decoder_config=tiny.decoder_config(model_type), bidirectional=False)
    assert causal.decoder_config.sliding_window == 4


class Waits(TorchFunctionMode):
    """Lists the calls of the model's code for which the host would wait for a GPU.

    They read values, have an outcome whose shape depends on values, or copy a list to the device.
    """

    READ = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "equal", "allclose")
    SHAPED = ("nonzero", "argwhere", "masked_select", "unique", "bincount", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        index = args[1:2] if name in ("__getitem__", "__setitem__") else ()
        index = index[0] if index and isinstance(index[0], tuple) else index
        by_mask = any(isinstance(part, Tensor) and part.dtype == torch.bool for part in index)
        made = name in ("tensor", "as_tensor") and kwargs.get("device") is not None
        if name in (*self.READ, *self.SHAPED) or by_mask or made:
            frame = sys._getframe(1)
            if frame.f_globals["__name__"].startswith("modeling_llm2clip."):
                self.calls.append(f"{name} in line {frame.f_lineno} of {frame.f_code.co_filename}")
        return func(*args, **kwargs)


def waits_of(model: Any, inputs: dict[str, Tensor]) -> list[str]:
    with Waits() as waits:
        model(**inputs)
    return waits.calls


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
def test_a_packed_forward_waits_once_for_the_gpu(attention: str, flash: FlashOnCPU) -> None:
    model = with_flash() if attention == "flash" else tiny.text_model()
    inputs = batch("left")
    assert tokens_of_decoder(model, inputs)[1] < inputs["input_ids"].numel()
    assert len(waits := waits_of(model, inputs)) == 1, waits


@pytest.mark.parametrize(
    ("why", "waits"), [("own attention", 0), ("causal", 0), ("little padding", 1), ("no mask", 0)]
)
def test_a_forward_that_is_not_packed_waits_only_for_the_lengths_that_decide_it(why: str, waits: int) -> None:
    fields = {"own attention": {"bidirectional": None}, "causal": {"bidirectional": False}}.get(why, {})
    model, inputs = tiny.text_model(**fields), batch("left", [20] * 9 if why == "little padding" else LENGTHS)
    if why == "no mask":
        del inputs["attention_mask"]
    assert tokens_of_decoder(model, inputs)[1] == inputs["input_ids"].numel()
    assert len(found := waits_of(model, inputs)) == waits, found

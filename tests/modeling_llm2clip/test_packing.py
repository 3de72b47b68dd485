"""Packing of short captions into shared rows: equal values at fewer tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel
from transformers import modeling_flash_attention_utils as flash_utils

from modeling_llm2clip import LLM2CLIPTextConfig, LLM2CLIPTextModel
from modeling_llm2clip.compatibility_llm2clip import VERSION
from modeling_llm2clip.modeling_llm2clip_decoder import PackedBatch, assign_rows
from tests.modeling_llm2clip import tiny

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


def test_short_captions_fill_the_minimum_number_of_rows() -> None:
    assert assign_rows([8, 1, 1, 2, 4, 4, 3, 5, 4], 8)[2] == 4


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


def test_inputs_embeds_are_packed_like_input_ids() -> None:
    model = tiny.text_model()
    inputs = batch("left")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    expected = model(**inputs).pooler_output
    found = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).pooler_output
    torch.testing.assert_close(found, expected)


def test_a_batch_without_padding_is_not_packed() -> None:
    model = tiny.text_model()
    inputs = batch("left", [6, 6, 6])
    assert tokens_of_decoder(model, inputs)[1] == 18


def test_hidden_states_and_attentions_have_the_shape_of_the_batch() -> None:
    model = tiny.text_model(attn_implementation="eager")
    inputs = batch("left")
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    rows, width = inputs["input_ids"].shape
    assert output.hidden_states[0].shape[:2] == (rows, width)
    assert output.attentions[0].shape[-2:] == (width, width)


@pytest.mark.parametrize("single_row", [False, True])
def test_an_empty_batch_can_be_packed(single_row: bool) -> None:
    mask = torch.ones(0, 5, dtype=torch.long)
    packed = PackedBatch(mask, mask.cumsum(dim=1), single_row)
    assert packed.unpack(packed.pack(mask)).shape == (0, 5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_captions_in_one_row_do_not_attend_to_each_other(attention: str) -> None:
    model = tiny.text_model(attn_implementation=attention)
    inputs = batch("left")
    mask = inputs["attention_mask"]
    rows = PackedBatch(mask, mask.cumsum(dim=1)).caption_ids.tolist()
    assert any(len(set(row) - {0}) > 1 for row in rows), "no two captions share a row here"
    with torch.no_grad():
        before = model(**inputs).pooler_output
        changed = inputs["input_ids"].clone()
        changed[1] = (changed[1] + 7) % 400
        after = model(**{**inputs, "input_ids": changed}).pooler_output
    others = [row for row in range(len(LENGTHS)) if row != 1]
    assert after[others].equal(before[others])
    assert not torch.allclose(after[1], before[1])


class FlashOnCPU:
    """Exact stand-ins for the functions of flash-attn, called by transformers' own code."""

    def __init__(self) -> None:
        self.sequences: list[list[int]] = []

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> Tensor:
        assert cu_seqlens_q.dtype == torch.int32
        assert cu_seqlens_q.equal(cu_seqlens_k)
        assert cu_seqlens_q[-1] == len(q)
        lengths = cu_seqlens_q.diff().tolist()
        assert max(lengths) == max_seqlen_q == max_seqlen_k
        self.sequences.append(lengths)
        groups = q.shape[1] // k.shape[1]
        outputs = []
        for query, key, value in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            scores = torch.einsum("qhd,khd->hqk", query, key) * (softmax_scale or q.shape[-1] ** -0.5)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            distance = torch.arange(len(query))[:, None] - torch.arange(len(query))
            hidden = (distance < 0) & torch.tensor(causal)
            if window_size[0] >= 0:
                hidden = hidden | (distance > window_size[0]) | (-distance > window_size[1])
            outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), value))
        return torch.cat(outputs)

    def same_lengths(self, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        batch, tokens = q.shape[:2]
        ends = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32)
        kwargs |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": tokens, "max_seqlen_k": tokens}
        return self.varlen(*(x.flatten(0, 1) for x in (q, k, v)), **kwargs).unflatten(0, (batch, tokens))


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashOnCPU:
    if VERSION < (5, 19):
        pytest.skip("before 5.19, transformers calls flash-attn in a form that the stand-in does not have")
    functions = FlashOnCPU()
    process = flash_utils._lazy_define_process_function(functions.varlen)
    pads = (flash_utils._pad_input, flash_utils._unpad_input)
    imported = ((functions.same_lengths, functions.varlen, None, *pads), (process, dict))
    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", lambda *args, **kwargs: imported)
    return functions


def with_flash(model_type: str = "llama", **fields: Any) -> Any:
    model = tiny.text_model(model_type, num_prefix_tokens=0, **fields)
    # The way that does not ask for the package.
    model.decoder.config._attn_implementation_internal = "flash_attention_2"
    return model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", list(tiny.DECODERS))
def test_flash_attention_gets_captions_in_a_single_row(model_type: str, side: str, flash: FlashOnCPU) -> None:
    model = with_flash(model_type)
    inputs = batch(side)
    packed, cost = tokens_of_decoder(model, inputs)
    assert cost == sum(LENGTHS)
    assert all(lengths == LENGTHS for lengths in flash.sequences)
    assert flash.sequences
    padded, _ = tokens_of_decoder(model, {**inputs, "output_hidden_states": True})
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(packed.last_hidden_state[mask], padded.last_hidden_state[mask], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(packed.pooler_output, padded.pooler_output, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", list(tiny.DECODERS))
def test_flash_attention_equals_sdpa_in_embeddings_and_gradients(model_type: str, flash: FlashOnCPU) -> None:
    """Some of these decoders have a sliding window, which is shorter than some of the captions."""
    inputs, gradients, pooled = batch("left"), [], []
    models = with_flash(model_type), tiny.text_model(model_type, num_prefix_tokens=0)
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        pooled.append(model(**inputs).pooler_output)
        pooled[-1].square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert flash.sequences
    torch.testing.assert_close(*pooled, atol=2e-5, rtol=1e-4)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", list(tiny.DECODERS))
def test_flex_attention_separates_captions(model_type: str, side: str) -> None:
    model = tiny.text_model(model_type, "flex_attention", num_prefix_tokens=0)
    expected = tiny.text_model(model_type, "sdpa", num_prefix_tokens=0)
    expected.load_state_dict(model.state_dict())
    inputs = batch(side)
    # Without compiling, which takes minutes on a CPU.
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        packed, cost = tokens_of_decoder(model, inputs)
        padded = model(**inputs, output_hidden_states=True)
    assert cost < 0.5 * inputs["input_ids"].numel()
    for found in (packed, padded):
        torch.testing.assert_close(found.pooler_output, expected(**inputs).pooler_output, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gemma3_text"])
def test_the_window_of_a_plain_llm_is_lifted(model_type: str, flash: FlashOnCPU) -> None:
    decoder = AutoModel.from_config(tiny.decoder_config(model_type))
    model = LLM2CLIPTextModel.from_decoder(decoder).eval()
    expected = model(**batch("left")).pooler_output
    decoder.config._attn_implementation_internal = "flash_attention_2"
    torch.testing.assert_close(model(**batch("left")).pooler_output, expected, atol=2e-5, rtol=1e-4)
    assert flash.sequences
    causal = LLM2CLIPTextConfig(decoder_config=tiny.decoder_config(model_type), bidirectional=False)
    assert causal.decoder_config.sliding_window == 4


def test_a_nearly_full_batch_is_not_packed() -> None:
    model = tiny.text_model()
    inputs = batch("left", [20, 20, 20, 20, 20, 20, 20, 20, 20, 10, 10])
    assert tokens_of_decoder(model, inputs)[1] == inputs["input_ids"].numel()

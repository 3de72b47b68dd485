"""Short captions share rows: what they hold is the same, and it costs fewer tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling_llm2clip.modeling_llm2clip_packing import PackedBatch, assign_rows
from tests.modeling import tiny

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


@pytest.mark.parametrize("seed", range(20))
def test_every_token_has_a_place_of_its_own_and_rows_are_few(seed: int) -> None:
    rng = random.Random(seed)
    capacity = rng.randint(1, 60)
    lengths = [rng.randint(0, capacity) for _ in range(rng.randint(1, 80))]
    rows, starts, num_rows = assign_rows(lengths, capacity)
    taken = [
        (row, start + token)
        for row, start, length in zip(rows, starts, lengths, strict=True)
        for token in range(length)
    ]
    assert len(set(taken)) == sum(lengths)
    assert all(row < num_rows and token < capacity for row, token in taken)
    filled = [sum(length for length, own in zip(lengths, rows, strict=True) if own == row) for row in range(num_rows)]
    assert sum(2 * tokens <= capacity for tokens in filled) <= 1, "two half-empty rows could be one"


def test_rows_are_as_few_as_the_tokens_allow_where_captions_are_short() -> None:
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


def test_embeddings_are_packed_like_token_ids() -> None:
    model = tiny.text_model()
    inputs = batch("left")
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    expected = model(**inputs).pooler_output
    found = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).pooler_output
    torch.testing.assert_close(found, expected)


def test_a_batch_without_padding_is_left_as_it_is() -> None:
    model = tiny.text_model()
    inputs = batch("left", [6, 6, 6])
    assert tokens_of_decoder(model, inputs)[1] == 18


def test_what_shows_every_layer_has_the_shape_of_the_batch() -> None:
    model = tiny.text_model(attn_implementation="eager")
    inputs = batch("left")
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    rows, width = inputs["input_ids"].shape
    assert output.hidden_states[0].shape[:2] == (rows, width)
    assert output.attentions[0].shape[-2:] == (width, width)


def test_padding_unpacks_to_zero() -> None:
    inputs = batch("left")
    mask = inputs["attention_mask"]
    packed = PackedBatch(mask, mask.cumsum(dim=1))
    states = packed.pack(inputs["input_ids"])
    assert packed.unpack(states).equal(inputs["input_ids"] * mask)


def test_positions_begin_anew_with_every_caption_of_a_row() -> None:
    mask = batch("left")["attention_mask"]
    packed = PackedBatch(mask, mask.cumsum(dim=1))
    for caption in range(1, len(LENGTHS) + 1):
        positions = packed.position_ids[packed.caption_ids == caption]
        assert positions.tolist() == list(range(LENGTHS[caption - 1]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_captions_of_a_row_do_not_see_each_other(attention: str) -> None:
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


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_without_a_mask_of_our_own_gets_no_shared_rows(attention: str) -> None:
    """It would see a row as one caption: with its 2-D mask transformers leaves the positions out of account."""
    model = tiny.text_model()
    mask = batch("left")["attention_mask"]
    order = mask.cumsum(dim=1)
    assert model._packing(mask, order, {}) is not None
    model.decoder.config._attn_implementation_internal = attention
    assert model.decoder.config._attn_implementation == attention
    assert model._packing(mask, order, {}) is None
    assert model._decoder_mask(mask).equal(mask)


def test_a_batch_that_is_nearly_full_is_left_as_it_is() -> None:
    model = tiny.text_model()
    inputs = batch("left", [20, 20, 20, 20, 20, 20, 20, 20, 20, 10, 10])
    assert tokens_of_decoder(model, inputs)[1] == inputs["input_ids"].numel()

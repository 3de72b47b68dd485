"""The text tower: parity with the original encoder, bidirectional attention, independence of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llm2clip.encoders import embed_captions
from llm2clip.encoders.query_encoder import QueryEncoder
from llm2clip.models.new_model import from_vision_text_pretrained
from llm2clip.models.prompting import with_prompt
from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.modeling_llm2clip_utils import CPU_BATCH_TOKENS
from tests.builders import tiny
from tests.golden import load_golden
from tests.modeling_llm2clip.llm2vec import FIXTURES, load_text_model

CAPTIONS = ["a small dog", "two children play football in a green park near a river", "a red bus, seen from above"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FIXTURES)
def test_states_equal_llm2vec(name: str, attention: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    model = load_text_model(golden, tmp_path, attention)
    for batch in ("pairs", "raw_no_separator", "dup_separator", "single"):
        inputs = golden.group(f"in/{batch}")
        with torch.no_grad():
            states = model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
        real, expected = inputs["attention_mask"].bool(), golden[f"out/{batch}/last_hidden_state"]
        torch.testing.assert_close(states[real], expected[real], **golden.meta["tolerance"])


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last_token", "eos_token", "bos_token"])
@pytest.mark.parametrize("name", FIXTURES)
def test_pooling_equals_llm2vec(name: str, pooling: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    model = load_text_model(golden, tmp_path, pooling=pooling)
    inputs = golden.group("in/pairs")
    for skip, pooling_mask in ((0, inputs["attention_mask"]), (1, inputs["embed_mask"])):
        key = f"out/pairs/pooled/{pooling}_skip{skip}"
        if key not in golden.tensors or not len(golden[key]):
            continue  # this tokenizer adds no BOS, and the original then pools nothing
        with torch.no_grad():
            pooled = model(inputs["input_ids"], inputs["attention_mask"], pooling_mask).pooler_output
        golden.close(pooled, key)


PROJECTED = {
    "embedding_gemma2_text": {
        "embedding_dim": 24, "global_head_dim": 8, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "opt": {"word_embed_proj_dim": 24, "ffn_dim": 48},
}  # fmt: skip


@pytest.mark.parametrize("model_type", list(PROJECTED))
def test_the_width_of_an_embedding_is_what_the_text_model_returns(model_type: str, tmp_path: Path) -> None:
    """Their last layer projects the states of width 32 to 24."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this version of transformers does not have it")
    decoder = AutoModel.from_config(AutoConfig.for_model(model_type, **{**tiny.DECODER, **PROJECTED[model_type]}))
    tower, processor = tiny.wrapped(decoder.eval(), bidirectional=None), tiny.processor()
    assert tower.encode(CAPTIONS, processor.tokenizer).shape == (3, tower.config.hidden_size) == (3, 24)
    vision = tiny.joint_model().vision_model
    model = from_vision_text_pretrained(vision, tower, projection_dim=16).eval()
    model.save_pretrained(tmp_path)
    loaded = LLM2CLIPModel.from_pretrained(tmp_path)
    rows = [each.encode_text(CAPTIONS, processor) for each in (model, loaded)]
    torch.testing.assert_close(*rows)
    student = QueryEncoder(decoder, processor.tokenizer, 8)
    assert student.encode(CAPTIONS).shape == (3, 8)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", list(tiny.DECODERS))
def test_every_decoder_is_bidirectional_unless_it_is_a_causal_baseline(model_type: str, attention: str) -> None:
    """Changing the last token changes the first state, with or without padding, even beyond a sliding window.

    A causal baseline stays causal.
    """
    model = tiny.text_model(model_type, attention)
    ids = torch.randint(1, 400, (1, 12))
    changed = ids.clone()
    changed[0, -1] += 1
    padding = torch.zeros(1, 3, dtype=torch.long)
    mask = torch.cat([padding, torch.ones(1, 12, dtype=torch.long)], dim=1)
    with torch.no_grad():
        plain, moved = (model(tokens).last_hidden_state[0, 0] for tokens in (ids, changed))
        padded = model(torch.cat([padding, ids], dim=1), mask).last_hidden_state[0, 3]
        causal = tiny.text_model(model_type, attention, bidirectional=False)
        baseline = [causal(tokens).last_hidden_state[0, :-1] for tokens in (ids, changed)]
    assert (plain - moved).abs().max() > 1e-2
    torch.testing.assert_close(plain, padded, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(*baseline)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last_token", "bos_token"])
@pytest.mark.parametrize("model_type", list(tiny.DECODERS))
def test_embedding_depends_only_on_the_caption(model_type: str, pooling: str) -> None:
    """It is independent of the batch, the padding side and the attention implementation."""
    model, tokenizer = tiny.text_model(model_type, pooling=pooling), tiny.processor().tokenizer
    expected = torch.cat([model.encode([caption], tokenizer) for caption in CAPTIONS])
    found = [model.encode(CAPTIONS, tokenizer), model.encode(CAPTIONS, tokenizer, batch_size=2)]
    tokenizer.padding_side = "right"
    found.append(model.encode(CAPTIONS, tokenizer))
    model.set_attn_implementation("eager")
    found.append(model.encode(CAPTIONS, tokenizer))
    for rows in found:
        torch.testing.assert_close(rows, expected, atol=2e-5, rtol=1e-4)


def test_prefix_is_context_but_not_pooled() -> None:
    model = tiny.text_model()
    inputs = tiny.processor().tokenizer(CAPTIONS[:1], return_tensors="pt")
    output, prefix_tokens = model(**inputs), model.config.num_prefix_tokens
    torch.testing.assert_close(output.pooler_output[0], output.last_hidden_state[0, prefix_tokens:].mean(dim=0))
    explicit = model(**inputs, pooling_mask=inputs["attention_mask"]).pooler_output
    assert not torch.allclose(explicit, output.pooler_output)


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean"])
def test_pooled_output_of_a_16_bit_model_is_not_rounded_to_16_bits(pooling: str) -> None:
    """The states have many values to average; rounding the mean again would lose most of what that gains."""
    model = tiny.text_model(pooling=pooling, prompt_prefix="", num_prefix_tokens=0).to(torch.bfloat16)
    output = model(torch.randint(1, 400, (1, 40)))
    weights = torch.arange(1.0, 41) if pooling == "weighted_mean" else torch.ones(40)
    expected = (output.last_hidden_state[0].double() * weights[:, None]).sum(dim=0) / weights.sum()
    assert output.pooler_output.dtype == torch.float32
    torch.testing.assert_close(output.pooler_output[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_a_plain_tokenizer_without_the_suffix_is_rejected() -> None:
    tokenizer, prefix_tokens = with_prompt(tiny.plain_tokenizer(), "", tiny.SUFFIX, max_length=64)
    ids = tokenizer("")["input_ids"]
    model = tiny.text_model(num_prefix_tokens=prefix_tokens, prompt_prefix="", prompt_token_ids=ids)
    assert model.encode(CAPTIONS, tokenizer).shape == (3, tiny.HIDDEN)
    plain = tiny.plain_tokenizer()
    plain.pad_token = plain.eos_token
    with pytest.raises(ValueError, match="does not add the prompt"):
        model.encode(CAPTIONS, plain)


def batches_of(model: Any, texts: list[str], **options: Any) -> tuple[torch.Tensor, list[torch.Size]]:
    """The embeddings, and the shapes of the batches that were computed."""
    shapes = []
    model.register_forward_pre_hook(lambda _, __, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True)
    return model.encode(texts, tiny.processor().tokenizer, **options), shapes


def test_repeated_captions_are_encoded_once_and_share_the_result() -> None:
    model = tiny.text_model()
    texts = ["a red bus", "a dog", "a red bus", "two children in a park", "a dog", "a dog"]
    rows, shapes = batches_of(model, texts)
    assert sum(captions for captions, _ in shapes) == 3
    expected = torch.cat([model.encode(text, tiny.processor().tokenizer) for text in texts])
    torch.testing.assert_close(rows, expected, atol=2e-5, rtol=1e-4)


def test_cpu_batches_respect_the_token_budget_and_batch_size() -> None:
    texts = [" ".join(["dog"] * (1 + number % 9)) + f" {number}" for number in range(150)]
    _, shapes = batches_of(tiny.text_model(), texts)
    assert len(shapes) > 2
    assert all(captions * tokens <= CPU_BATCH_TOKENS and captions <= 64 for captions, tokens in shapes)
    _, shapes = batches_of(tiny.text_model(), texts, batch_size=3)
    assert max(captions for captions, _ in shapes) == 3


def test_embeddings_that_are_not_finite_are_an_error() -> None:
    model, processor = tiny.joint_model(), tiny.processor()
    torch.nn.init.constant_(model.text_adapter.proj.weight, float("nan"))
    torch.nn.init.constant_(model.visual_projection.weight, float("inf"))
    with pytest.raises(ValueError, match=r"3 of 3 captions are NaN or infinite, first that of item 0"):
        model.encode_text(["a dog", "a cat", "a dog"], processor)
    with pytest.raises(ValueError, match=r"\d of \d images are NaN or infinite"):
        model.encode_image(tiny.IMAGES, processor)
    torch.nn.init.constant_(model.text_model.decoder.norm.weight, float("nan"))
    with pytest.raises(ValueError, match=r"NaN or infinite: a dog"):
        embed_captions("a dog", model.text_model, processor)

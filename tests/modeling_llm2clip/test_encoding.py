"""Encoding of captions: batches of similar length, repeated captions once, results in input order."""

from __future__ import annotations

import platform
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llm2clip.encoders import embed_captions
from modeling_llm2clip import with_prompt
from modeling_llm2clip.modeling_llm2clip_utils import CPU_BATCH_TOKENS, token_batches
from tests.modeling_llm2clip import tiny


@pytest.mark.parametrize("seed", range(10))
def test_batches_contain_every_caption_once_and_respect_both_limits(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 120) for _ in range(rng.randint(1, 200))]
    max_tokens, max_captions = rng.randint(60, 600), rng.randint(1, 20)
    batches = token_batches(lengths, max_tokens, max_captions)
    assert sorted(caption for batch in batches for caption in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[caption] for caption in batch)
        assert len(batch) <= max_captions
        assert len(batch) == 1 or len(batch) * longest <= max_tokens
    padded = sum(len(batch) * max(lengths[caption] for caption in batch) for batch in batches)
    assert padded <= sum(lengths) + max_tokens + 120 * max_captions, "captions of a batch differ much in length"


def test_batches_are_limited_by_tokens_alone_unless_max_captions_is_set() -> None:
    assert token_batches([8] * 100, 16_384) == [list(range(100))]
    assert len(token_batches([8] * 100, 16_384, 64)) == 2


def tokenizer() -> Any:
    return with_prompt(tiny.plain_tokenizer(), tiny.PREFIX, tiny.SUFFIX, max_length=64)[0]


def batches_of(model: Any, texts: list[str], **options: Any) -> tuple[torch.Tensor, list[torch.Size]]:
    shapes = []
    forward = model.forward

    def counting(**inputs: Any) -> Any:
        shapes.append(inputs["input_ids"].shape)
        return forward(**inputs)

    model.forward = counting
    rows = model.encode(texts, tokenizer(), **options)
    model.forward = forward
    return rows, shapes


def test_repeated_captions_are_encoded_once_and_share_the_result() -> None:
    model = tiny.text_model()
    texts = ["a red bus", "a dog", "a red bus", "two children in a park", "a dog", "a dog"]
    rows, shapes = batches_of(model, texts)
    assert sum(captions for captions, _ in shapes) == 3
    expected = torch.cat([model.encode(text, tokenizer()) for text in texts])
    torch.testing.assert_close(rows, expected, atol=2e-5, rtol=1e-4)


def test_cpu_batches_respect_the_token_budget_and_batch_size() -> None:
    model = tiny.text_model()
    texts = [" ".join(["dog"] * (1 + number % 9)) + f" {number}" for number in range(150)]
    _, shapes = batches_of(model, texts)
    assert len(shapes) > 2
    assert all(captions * tokens <= CPU_BATCH_TOKENS and captions <= 64 for captions, tokens in shapes)
    _, shapes = batches_of(model, texts, batch_size=3)
    assert max(captions for captions, _ in shapes) == 3


def test_bfloat16_llm_returns_float32_embeddings_close_to_float32() -> None:
    model = tiny.text_model()
    expected = model.encode(tiny.CAPTIONS, tokenizer())
    rows = model.to(torch.bfloat16).encode(tiny.CAPTIONS, tokenizer())
    assert rows.dtype == torch.float32
    assert F.cosine_similarity(rows, expected).min() > 0.99


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the thresholds are glibc's")
def test_keep_freed_memory_avoids_page_faults() -> None:
    code = """
import resource, torch
from modeling_llm2clip.modeling_llm2clip_utils import keep_freed_memory

def fresh_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.ones(700_000) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh_pages()
without = fresh_pages()
keep_freed_memory()
fresh_pages()
print(without, fresh_pages())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    without, kept = map(int, done.stdout.split())
    # 20 times 4 blocks of 684 pages.
    assert without > 10_000
    assert kept < 1_000


def test_embeddings_that_are_not_finite_are_an_error() -> None:
    model = tiny.joint_model().eval()
    torch.nn.init.constant_(model.text_adapter.proj.weight, float("nan"))
    torch.nn.init.constant_(model.visual_projection.weight, float("inf"))
    processor = tiny.processor()
    with pytest.raises(ValueError, match=r"embeddings of 3 of 3 captions are NaN or infinite, first that of item 0: "):
        model.encode_text(["a dog", "a cat", "a dog"], processor)
    with pytest.raises(ValueError, match=r"embeddings of \d of \d images are NaN or infinite"):
        model.encode_image(tiny.IMAGES, processor)
    torch.nn.init.constant_(model.text_model.decoder.norm.weight, float("nan"))
    with pytest.raises(ValueError, match="embeddings of 1 of 1 captions are NaN or infinite"):
        model.text_model.encode("a dog", processor.tokenizer)
    with pytest.raises(ValueError, match=r"1 of 1 captions are NaN or infinite: a dog\."):
        embed_captions("a dog", model.text_model, processor)

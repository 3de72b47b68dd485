from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from llm2clip.data import PairCollator
from llm2clip.models.prompting import with_prompt
from tests.builders.tiny import PREFIX, SUFFIX, plain_tokenizer

Prompted = tuple[PreTrainedTokenizerFast, int]


@pytest.fixture(scope="module")
def prompted() -> Prompted:
    return with_prompt(plain_tokenizer(), PREFIX, SUFFIX, max_length=64)


def _pair(anchor: str, positive: str, **fields: Any) -> dict[str, Any]:
    base = {"negative": None, "instruction": None, "positive_instruction": None, "source": "s"}
    return {**base, "anchor": anchor, "positive": positive, **fields}


def _split(tensors: dict[str, torch.Tensor], row: int) -> tuple[list[int], list[int]]:
    """The token ids of a row without padding: context, pooled."""
    attention, pooling = (tensors[name][row].bool() for name in ("attention_mask", "pooling_mask"))
    assert not (pooling & ~attention).any()
    ids = tensors["input_ids"][row]
    return ids[attention & ~pooling].tolist(), ids[pooling].tolist()


def test_pooling_covers_caption_and_suffix(prompted: Prompted) -> None:
    tokenizer, num_prefix = prompted
    batch = PairCollator(tokenizer, num_prefix, 64)([_pair("a cat", "an animal"), _pair("a very long dog", "beast")])
    assert set(batch) == {"anchor", "positive", "num_truncated", "source"}
    raw = plain_tokenizer()

    def encode(text: str) -> list[int]:
        return raw(text, add_special_tokens=False)["input_ids"]

    for place, captions in (("anchor", ["a cat", "a very long dog"]), ("positive", ["an animal", "beast"])):
        tensors = batch[place]
        assert {(value.dtype, value.shape) for value in tensors.values()} == {
            (torch.int64, tensors["input_ids"].shape)
        }
        assert tensors["attention_mask"][:, -1].all(), "padding is on the left"
        for row, caption in enumerate(captions):
            context, pooled = _split(tensors, row)
            assert context == [raw.bos_token_id, *encode(PREFIX)]
            assert pooled == encode(caption) + encode(SUFFIX)


@pytest.mark.parametrize(
    "instruction", ["Given a caption, find a similar one: ", "Given a caption:", "Find:\n", "Gib\u00e4 \U0001f98a: "]
)
def test_instructions_are_not_pooled(prompted: Prompted, instruction: str) -> None:
    tokenizer, num_prefix = prompted
    collator = PairCollator(tokenizer, num_prefix, 64)
    caption = "caf\u00e9 \U0001f98a fox"
    tensors, cut = collator.tokenize([caption, caption], [instruction, None])
    assert cut == 0
    context, pooled = _split(tensors, 0)
    bare_context, bare_pooled = _split(tensors, 1)
    text = instruction if instruction[-1].isspace() else instruction + " "
    assert tokenizer.decode(context[len(bare_context) :]) == text.rstrip(" ")
    assert tokenizer.decode(pooled).strip() == tokenizer.decode(bare_pooled)
    assert [*context, *pooled] == tokenizer(text + caption)["input_ids"]


def test_each_instruction_precedes_the_texts_of_its_side(prompted: Prompted) -> None:
    tokenizer, num_prefix = prompted
    pair = _pair("a", "b", negative="c", instruction="find: ", positive_instruction="found: ")
    batch = PairCollator(tokenizer, num_prefix, 64)([pair])
    for place, instruction in (("anchor", "find:"), ("positive", "found:"), ("negative", "found:")):
        assert tokenizer.decode(_split(batch[place], 0)[0]).endswith(instruction)
    assert tokenizer.decode(_split(batch["negative"], 0)[1]).strip() == "c<|eot_id|>"


def test_long_captions_are_truncated_before_the_suffix(prompted: Prompted) -> None:
    tokenizer, num_prefix = prompted
    collator = PairCollator(tokenizer, num_prefix, 20)
    long = "one two three four five six seven eight nine ten eleven twelve"
    batch = collator([_pair(long, "short", instruction="hi: "), _pair("b", long)])
    assert batch["num_truncated"] == 2
    assert batch["anchor"]["input_ids"].shape[1] == 20
    suffix = plain_tokenizer()(SUFFIX, add_special_tokens=False)["input_ids"]
    context, pooled = _split(batch["anchor"], 0)
    assert pooled[-len(suffix) :] == suffix
    assert tokenizer.decode(context).endswith("hi:")
    assert long.startswith(tokenizer.decode(pooled[: -len(suffix)]).strip())
    with pytest.raises(ValueError, match=r"instruction 'one two .* leaves no room for its caption within 20 tokens"):
        collator([_pair("b", "c", instruction=long)])


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([_pair("a", "b", negative="c"), _pair("d", "e")], "1 of 2 pairs of a batch have no negative"),
        ([{"anchor": "a", "positive": "b"}, {"anchor": "c"}], "Row 1 of a batch has no text in 'positive'"),
        ([{"anchor": 1, "positive": "b"}], "anchor of row 0 .* must be text, not"),
    ],
    ids=["negative", "positive", "number"],
)
def test_unusable_tokenizers_and_pairs_are_rejected(pairs: Any, message: str, prompted: Prompted) -> None:
    tokenizer, num_prefix = prompted
    with pytest.raises(ValueError, match=message):
        PairCollator(tokenizer, num_prefix, 64)(pairs)
    with pytest.raises(ValueError, match="leaves no room for a caption"):
        PairCollator(tokenizer, num_prefix, num_prefix)
    bare = plain_tokenizer()
    bare.pad_token = None
    with pytest.raises(ValueError, match="no padding token"):
        PairCollator(bare, 1)


@pytest.mark.parametrize("negative", [{}, {"negative": "a stone"}])
def test_rows_of_a_plain_dataset_need_only_texts(prompted: Prompted, negative: dict[str, str]) -> None:
    tokenizer, num_prefix = prompted
    collator = PairCollator(tokenizer, num_prefix, 64)
    rows = [{"anchor": " a cat\n", "positive": "an animal", **negative}, {"anchor": "b", "positive": "c", **negative}]
    (batch,) = DataLoader(rows, batch_size=2, collate_fn=collator)
    assert set(batch) == {"anchor", "positive", *negative, "num_truncated"}
    expected = collator([_pair("a cat", "an animal", **negative), _pair("b", "c", **negative)])
    for side in ("anchor", "positive", *negative):
        assert all(torch.equal(batch[side][name], expected[side][name]) for name in expected[side])

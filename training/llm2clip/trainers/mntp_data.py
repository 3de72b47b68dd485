"""Blocks of tokens for masked next token prediction, and the collator that masks them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from llm2clip.data import SampleIndex
from llm2clip.data.sampling import EpochDataset, stable_seed
from llm2clip.trainers.mntp_config import MNTPConfig


class TokenBlocks(EpochDataset):
    """Texts, concatenated and cut into blocks of `block_size` tokens, without the incomplete last block.

    Raises:
        ValueError: The texts are shorter than one block.
    """

    def __init__(self, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> None:
        ids = torch.tensor(list(chain.from_iterable(_token_ids(texts, tokenizer))), dtype=torch.int32)
        count = len(ids) // block_size
        if count == 0:
            raise ValueError(f"the texts have {len(ids)} tokens and do not fill one block of {block_size}.")
        self.blocks = ids[: count * block_size].view(count, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: SampleIndex) -> dict[str, Any]:
        return {"input_ids": self.blocks[index.index].long(), "index": index}


def _token_ids(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    remaining = iter(texts)
    while batch := list(islice(remaining, 1000)):
        yield from tokenizer(batch, verbose=False)["input_ids"]


class MaskCollator:
    """Masks tokens with the collator of transformers.

    A row is a dict with `input_ids`, or with `text`, which becomes BOS and its tokens, cut to `block_size`. Rows of
    [`TokenBlocks`] are masked as a function of the seed and their indices alone; for other rows, the masks come from
    torch's global generator.

    Args:
        tokenizer: Tokenizer of the LLM. Its mask token is set, and its padding token if it has none.

    Raises:
        ValueError: The mask token is not in the vocabulary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: MNTPConfig) -> None:
        if config.mask_token not in tokenizer.get_vocab():
            raise ValueError(f"mask_token {config.mask_token!r} is not a token of {tokenizer.name_or_path}.")
        tokenizer.mask_token = config.mask_token
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.tokenizer, self.block_size, self.seed = tokenizer, config.block_size, config.sampling_seed
        self.collator = DataCollatorForLanguageModeling(
            tokenizer,
            mlm_probability=config.mlm_probability,
            mask_replace_prob=config.mask_replace_prob,
            random_replace_prob=config.random_replace_prob,
        )

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [{"input_ids": self._token_ids(sample)} for sample in samples]
        if "index" not in samples[0]:
            return dict(self.collator(rows))
        first: SampleIndex = samples[0]["index"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_seed(self.seed, first.epoch, first.index))
            return {**self.collator(rows), "keys": [f"block {sample['index'].index}" for sample in samples]}

    def _token_ids(self, sample: dict[str, Any]) -> Any:
        if "input_ids" in sample:
            return sample["input_ids"]
        # Special tokens would include the prompt of a caption tokenizer.
        ids = self.tokenizer(sample["text"], add_special_tokens=False, verbose=False)["input_ids"]
        bos = self.tokenizer.bos_token_id
        return [*([] if bos is None else [bos]), *ids][: self.block_size]

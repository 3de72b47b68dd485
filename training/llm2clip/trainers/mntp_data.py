"""Blocks of tokens for masked next token prediction, and the collator that masks them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from llm2clip.data import SampleIndex
from llm2clip.data.sampling import EpochDataset, stable_seed
from llm2clip.trainers.mntp_config import MNTPConfig


class TokenBlocks(EpochDataset):
    """Texts, joined and cut into blocks of equal length; a rest that fills no block is left out.

    Args:
        texts: The texts.
        tokenizer: The LLM's own tokenizer.
        block_size: Tokens per block.

    Raises:
        ValueError: The texts do not fill one block.
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
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == 1000:
            yield from tokenizer(batch, verbose=False)["input_ids"]
            batch = []
    if batch:
        yield from tokenizer(batch, verbose=False)["input_ids"]


class MaskCollator:
    """Masks tokens with transformers' collator; what it masks is a function of the seed and the samples alone.

    Args:
        tokenizer: The LLM's own tokenizer; gets the mask token, and EOS as padding token if it has none.
        config: The settings.

    Raises:
        ValueError: The mask token is not one token of the vocabulary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: MNTPConfig) -> None:
        if config.mask_token not in tokenizer.get_vocab():
            raise ValueError(f"mask_token {config.mask_token!r} is not a token of {tokenizer.name_or_path}.")
        tokenizer.mask_token = config.mask_token
        # Blocks are all of one length, but the collator insists on a padding token.
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.seed = config.sampling_seed
        self.collator = DataCollatorForLanguageModeling(
            tokenizer,
            mlm_probability=config.mlm_probability,
            mask_replace_prob=config.mask_replace_prob,
            random_replace_prob=config.random_replace_prob,
        )

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        first: SampleIndex = samples[0]["index"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_seed(self.seed, first.epoch, first.index))
            return dict(self.collator([{"input_ids": sample["input_ids"]} for sample in samples]))

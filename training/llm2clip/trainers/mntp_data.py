"""Blocks of tokens for masked next token prediction, and the collator that masks them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from llm2clip.data import CaptionSource, SampleIndex, load_source
from llm2clip.data.captions import distinct_captions
from llm2clip.data.sampling import EpochDataset, stable_seed
from llm2clip.data.table_identity import table_identity
from llm2clip.store.store import caption_keys
from llm2clip.trainers.mntp_config import MNTPConfig
from llm2clip.utils.shared_files import shared_file

# Raise it when the tokens of captions are computed in another way.
TOKEN_VERSION = 1


class TokenBlocks(EpochDataset):
    """Blocks of `block_size` successive tokens, without the incomplete last block.

    Args:
        tokens: `(tokens,)` int32, which may be a file that is mapped into memory.

    Raises:
        ValueError: The tokens do not fill one block.
    """

    def __init__(self, tokens: np.ndarray, block_size: int) -> None:
        count = len(tokens) // block_size
        if count == 0:
            raise ValueError(f"the texts have {len(tokens)} tokens and do not fill one block of {block_size}.")
        self.blocks = tokens[: count * block_size].reshape(count, block_size)

    def content_digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.blocks).data).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: SampleIndex) -> dict[str, Any]:
        return {"input_ids": torch.from_numpy(self.blocks[index.index].astype(np.int64)), "index": index}


def source_tokens(sources: Sequence[CaptionSource], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Tokenize the distinct captions of sources, one after another.

    Returns:
        `(tokens,)` int32: a file that all processes and later runs share. Streams, which have no fingerprint, are
        identified by their captions, which every process reads. With a tokenizer that is not of the `tokenizers`
        library, and so cannot be identified, the tokens are in memory.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts = list(token_batches(distinct_captions(sources), tokenizer))
        return np.concatenate(parts or [np.zeros(0, dtype=np.int32)])
    identity: dict[str, Any] = {"version": TOKEN_VERSION, "tokenizer": backend.to_str()}
    captions: list[str] | None = None
    if any(source.streaming for source in sources):
        captions = distinct_captions(sources)
        identity["captions"] = hashlib.sha256(caption_keys(captions).data).hexdigest()
    else:
        opened = [load_source(one, with_images=False) for one in sources]
        columns = [one.caption_columns for one in sources]
        identity["tables"] = list(zip(map(table_identity, opened), columns, strict=True))

    def write(path: Path) -> None:
        with path.open("wb") as file:
            for tokens in token_batches(distinct_captions(sources) if captions is None else captions, tokenizer):
                file.write(tokens.tobytes())

    path = shared_file("tokens", identity, write)
    return np.memmap(path, dtype=np.int32, mode="r") if path.stat().st_size else np.zeros(0, dtype=np.int32)


def token_batches(captions: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Yield the tokens of captions, with special tokens, a thousand captions at a time."""
    for start in range(0, len(captions), 1000):
        ids = tokenizer(list(captions[start : start + 1000]), verbose=False)["input_ids"]
        yield np.array(list(chain.from_iterable(ids)), dtype=np.int32)


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

"""How many tokens captions have, and how many of them tokenizers cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llm2clip.checks.row_checks import Finding, RowFacts, distribution

# Captions that are tokenized at once.
BATCH = 1000
# A tokenizer without a limit has one of 1e30.
UNLIMITED = 10**9


class CountingTokenizer:
    """A tokenizer that counts tokens.

    Args:
        name: Hub id or folder, such as `openai/clip-vit-base-patch32`; `NAME:512` sets the length at which it cuts.

    Raises:
        OSError: There is no such tokenizer.
        ValueError: It cuts nowhere, and no length is given.
    """

    def __init__(self, name: str) -> None:
        repo, _, length = name.rpartition(":")
        has_length = bool(repo) and length.isdecimal()
        self.name = name
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(repo if has_length else name)
        self.limit = int(length) if has_length else self.tokenizer.model_max_length
        if self.limit > UNLIMITED:
            raise ValueError(f"the tokenizer {name} states no longest text; give one, as in --tokenizer {name}:512")

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of texts before they are cut, with those of the prompt and the special ones."""
        return [len(ids) for ids in self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]


class TokenCheck:
    """Counts the tokens of captions by each of some tokenizers, and finds the captions that they cut."""

    def __init__(self, tokenizers: Sequence[CountingTokenizer]) -> None:
        self.tokenizers = tokenizers
        self.findings = {_finding(tokenizer): Finding() for tokenizer in tokenizers}
        self.counts: list[Counter[int]] = [Counter() for _ in tokenizers]
        self.waiting: list[tuple[str, str]] = []

    def add(self, row: RowFacts) -> None:
        self.waiting += [(row.key, text) for texts in row.texts.values() for text in texts]
        if len(self.waiting) >= BATCH:
            self._count()

    def _count(self) -> None:
        texts = [text for _, text in self.waiting]
        for tokenizer, counts in zip(self.tokenizers, self.counts, strict=True):
            lengths = tokenizer.lengths(texts) if texts else []
            counts.update(lengths)
            for (key, text), length in zip(self.waiting, lengths, strict=True):
                if length > tokenizer.limit:
                    self.findings[_finding(tokenizer)].add(key, f"{length} tokens: {text}")
        self.waiting = []

    def summary(self) -> dict[str, Any]:
        self._count()
        return {
            "tokens": {
                tokenizer.name: {
                    "limit": tokenizer.limit,
                    "cut": self.findings[_finding(tokenizer)].count,
                    "length": distribution(counts),
                }
                for tokenizer, counts in zip(self.tokenizers, self.counts, strict=True)
            }
        }


def _finding(tokenizer: CountingTokenizer) -> str:
    return f"captions cut by {tokenizer.name}"

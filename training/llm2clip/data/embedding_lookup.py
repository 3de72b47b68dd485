"""Stored embeddings of captions, as batches and streams look them up: a cache, or those beside a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class EmbeddingLookup(Protocol):
    """Stored caption embeddings, such as an [`EmbeddingCache`] or the sidecar of a file."""

    def lookup(self, captions: Sequence[str], dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Look up the embeddings of captions, `(captions, hidden_size)`; `dtype=None` keeps the stored dtype.

        Raises:
            KeyError: A caption has no embedding.
        """


class ShardEmbeddings(Protocol):
    """The stored embeddings of the files of a source.

    Attributes:
        row_counts: Rows of each file, if they are known.
    """

    row_counts: Sequence[int] | None

    def open(self, number: int, epoch: int) -> EmbeddingLookup:
        """Open those of a file by its number."""

"""Writing a file of embeddings as they are computed, so that they are never in memory together."""

from __future__ import annotations

import hashlib
import json
from typing import IO

import numpy as np
import torch

from llm2clip.embedding.cache_files import DTYPES, CacheDtype
from llm2clip.embedding.keyed_rows import INTEGERS

# The start of the numbers in bytes is a multiple of this.
ALIGNMENT = 16


class RowWriter:
    """Writes the `keys` and `embeddings` of a shard in safetensors' format (see `cache_files`), the latter in pieces.

    Args:
        file: A new file.
        keys: (n, 2) int64.
        hidden_size, dtype: Width and dtype of the embeddings.
    """

    def __init__(self, file: IO[bytes], keys: np.ndarray, hidden_size: int, dtype: CacheDtype) -> None:
        self._file, self._digest, self.size = file, hashlib.sha256(), 0
        self._dtype = getattr(torch, dtype)
        self._missing = len(keys)
        width = hidden_size * self._dtype.itemsize
        code = next(code for code, stored in DTYPES.items() if stored == self._dtype)
        ends = keys.nbytes, keys.nbytes + len(keys) * width
        header = json.dumps(
            {
                "keys": {"dtype": "I64", "shape": [len(keys), 2], "data_offsets": [0, ends[0]]},
                "embeddings": {"dtype": code, "shape": [len(keys), hidden_size], "data_offsets": list(ends)},
            },
            separators=(",", ":"),
        ).encode()
        header += b" " * (-(len(header) + 8) % ALIGNMENT)
        self._write(len(header).to_bytes(8, "little") + header)
        self._write(np.ascontiguousarray(keys, dtype="<i8").data)

    def write(self, rows: torch.Tensor) -> None:
        """Write the next embeddings, (rows, hidden) in the dtype of the file."""
        self._missing -= len(rows)
        self._write(rows.contiguous().view(INTEGERS[self._dtype.itemsize]).numpy().data)

    def finish(self) -> str:
        """Return the SHA-256 of the file, which has its rows.

        Raises:
            RuntimeError: It does not have as many as keys.
        """
        if self._missing:
            raise RuntimeError(f"{self._missing} embeddings were not written.")
        return self._digest.hexdigest()

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.size += memoryview(content).nbytes

"""A file of embeddings that is written in pieces is that of safetensors."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llm2clip.embedding.cache_files import CacheDtype, read_shard
from llm2clip.embedding.row_writer import RowWriter


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_rows_written_in_pieces_are_read_back(dtype: CacheDtype, count: int, tmp_path: Path) -> None:
    keys = np.arange(2 * count).reshape(count, 2)
    rows = torch.randn(count, 3).to(getattr(torch, dtype))
    path = tmp_path / "rows.safetensors"
    with path.open("wb") as file:
        writer = RowWriter(file, keys, 3, dtype)
        if count:
            with pytest.raises(RuntimeError, match=f"{count} embeddings were not written"):
                writer.finish()
        for part in rows.split(3):
            writer.write(part)
    assert (writer.size, writer.finish()) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    loaded = load_file(path)
    assert loaded["embeddings"].dtype == rows.dtype
    assert torch.equal(loaded["embeddings"], rows)
    assert loaded["keys"].tolist() == keys.tolist()
    shard = read_shard(path, count, 3, "")
    assert shard.offset % 16 == 0
    if count:
        assert torch.equal(shard.embeddings(), rows)
        assert shard.keys().tolist() == keys.tolist()

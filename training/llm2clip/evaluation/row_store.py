"""Rows of a model under evaluation, computed once and found again: in a store, or in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm2clip.encoders.batches import encode_sharded
from llm2clip.encoders.image_features import SHARD_SIZE
from llm2clip.store import Store, StoreManifest, build_store
from llm2clip.store.building import ComputedRows
from llm2clip.store.store import KeyIndex
from llm2clip.utils.processes import process_state
from llm2clip.utils.progress import ProgressBar

# Computes the rows of some positions, at least one, and advances the bar.
Compute = Callable[[Sequence[int], ProgressBar], Tensor]


class _MemoryRows:
    """Rows in memory, found by their keys."""

    def __init__(self, keys: np.ndarray, rows: Tensor) -> None:
        self.keys, self.rows = keys, rows
        self.find = KeyIndex.of(keys).find

    def read(self, rows: np.ndarray) -> Tensor:
        return self.rows[torch.from_numpy(rows)]


class RowStore:
    """The rows of one kind of a model, float32: scores from stored rows equal those from fresh ones.

    Runs that compute rows of one kind at the same time wait for each other.

    Args:
        folder: The folder of the store; None keeps rows in memory.
        manifest: Identity of the rows.
        device: On which the processes exchange rows that are in memory.
        shard_size: Rows that are lost at most by a kill.
    """

    def __init__(
        self, folder: Path | None, manifest: StoreManifest, device: torch.device, shard_size: int | None = None
    ) -> None:
        self.folder, self.manifest, self.device = folder, replace(manifest, dtype="float32"), device
        self.shard_size = shard_size or SHARD_SIZE
        self._opened: Store | _MemoryRows | None = None

    def rows(self, keys: np.ndarray, compute: Compute, title: str) -> Tensor:
        """Return the row of each key, float32 `(keys, width)`; those that are not stored are computed and stored.

        Args:
            keys: `(n, 2)` int64, which may repeat.
            compute: Computes the rows of some positions in `keys`.
            title: Title of the progress bar.
        """
        self.complete(keys, compute, title)
        return self.read(keys)

    def complete(self, keys: np.ndarray, compute: Compute, title: str) -> None:
        """Compute and store the rows that are missing; see [`rows`]."""
        first = np.sort(np.unique(keys, axis=0, return_index=True)[1])
        if self._opened is not None:
            first = first[self._opened.find(keys[first]) < 0]
        if not len(first):
            return

        def some(positions: np.ndarray | range, bar: ProgressBar) -> Tensor:
            return compute(first[np.asarray(positions, dtype=np.int64)].tolist(), bar)

        if self.folder is None:
            self._add_in_memory(keys[first], some, title)
            return
        state = process_state()
        self._opened = build_store(
            self.folder,
            keys[first],
            lambda positions, bar: ComputedRows(some(positions, bar)),
            self.manifest,
            title=title,
            # Processes share the work by shards.
            shard_size=min(self.shard_size, math.ceil(len(first) / state.num_processes)),
            wait_for_others=True,
            rank=state.process_index,
            world_size=state.num_processes,
            barrier=state.wait_for_everyone,
        )

    def read(self, keys: np.ndarray) -> Tensor:
        """Return rows that are stored, float32 `(keys, width)`."""
        if self._opened is None:
            return torch.empty(0, self.manifest.width)
        return self._opened.read(self._opened.find(keys))

    def _add_in_memory(self, keys: np.ndarray, compute: Callable[[range, ProgressBar], Tensor], title: str) -> None:
        if not self.manifest.width:
            with ProgressBar(title, 1, self.manifest.about.unit, show=False) as bar:
                self.manifest = replace(self.manifest, width=compute(range(1), bar).shape[1])

        def part(positions: range) -> Tensor:
            if not len(positions):
                return torch.empty(0, self.manifest.width)
            unit, is_main = self.manifest.about.unit, process_state().is_main_process
            with ProgressBar(title, len(positions), unit, is_main) as bar:
                return compute(positions, bar)

        rows = encode_sharded(len(keys), part, self.device)
        before = self._opened
        if isinstance(before, _MemoryRows):
            keys, rows = np.concatenate([before.keys, keys]), torch.cat([before.rows, rows])
        self._opened = _MemoryRows(keys, rows)

"""Rows of a model under evaluation, computed once and found again: sets of rows in folders, or in memory."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.embedding.cache_files import MANIFEST, StoreManifest
from llm2clip.embedding.image_features import PATIENCE, PATIENCE_OF_SEVERAL, SHARD_SIZE
from llm2clip.embedding.keyed_rows import KeyedRows, KeyIndex
from llm2clip.embedding.row_builder import build_rows
from llm2clip.embedding.sharding import encode_sharded
from llm2clip.utils.locks import folder_lock
from llm2clip.utils.processes import process_state
from llm2clip.utils.progress import ProgressBar, progress_bar

# Computes the rows of some positions, at least one, and advances the bar.
Compute = Callable[[Sequence[int], ProgressBar], Tensor]


@dataclass(kw_only=True)
class EvaluationManifest(StoreManifest):
    """The manifest of stored embeddings of a model under evaluation.

    Attributes:
        model_name: Name of the model in messages.
        model_dtype: The dtype that it computed in.
        kind: `images`, `features`, `projected`, `texts`, or what a protocol counts in images.
        kwargs: See [`StoreManifest`]. Rows are float32: scores from stored rows equal those from fresh ones.
    """

    FORMAT = "llm2clip-evaluation-embeddings"
    NAME = "evaluation store"
    UNIT = "row"
    REMEDY = "run `llm2clip evaluate` again"
    IDENTITY = ("fingerprint", "hidden_size", "model_dtype", "kind", "dtype")

    model_name: str
    model_dtype: str
    kind: str

    @property
    def encoder(self) -> str:
        return self.model_name


class _MemoryRows:
    """Rows in memory, found by their keys."""

    def __init__(self, keys: np.ndarray, rows: Tensor) -> None:
        self.find = KeyIndex(keys).find
        self.rows = rows

    def read(self, rows: np.ndarray) -> Tensor:
        return self.rows[torch.from_numpy(rows)]


class RowStore:
    """The rows of one kind of a model, in memory or in folders: one folder for each set of rows that was missing.

    A set's own folder, whose name is a hash of its keys, makes an interrupted computation independent of what is
    evaluated next. Runs that compute rows of one kind at the same time wait for each other.

    Args:
        folder: Where the folders are; None keeps rows in memory.
        manifest: Identity and format of the rows; a `hidden_size` of 0 is set when the first row is computed.
        device: On which the processes exchange rows that are in memory.
        shard_size: Rows that are lost at most by a kill.
    """

    def __init__(
        self, folder: Path | None, manifest: EvaluationManifest, device: torch.device, shard_size: int | None = None
    ) -> None:
        self.folder, self.manifest, self.device = folder, manifest, device
        self.shard_size = shard_size or SHARD_SIZE
        self.parts: list[Any] = []
        self.opened: set[str] = set()

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
        with self._locked():
            self._open()
            first = np.sort(np.unique(keys, axis=0, return_index=True)[1])
            missing = first[self._locate(keys[first])[0] < 0]
            if len(missing):
                self._add(keys, missing, compute, title)

    def read(self, keys: np.ndarray) -> Tensor:
        """Return rows that are stored, float32 `(keys, width)`."""
        place, rows = self._locate(keys)
        result = torch.empty(len(keys), self.manifest.hidden_size)
        for number, part in enumerate(self.parts):
            chosen = np.flatnonzero(place == number)
            if len(chosen):
                result[torch.from_numpy(chosen)] = part.read(rows[chosen])
        return result

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        state = process_state()
        with contextlib.ExitStack() as lock:
            if self.folder is not None and state.is_main_process:
                patience = PATIENCE_OF_SEVERAL if state.num_processes > 1 else PATIENCE
                lock.enter_context(folder_lock(self.folder, patience))
            state.wait_for_everyone()
            yield
            state.wait_for_everyone()

    def _open(self) -> None:
        """Open the complete sets of rows that other runs have added."""
        for path in sorted(self.folder.glob(f"*/{MANIFEST}")) if self.folder is not None else []:
            manifest = EvaluationManifest.read(path.parent)
            if path.parent.name not in self.opened and manifest.status == "complete":
                self._adopt(path.parent, manifest)

    def _adopt(self, folder: Path, manifest: EvaluationManifest) -> None:
        self.parts.append(KeyedRows(folder, manifest, KeyedRows.open_shards(folder, manifest)))
        self.opened.add(folder.name)
        self.manifest.hidden_size = manifest.hidden_size

    def _locate(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of the part that has each key, -1 for none, and the number of its row there."""
        place, rows = np.full(len(keys), -1), np.full(len(keys), -1, dtype=np.int64)
        for number, part in enumerate(self.parts):
            found = part.find(keys)
            new = (found >= 0) & (place < 0)
            place[new], rows[new] = number, found[new]
        return place, rows

    def _add(self, keys: np.ndarray, missing: np.ndarray, compute: Compute, title: str) -> None:
        own = keys[missing]

        def some(positions: np.ndarray | range, bar: ProgressBar) -> Tensor:
            if not len(positions):
                return torch.empty(0, self.manifest.hidden_size)
            return compute(missing[np.asarray(positions, dtype=np.int64)].tolist(), bar)

        if not self.manifest.hidden_size:
            with progress_bar(title, 1, self.manifest.UNIT, show=False) as bar:
                self.manifest.hidden_size = some(range(1), bar).shape[1]

        if self.folder is None:

            def part(positions: range) -> Tensor:
                with progress_bar(title, len(positions), self.manifest.UNIT, process_state().is_main_process) as bar:
                    return some(positions, bar)

            self.parts.append(_MemoryRows(own, encode_sharded(len(own), part, self.device)))
            return
        state = process_state()
        # Processes share the work by shards.
        self.manifest.shard_size = min(self.shard_size, math.ceil(len(own) / state.num_processes))
        folder = self.folder / hashlib.blake2b(own.tobytes(), digest_size=8).hexdigest()
        options: dict[str, Any] = {"rank": state.process_index, "world_size": state.num_processes, "title": title}
        stored = build_rows(
            folder,
            own,
            lambda positions, bar: (some(positions, bar), {}),
            self.manifest,
            barrier=state.wait_for_everyone,
            **options,
        )
        self._adopt(folder, stored)

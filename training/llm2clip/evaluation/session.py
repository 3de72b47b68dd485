"""A model at work on benchmarks: its rows of images and texts, each computed once, and found again by later runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm2clip.command_line.processes import process_state
from llm2clip.command_line.progress import ProgressBar
from llm2clip.data import OnError
from llm2clip.data.table_identity import distinct
from llm2clip.encoders import Encoder
from llm2clip.encoders.encoder import TEXTS_AT_ONCE
from llm2clip.encoders.image_features import SHARD_SIZE
from llm2clip.encoders.images import ImageSet
from llm2clip.files.atomic import digest_json
from llm2clip.losses.gather import exchange_counts, gather_rows
from llm2clip.store import Store, StoreManifest, build_store
from llm2clip.store.shards import ComputedRows
from llm2clip.store.store import caption_keys
from modeling_llm2clip.image_decoding_llm2clip import DamagedImageError

IMAGES, FEATURES = "images", "features"
# Images per forward pass, unless the user chooses.
IMAGE_BATCH = 64
# Images in which something is counted (a second or more each) between two writes.
COUNTED = 32
# Computes the rows at some positions, some at a time.
Compute = Callable[[list[int]], Iterator[ComputedRows]]


class Session:
    """A model at work on benchmarks.

    With a store, an image is known by the bytes of its file and a text by its characters: sets with the same images or
    texts share their rows, later runs of the same model (fingerprint and dtype) find them again, and a killed
    evaluation continues where it stopped. Several processes (torchrun) each compute a part, and all get all rows.

    Args:
        encoder: The model.
        store: Folder of the stored rows; None stores nothing.
        batch_size: Images and texts per forward pass; by default 64 images, and as many texts as their tokens allow.
        num_workers: Worker processes that decode images while the model computes; 0 for none.
        on_error: `raise` the error of an image that cannot be read, or `skip` it: its row is NaN.
        show_progress_bar: Show progress bars.

    Attributes:
        seconds: Time by part: `images`, `texts`, and what [`Session.timed`] adds.
    """

    def __init__(
        self,
        encoder: Encoder,
        store: Path | None = None,
        batch_size: int | None = None,
        num_workers: int = 0,
        on_error: OnError = "raise",
        show_progress_bar: bool = True,
    ) -> None:
        self.encoder, self.store, self.batch_size, self.num_workers = encoder, store, batch_size, num_workers
        self.on_error, self.show_progress_bar = on_error, process_state().is_main_process and show_progress_bar
        self.seconds: dict[str, float] = {}
        self._opened: dict[str, Store] = {}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of a block to a part of `seconds`; that of parts inside the block is only theirs."""
        start, inside = time.monotonic(), sum(self.seconds.values())
        yield
        within = sum(self.seconds.values()) - inside
        self.seconds[part] = round(self.seconds.get(part, 0.0) + time.monotonic() - start - within, 3)

    def embed_images(self, images: ImageSet, kind: str = IMAGES) -> Tensor:
        """Embed images.

        Args:
            kind: `images`: unit rows `(images, width)`. `features`: pooled features before the projection,
                `(images, hidden)`.

        Returns:
            float32 on the CPU, in the order of the images; NaN for an image that is skipped.

        Raises:
            DamagedImageError: An image cannot be read, and `on_error` is `raise`.
            NonFiniteError: Rows are NaN or infinite; the message names the images.
        """
        encoder, size = self.encoder, self.batch_size or IMAGE_BATCH
        forward = None if kind == IMAGES else encoder.forward_features

        def compute(rows: list[int]) -> Iterator[ComputedRows]:
            return encoder.encode_image_parts(images, rows, size, self.num_workers, self.on_error, forward)

        title = "Embedding images" if kind == IMAGES else "Features of images"
        with self.timed("images"):
            if self.store is None:
                return self._in_memory(list(range(len(images))), title, "image", encoder.width, compute)
            keys = images.content_keys()
            return self._read_images(kind, keys, self._stored(kind, keys, title, SHARD_SIZE, compute))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: unit rows, float32 `(texts, width)` on the CPU, repeats included.

        Raises:
            NonFiniteError: Embeddings are NaN or infinite; the message names the texts.
        """

        def compute(rows: list[int]) -> Iterator[ComputedRows]:
            return self.encoder.encode_text_parts([texts[row] for row in rows], self.batch_size)

        title = "Embedding texts"
        with self.timed("texts"):
            if self.store is not None:
                keys = caption_keys(texts)
                store = self._stored("texts", keys, title, SHARD_SIZE, compute)
                return store.read(store.find(keys))
            first, numbers = distinct(texts)
            return self._in_memory(first, title, "text", self.encoder.width, compute)[numbers]

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of each text, `(texts,)` int64, and whether it is cut, `(texts,)` bool."""
        with self.timed("texts"):
            parts = [
                self.encoder.text_lengths(texts[start : start + TEXTS_AT_ONCE])
                for start in range(0, max(1, len(texts)), TEXTS_AT_ONCE)
            ]
        lengths, is_cut = (torch.cat(column) for column in zip(*parts, strict=True))
        return lengths, is_cut

    def count_cut(self, texts: Sequence[str]) -> dict[str, int]:
        """Count the `truncated_texts`, of which the model reads only the beginning; empty if that is not known."""
        lengths, is_cut = self.text_lengths(texts)
        return {} if (lengths < 0).any() else {"truncated_texts": int(is_cut.sum())}

    def count_in_images(
        self, kind: str, keys: np.ndarray, count: Callable[[Sequence[int]], Iterator[Tensor]], width: int, title: str
    ) -> Tensor:
        """Count something in every image: `(images, width)` int64. Counts are stored as embeddings are.

        Args:
            kind: A name for what is counted and for all that it depends on besides the model and the images.
            keys: `(images, 2)` int64, which identify the images and whatever belongs to them.
            count: Yields the counts of images at some positions, `(width,)` int64 below 2**31, one after the other.
            title: Title of the progress bar.
        """

        def compute(rows: list[int]) -> Iterator[ComputedRows]:
            # A float32 is exact up to 2**24 only, but it has the 32 bits of an integer.
            return (ComputedRows(row.to(torch.int32)[None].view(torch.float32)) for row in count(rows))

        with self.timed("images"):
            if self.store is None:
                rows = self._in_memory(list(range(len(keys))), title, "image", width, compute)
            else:
                store = self._stored(kind, keys, title, COUNTED, compute)
                rows = store.read(store.find(keys))
            return rows.view(torch.int32).long()

    def _in_memory(self, rows: list[int], title: str, unit: str, width: int, compute: Compute) -> Tensor:
        """Compute rows, of which each process has a part; those that are skipped are NaN."""

        def encode(part: range) -> Tensor:
            parts = [torch.empty(0, width)]
            with ProgressBar(title, len(part), unit, self.show_progress_bar) as bar:
                for computed in compute(rows[part.start : part.stop]):
                    computed.rows[[position for position, *_ in computed.skipped]] = torch.nan
                    parts.append(computed.rows)
                    bar.update(len(computed.rows))
            return torch.cat(parts if len(parts) == 1 else parts[1:])

        return encode_sharded(len(rows), encode, self.encoder.device)

    def _stored(self, kind: str, keys: np.ndarray, title: str, shard_size: int, compute: Compute) -> Store:
        """Return the store of a kind of rows; what it lacks of some keys is computed and added to it."""
        # Those that this session has not seen, each once.
        new = np.sort(np.unique(keys, axis=0, return_index=True)[1])
        if kind in self._opened:
            new = new[self._opened[kind].find(keys[new]) < 0]
        assert self.store is not None
        encoder = self.encoder
        dtype, fingerprint = encoder.identity()["dtype"], encoder.fingerprint()
        manifest = StoreManifest(
            kind="evaluation",
            encoder=encoder.name,
            identity={"fingerprint": fingerprint, "model_dtype": dtype, "rows": kind},
            width=encoder.width if kind in (IMAGES, "texts") else 0,
            dtype="float32",  # scores from stored rows equal those from new ones
        )
        self._opened[kind] = build_store(
            self.store / digest_json([fingerprint, dtype]) / kind,
            keys[new],
            manifest,
            lambda positions: compute(new[positions].tolist()),
            title=title,
            shard_size=shard_size,
            show_progress_bar=self.show_progress_bar,
            processes=process_state(),
            share_evenly=True,
        )
        return self._opened[kind]

    def _read_images(self, kind: str, keys: np.ndarray, store: Store) -> Tensor:
        stored_rows = store.find(keys)
        rows = store.read(stored_rows)
        skipped = {row: (key, reason) for row, key, reason in store.manifest.skipped}
        for position in np.flatnonzero(np.isin(stored_rows, list(skipped))).tolist() if skipped else ():
            if self.on_error == "raise":
                raise DamagedImageError(*skipped[int(stored_rows[position])])
            rows[position] = torch.nan
        return rows


def encode_sharded(num_rows: int, encode: Callable[[range], Tensor], device: torch.device) -> Tensor:
    """Embed rows 0 to `num_rows - 1`, a part on each process, and gather all of them on every process.

    Args:
        encode: Maps a range of rows to their embeddings, `(len(range), width)`.
        device: Device on which the process group exchanges tensors.

    Returns:
        `(num_rows, width)` on the CPU.
    """
    if not torch.distributed.is_initialized():
        return encode(range(num_rows)).cpu()
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    bounds = [num_rows * part // world_size for part in range(world_size + 1)]
    rows = encode(range(bounds[rank], bounds[rank + 1])).detach().to(device)
    # A process without rows may not know their width.
    width = max(width for (width,) in exchange_counts([rows.shape[1]], device))
    return gather_rows(rows if len(rows) else rows.new_empty(0, width)).rows.cpu()

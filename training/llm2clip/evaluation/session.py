"""A model at work on benchmarks: its embeddings are computed once, stored, and found again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm2clip.encoders import Encoder
from llm2clip.encoders.batches import ContentSet
from llm2clip.evaluation.row_store import RowStore
from llm2clip.store import StoreManifest
from llm2clip.store.store import caption_keys
from llm2clip.utils.files import digest_json
from llm2clip.utils.progress import ProgressBar

# Texts that are sorted by length together.
TEXTS = 1024
# Images in which something is counted (a second or more each) between two writes.
COUNTED = 32


class Stopwatch:
    """Seconds of the parts of an evaluation."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of a block to a part; the time of parts inside it is only theirs."""
        start, inside = time.monotonic(), sum(self.seconds.values())
        yield
        within = sum(self.seconds.values()) - inside
        self.seconds[part] = round(self.seconds.get(part, 0.0) + time.monotonic() - start - within, 3)


class Session:
    """A model at work on benchmarks: its embeddings of images and texts, each computed once and stored by content.

    An image is known by the bytes of its file and a text by what the text format makes of it, so that sets with the
    same images or texts share them, and so do text formats where they agree. The rows of a model are found again if
    its fingerprint and dtype are the same. A killed evaluation continues where it stopped. Several processes
    (torchrun) each compute a part, and all get all rows.

    Args:
        encoder: The model.
        store: Folder of stored rows; None keeps them in memory.
        text_format: Changes every text.
        batch_size, num_workers: Images per forward pass, and worker processes that decode them while the model
            computes (0 for none).

    Attributes:
        watch: Seconds of embedding, apart from the rest of a protocol.
    """

    def __init__(
        self,
        encoder: Encoder,
        store: Path | None = None,
        text_format: Callable[[str], str] = str,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        self.encoder, self.store, self.text_format = encoder, store, text_format
        self.batch_size, self.num_workers = batch_size, num_workers
        self.watch = Stopwatch()
        self._stores: dict[str, RowStore] = {}

    def embed_images(self, images: ContentSet) -> Tensor:
        """Embed images: unit rows, float32 `(images, width)` on the CPU, in their order.

        Raises:
            DamagedImageError: An image cannot be used.
            NonFiniteError: Embeddings are NaN or infinite; the message names the images.
        """
        return self._images("images", images, self.encoder.forward_images, "Embedding images")

    def embed_features(self, images: ContentSet, projected: bool = False) -> Tensor:
        """Compute the features of `Encoder.forward_features`, `(images, hidden)`, or projected `(images, width)`.

        Raises:
            DamagedImageError: An image cannot be used.
            NonFiniteError: Features are NaN or infinite; the message names the images.
        """
        forward = partial(self.encoder.forward_features, projected=projected)
        return self._images("projected" if projected else "features", images, forward, "Features of images")

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, in the text format of the session: unit rows, float32 `(texts, width)`, repeats included."""
        return torch.cat([*self.embed_text_parts(texts, max(1, len(texts)))] or [torch.empty(0, self.encoder.width)])

    def embed_text_parts(self, texts: Sequence[str], size: int) -> Iterator[Tensor]:
        """Embed texts as [`embed_texts`] does, and yield `(size, width)` at a time, so that not all are in memory.

        Those that are missing are computed first, all of them, so that their batches are of similar lengths.
        """
        texts = [self.text_format(text) for text in texts]

        def compute(positions: Sequence[int], bar: ProgressBar) -> Tensor:
            rows = []
            for start in range(0, len(positions), TEXTS):
                chosen = [texts[position] for position in positions[start : start + TEXTS]]
                embeds = self.encoder.encode_text(chosen)
                rows.append(embeds)
                bar.update(len(chosen))
            return torch.cat(rows)

        store, keys = self._rows_of("texts"), caption_keys(texts)
        with self.watch.measure("texts"):
            store.complete(keys, compute, "Embedding texts")
        for start in range(0, len(texts), size):
            with self.watch.measure("texts"):
                part = store.read(keys[start : start + size])
            yield part

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of each text in the text format of the session, `(texts,)` int64, and whether it is cut, bool."""
        with self.watch.measure("texts"):
            parts = [
                self.encoder.text_lengths([self.text_format(text) for text in texts[start : start + TEXTS]])
                for start in range(0, max(1, len(texts)), TEXTS)
            ]
        lengths, is_cut = (torch.cat(column) for column in zip(*parts, strict=True))
        return lengths, is_cut

    def count_in_images(
        self,
        kind: str,
        texts: Sequence[str],
        keys: np.ndarray,
        width: int,
        count: Callable[[Sequence[int]], Iterator[Tensor]],
        title: str,
    ) -> Tensor:
        """Count something in every image: `(images, width)` int64. Counts are stored as embeddings are.

        Args:
            kind: A name for what is counted and for all that it depends on besides the model, the images and `texts`.
            texts: Texts that it depends on, as they are before the text format.
            keys: `(images, 2)` int64, which identify the images and whatever belongs to them.
            count: Yields the counts of images at some positions, `(width,)` int64 below 2**31, one after the other.
            title: Title of the progress bar.
        """

        def compute(positions: Sequence[int], bar: ProgressBar) -> Tensor:
            rows = []
            for row in count(positions):
                rows.append(row[None].to(torch.int32))
                bar.update()
            # A float32 is exact up to 2**24 only, but it has the 32 bits of an integer.
            return torch.cat(rows).view(torch.float32)

        kind = f"{kind}-{digest_json([self.text_format(text) for text in texts])}"
        with self.watch.measure("images"):
            return self._rows_of(kind, width, COUNTED).rows(keys, compute, title).view(torch.int32).long()

    def _images(
        self, kind: str, images: ContentSet, forward: Callable[[dict[str, Tensor]], Tensor], title: str
    ) -> Tensor:
        def compute(positions: Sequence[int], bar: ProgressBar) -> Tensor:
            size, rows = self.batch_size, []
            parts = self.encoder.encode_image_parts(images, positions, size, self.num_workers, size, forward=forward)
            for part in parts:
                rows.append(part.embeds)
                bar.update(len(part.rows))
            return torch.cat(rows)

        with self.watch.measure("images"):
            return self._rows_of(kind).rows(images.content_keys(), compute, title)

    def _rows_of(self, kind: str, width: int = 0, shard_size: int | None = None) -> RowStore:
        if kind not in self._stores:
            dtype = self.encoder.identity()["dtype"]
            fingerprint = "" if self.store is None else self.encoder.fingerprint()
            manifest = StoreManifest(
                kind="evaluation",
                encoder=self.encoder.name,
                identity={"fingerprint": fingerprint, "model_dtype": dtype, "rows": kind},
                width=self.encoder.width if kind in ("images", "texts") else width,
            )
            folder = None if self.store is None else self.store / digest_json([fingerprint, dtype]) / kind
            self._stores[kind] = RowStore(folder, manifest, self.encoder.device, shard_size)
        return self._stores[kind]

"""Data sets through a model: decoding in worker processes, batches, skipped images, a share for each process."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llm2clip.command_line.progress import ProgressBar
from llm2clip.data import DEFAULT_MAX_PIXELS, OnError, SampleError, SkippedSample, decode_image
from llm2clip.data.rows import Columns
from llm2clip.data.table_identity import content_keys, image_keys
from llm2clip.data.transforms import Decoder
from llm2clip.losses.gather import exchange_counts, gather_rows

# Batches that each worker prepares before they are asked for.
AHEAD = 2


class ImageSet(Protocol):
    """Numbered images that are decoded on demand."""

    def decode(self, row: int, decode: Decoder) -> Any:
        """Decode one image to RGB by `decode(value, key, max_pixels)`; raises SampleError if it cannot be used."""
        ...

    def key(self, row: int) -> str:
        """Name of an image in errors."""
        ...


class ContentSet(ImageSet, Protocol):
    """An [`ImageSet`] whose images are known by their content, so that what was computed from them can be stored."""

    def __len__(self) -> int: ...

    def content_keys(self) -> np.ndarray:
        """Hash the encoded images, `(images, 2)` int64."""
        ...


class ImageList:
    """A list of images as an [`ImageSet`]: whatever `decode_image` accepts, such as PIL images, paths and bytes.

    Args:
        names: Names in messages, one for each image; by default the path of a file, and the position in the list of
            any other image.
        max_pixels: Largest image to decode, width x height.
    """

    def __init__(
        self, images: Sequence[Any], names: Sequence[str] | None = None, max_pixels: int = DEFAULT_MAX_PIXELS
    ) -> None:
        self.images, self.names, self.max_pixels = images, names, max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def content_keys(self) -> np.ndarray:
        """Hash encoded images or the files of paths; TypeError for images of another kind."""
        return content_keys(self.images)

    def decode(self, row: int, decode: Decoder) -> Any:
        return decode(self.images[row], self.key(row), self.max_pixels)

    def key(self, row: int) -> str:
        if self.names is not None:
            return self.names[row]
        image = self.images[row]
        return os.fspath(image) if isinstance(image, (str, os.PathLike)) else str(row)


def image_list(images: Sequence[Any] | Any, names: Sequence[str] | None = None) -> ImageList:
    """Return images as an [`ImageList`]; one image, also as an array or tensor, counts as a list of one."""
    single = isinstance(images, (str, bytes, os.PathLike, dict, Image.Image)) or getattr(images, "ndim", 4) < 4
    return ImageList([images] if single else images, names)


class TableImages:
    """The images of a table as an [`ImageSet`]."""

    def __init__(self, table: datasets.Dataset, columns: Columns, max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
        assert columns.image is not None
        self.images = table.select_columns([columns.image])
        self.keys = table.select_columns([columns.key]) if columns.key is not None else None
        self.columns = columns
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.images)

    def decode(self, row: int, decode: Decoder) -> Any:
        return decode(self.images[row][self.columns.image], self.key(row), self.max_pixels)

    def key(self, row: int) -> str:
        """Key of the row, by default its number."""
        return str(row) if self.keys is None else str(self.keys[row][self.columns.key])

    def content_keys(self) -> np.ndarray:
        """Hash the encoded images; see [`image_keys`]."""
        assert self.columns.image is not None
        return image_keys(self.images, self.columns.image)


class ChosenImages:
    """Some rows of a [`ContentSet`], as one."""

    def __init__(self, images: ContentSet, rows: Sequence[int]) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def decode(self, row: int, decode: Decoder) -> Any:
        return self.images.decode(self.rows[row], decode)

    def key(self, row: int) -> str:
        return self.images.key(self.rows[row])

    def content_keys(self) -> np.ndarray:
        return self.images.content_keys()[np.asarray(self.rows, dtype=np.int64)]


class ForwardedBatch(NamedTuple):
    """The output of a model for a batch of images.

    Attributes:
        start: Position of the batch's first image in the data set.
        output: One row for each image that is not skipped; None if all are.
        skipped: For each image why it is skipped, or None.
    """

    start: int
    output: Tensor | None
    skipped: list[SkippedSample | None]


def stack_inputs(
    samples: Sequence[Mapping[str, Any] | SkippedSample],
) -> tuple[dict[str, Tensor], list[SkippedSample | None]]:
    """Stack the tensors of the samples that are not skipped; the second result is why a sample is skipped, or None.

    Worker processes call this: every tensor that they send costs a file descriptor, and stacked tensors are few.
    """
    good = [sample for sample in samples if not isinstance(sample, SkippedSample)]
    names = [name for name, value in good[0].items() if isinstance(value, Tensor)] if good else []
    inputs = {name: torch.stack([sample[name] for sample in good]) for name in names}
    return inputs, [sample if isinstance(sample, SkippedSample) else None for sample in samples]


def forward_images(
    dataset: Dataset[Any],
    forward: Callable[[dict[str, Tensor]], Tensor],
    batch_size: int,
    num_workers: int = 0,
    show: bool = True,
) -> Iterator[ForwardedBatch]:
    """Run a model over prepared images, batch by batch and in order.

    Args:
        dataset: Samples: mappings with model inputs, or `SkippedSample`.
        forward: The model, called with the stacked tensors of a batch, on the CPU.
        batch_size, num_workers: Images per forward pass, and worker processes that prepare images (0 for none).
        show: Show a progress bar.
    """
    start = 0
    with ProgressBar("Embedding images", len(dataset), "image", show) as bar:  # type: ignore[arg-type]
        for inputs, skipped in _prepared_batches(dataset, batch_size, num_workers):
            output = forward(inputs) if inputs else None
            bar.update(len(skipped))
            yield ForwardedBatch(start, output, skipped)
            start += len(skipped)


def _prepared_batches(
    dataset: Dataset[Any], batch_size: int, num_workers: int
) -> Iterator[tuple[dict[str, Tensor], list[SkippedSample | None]]]:
    """Prepare the samples of each batch, in order, in worker processes; in threads where LanceDB is loaded.

    LanceDB does not survive a fork, and processes that are no forks take seconds to start, and memory. Pillow decodes
    and resizes without Python's lock.
    """
    if not num_workers or "lancedb" not in sys.modules:
        yield from DataLoader(dataset, batch_size, num_workers=num_workers, collate_fn=stack_inputs)
        return

    def prepare(start: int) -> tuple[dict[str, Tensor], list[SkippedSample | None]]:
        return stack_inputs([dataset[row] for row in range(start, min(start + batch_size, len(dataset)))])  # type: ignore[arg-type]

    pool, waiting = ThreadPoolExecutor(num_workers), deque[Future[Any]]()
    try:
        for start in range(0, len(dataset), batch_size):  # type: ignore[arg-type]
            waiting.append(pool.submit(prepare, start))
            if len(waiting) > AHEAD * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class PreparedImages(Dataset):
    """The model inputs of some rows of an [`ImageSet`]; an image that cannot be used is an error or skipped.

    Args:
        prepare: Prepares the inputs of one decoded image, whose key is the second argument.
    """

    def __init__(
        self,
        images: ImageSet,
        rows: Sequence[int],
        prepare: Callable[[Any, str], dict[str, Tensor]],
        on_error: OnError = "raise",
        decode: Decoder = decode_image,
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', not {on_error!r}.")
        self.images, self.rows = images, rows
        self.prepare, self.on_error, self.decode = prepare, on_error, decode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor] | SkippedSample:
        row = self.rows[index]
        try:
            return self.prepare(self.images.decode(row, self.decode), self.images.key(row))
        except SampleError as error:
            if self.on_error == "raise":
                raise
            return SkippedSample(error.key, error.reason or str(error))


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

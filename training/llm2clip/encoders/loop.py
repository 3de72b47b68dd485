"""The loop from inputs to rows: the next batch is prepared while the model works, and rows have to be finite."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from llm2clip.command_line.progress import ProgressBar
from llm2clip.command_line.settings import require_choice
from llm2clip.data import OnError, SampleError, SkippedSample, decode_image
from llm2clip.data.transforms import Decoder
from llm2clip.encoders.images import ImageSet
from llm2clip.models.embeddings import require_finite_rows
from modeling_llm2clip.modeling_llm2clip_utils import (
    ACCELERATOR_BATCH_TOKENS,
    CPU_BATCH_TOKENS,
    evaluating,
    keep_freed_memory,
    token_batches,
)

# Batches that each worker prepares before they are asked for.
AHEAD = 2
BatchT = TypeVar("BatchT")
InputsT = TypeVar("InputsT")


def run_model(
    model: nn.Module,
    batches: Sequence[BatchT],
    prepare: Callable[[BatchT], InputsT],
    forward: Callable[[InputsT], Tensor],
    num_workers: int = 0,
) -> Iterator[tuple[BatchT, InputsT, Tensor]]:
    """Run a model over batches, in order; yield each with its inputs and its output, float32 on the CPU.

    Args:
        model: What `forward` calls; it is in evaluation mode meanwhile.
        prepare: Makes the inputs of a batch, on the CPU.
        forward: Called with the inputs, without gradients.
        num_workers: Worker processes that prepare inputs; 0 for a thread.
    """
    for batch, inputs in zip(batches, _prepared(batches, prepare, num_workers), strict=True):
        with evaluating(model), torch.inference_mode():
            output = forward(inputs).float().cpu()
        yield batch, inputs, output


class _Inputs(Dataset, Generic[BatchT, InputsT]):
    """The inputs of batches, as worker processes prepare them."""

    def __init__(self, batches: Sequence[BatchT], prepare: Callable[[BatchT], InputsT]) -> None:
        self.batches, self.prepare = batches, prepare

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> InputsT:
        return self.prepare(self.batches[index])


def _unchanged(inputs: InputsT) -> InputsT:
    return inputs


def _prepared(batches: Sequence[BatchT], prepare: Callable[[BatchT], InputsT], num_workers: int) -> Iterator[InputsT]:
    """Prepare batches before they are asked for, in worker processes; in threads without any, and with LanceDB.

    LanceDB does not survive a fork, and processes that are no forks take seconds to start, and memory. Pillow decodes
    and resizes without Python's lock.
    """
    if num_workers and "lancedb" not in sys.modules:
        inputs = _Inputs(batches, prepare)
        yield from DataLoader(inputs, batch_size=None, num_workers=num_workers, collate_fn=_unchanged)
        return
    if len(batches) == 1:  # such as a query, which waits for no thread
        yield prepare(batches[0])
        return
    threads = max(1, num_workers)
    pool, waiting = ThreadPoolExecutor(threads), deque[Future[InputsT]]()
    try:
        for batch in batches:
            waiting.append(pool.submit(prepare, batch))
            if len(waiting) > AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class TokenizedTexts(NamedTuple):
    """Texts as a model reads them.

    Attributes:
        model, device: What embeds them, and where it computes.
        lengths: Tokens of each distinct text.
        prepare: Makes the inputs of some of the distinct texts, given by their numbers.
        forward: Makes rows of inputs, `(texts, width)`.
        rows: Number of each text among the distinct ones; None if all are distinct.
    """

    model: nn.Module
    device: torch.device
    lengths: Sequence[int]
    prepare: Callable[[list[int]], Any]
    forward: Callable[[Any], Tensor]
    rows: Sequence[int] | None = None


def encode_texts(
    tokenized: TokenizedTexts, texts: Sequence[str], width: int, batch_size: int | None = None, show: bool = False
) -> Tensor:
    """Embed texts in batches of similar length: float32 `(texts, width)` on the CPU, in input order.

    Args:
        texts: The texts themselves, for errors.
        batch_size: Largest number of texts in a batch; None for as many as their tokens allow.
        show: Show a progress bar.

    Raises:
        NonFiniteError: A row is NaN or infinite; the message names its text.
    """
    budget = ACCELERATOR_BATCH_TOKENS
    if tokenized.device.type == "cpu":
        budget = CPU_BATCH_TOKENS
        keep_freed_memory()
    batches = token_batches(tokenized.lengths, budget, batch_size)
    rows = torch.empty(len(tokenized.lengths), width)
    with ProgressBar("Embedding texts", len(rows), "text", show) as bar:
        for batch, _, output in run_model(tokenized.model, batches, tokenized.prepare, tokenized.forward):
            rows[batch] = output
            bar.update(len(batch))
    rows = rows if tokenized.rows is None else rows[list(tokenized.rows)]
    require_finite_rows(rows, lambda row: f"{texts[row]:.80}", "texts")
    return rows


class EncodedRows(NamedTuple):
    """Embeddings of some `rows` of an [`ImageSet`], or of a table of captions, by their numbers.

    Attributes:
        embeds: float32 `(rows, width)` on the CPU; zeros where an image cannot be used.
        reasons: Why a row has no embedding, or None where it has one.
    """

    rows: list[int]
    embeds: Tensor
    reasons: list[str | None]


class PreparedImages:
    """The model inputs of some images of a set; an image that cannot be used is an error or skipped.

    Args:
        prepare: Prepares the inputs of one decoded image, whose key is the second argument.
    """

    def __init__(
        self,
        images: ImageSet,
        prepare: Callable[[Any, str], dict[str, Tensor]],
        on_error: OnError = "raise",
        decode: Decoder = decode_image,
    ) -> None:
        require_choice("on_error", on_error, OnError)
        self.images, self.prepare, self.on_error, self.decode = images, prepare, on_error, decode

    def __call__(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], list[SkippedSample | None]]:
        """Prepare a batch; see [`stack_inputs`]."""
        return stack_inputs([self._inputs(row) for row in rows])

    def _inputs(self, row: int) -> dict[str, Tensor] | SkippedSample:
        try:
            return self.inputs(self.images.decode(row, self.decode), row)
        except SampleError as error:
            if self.on_error == "raise":
                raise
            return SkippedSample(error.key, error.reason or str(error))

    def inputs(self, image: Any, row: int) -> dict[str, Tensor]:
        """Prepare a decoded image."""
        return self.prepare(image, self.images.key(row))


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


def encode_images(
    model: nn.Module,
    prepared: PreparedImages,
    rows: Sequence[int],
    forward: Callable[[dict[str, Tensor]], Tensor],
    width: Callable[[], int],
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[EncodedRows]:
    """Compute rows of images, a batch at a time and in order.

    Args:
        rows: The numbers of the images.
        forward: Maps the inputs of images to one row each, or to several views of each.
        width: Returns the width of a row, where no image could be decoded so far.
        batch_size, num_workers: See [`run_model`].

    Raises:
        DamagedImageError: An image cannot be decoded, and is not skipped.
        NonFiniteError: A row is NaN or infinite; the message names its image.
    """
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    known: int | None = None

    def forward_good(inputs: tuple[dict[str, Tensor], Any]) -> Tensor:
        return forward(inputs[0]) if inputs[0] else torch.empty(0, 0)

    run = run_model(model, batches, prepared, forward_good, num_workers)
    for batch, (_, skipped), output in run:
        good = [position for position, sample in enumerate(skipped) if sample is None]
        if good:
            output = output.reshape(len(good), -1)
            require_finite_rows(output, lambda row: prepared.images.key(batch[good[row]]), "images")  # noqa: B023
            known = output.shape[1]
        elif known is None:
            known = width()
        embeds = torch.zeros(len(batch), known)
        embeds[good] = output.view(len(good), known)
        yield EncodedRows(list(batch), embeds, [None if sample is None else sample.reason for sample in skipped])

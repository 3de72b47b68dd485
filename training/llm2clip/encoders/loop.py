"""The loop from inputs to rows: images are decoded while the model works, and rows have to be finite."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from llm2clip.command_line.progress import ProgressBar
from llm2clip.command_line.settings import require_choice
from llm2clip.data import OnError, SampleError, decode_image
from llm2clip.data.transforms import Decoder
from llm2clip.encoders.images import ImageSet
from llm2clip.models.embeddings import require_finite_rows
from llm2clip.store.shards import ComputedRows
from modeling_llm2clip.modeling_llm2clip_utils import (
    ACCELERATOR_BATCH_TOKENS,
    CPU_BATCH_TOKENS,
    evaluating,
    token_batches,
)

# Batches that each worker prepares before they are asked for.
AHEAD = 2
BatchT = TypeVar("BatchT")
InputsT = TypeVar("InputsT")


def run_model(
    model: nn.Module, batches: Sequence[BatchT], inputs: Iterable[InputsT], forward: Callable[[InputsT], Tensor]
) -> Iterator[tuple[BatchT, InputsT, Tensor]]:
    """Run a model over batches, in order; yield each with its inputs and its output, float32 on the CPU.

    Args:
        model: What `forward` calls; it is in evaluation mode meanwhile.
        inputs: The inputs of each batch, on the CPU.
        forward: Called with the inputs, without gradients.
    """
    for batch, prepared in zip(batches, inputs, strict=True):
        with evaluating(model), torch.inference_mode():
            output = forward(prepared).float().cpu()
        yield batch, prepared, output


def prepare_ahead(
    batches: Sequence[BatchT], prepare: Callable[[BatchT], InputsT], num_workers: int
) -> Iterator[InputsT]:
    """Prepare batches before they are asked for, in worker processes; in threads without any, and with LanceDB.

    LanceDB does not survive a fork, and processes that are no forks take seconds to start, and memory. Pillow decodes
    and resizes without Python's lock.
    """
    if num_workers and "lancedb" not in sys.modules:
        each, collate = cast(Any, batches), cast(Any, prepare)
        yield from DataLoader(each, batch_size=None, num_workers=num_workers, collate_fn=collate)
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
    budget = CPU_BATCH_TOKENS if tokenized.device.type == "cpu" else ACCELERATOR_BATCH_TOKENS
    batches = token_batches(tokenized.lengths, budget, batch_size)
    rows = torch.empty(len(tokenized.lengths), width)
    with ProgressBar("Embedding texts", len(rows), "text", show) as bar:
        # Not ahead of the model: the texts are tokens already, and a thread takes more time than padding them.
        inputs = map(tokenized.prepare, batches)
        for batch, _, output in run_model(tokenized.model, batches, inputs, tokenized.forward):
            rows[batch] = output
            bar.update(len(batch))
    rows = rows if tokenized.rows is None else rows[list(tokenized.rows)]
    require_finite_rows(rows, lambda row: f"{texts[row]:.80}", "texts")
    return rows


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

    def __call__(self, rows: Sequence[int]) -> tuple[dict[str, Tensor], dict[int, str]]:
        """Stack the inputs of the images of a batch that can be used; say why others cannot, by their places in it."""
        good, reasons = [], {}
        for place, row in enumerate(rows):
            try:
                good.append(self.inputs(row))
            except SampleError as error:
                if self.on_error == "raise":
                    raise
                reasons[place] = error.reason or str(error)
        return stack_inputs(good), reasons

    def inputs(self, row: int) -> dict[str, Tensor]:
        """Prepare an image."""
        return self.prepare(self.images.decode(row, self.decode), self.images.key(row))


def stack_inputs(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack the tensors of prepared images; those of different shapes stay a list.

    Worker processes call this: every tensor that they send costs a file descriptor, and stacked tensors are few.
    """
    names = [name for name, value in samples[0].items() if isinstance(value, Tensor)] if samples else []
    listed = {name: [sample[name] for sample in samples] for name in names}
    same = {name: len({value.shape for value in values}) == 1 for name, values in listed.items()}
    return {name: torch.stack(values) if same[name] else values for name, values in listed.items()}


def encode_images(
    model: nn.Module,
    prepared: PreparedImages,
    rows: Sequence[int],
    forward: Callable[[dict[str, Tensor]], Tensor],
    width: int,
    batch_size: int,
    num_workers: int = 0,
) -> Iterator[ComputedRows]:
    """Compute rows of images, a batch at a time and in order, as a store takes them.

    Args:
        rows: The numbers of the images.
        forward: Maps the inputs of images to one row each, or to several views of each.
        width: Width of the rows of a batch of which no image can be used.
        batch_size: Images in a batch.
        num_workers: Worker processes that decode images; 0 for a thread.

    Yields:
        Rows, float32 on the CPU, zero where an image is skipped.

    Raises:
        DamagedImageError: An image cannot be decoded, and is not skipped.
        NonFiniteError: A row is NaN or infinite; the message names its image.
    """
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]

    def compute(batch: tuple[dict[str, Tensor], Any]) -> Tensor:
        inputs = batch[0]
        return forward(inputs).reshape(len(next(iter(inputs.values()))), -1) if inputs else torch.empty(0, width)

    inputs = prepare_ahead(batches, prepared, num_workers)
    for batch, (_, reasons), output in run_model(model, batches, inputs, compute):
        good = [row for place, row in enumerate(batch) if place not in reasons]
        require_finite_rows(output, lambda number: prepared.images.key(good[number]), "images")  # noqa: B023
        embeds = torch.zeros(len(batch), output.shape[1])
        embeds[[place for place in range(len(batch)) if place not in reasons]] = output
        skipped = [(place, prepared.images.key(batch[place]), reason) for place, reason in reasons.items()]
        yield ComputedRows(embeds, skipped=skipped)

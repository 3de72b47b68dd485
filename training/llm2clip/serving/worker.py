"""The thread that owns the model: it embeds what waits in batches, whichever requests the inputs belong to."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from llm2clip.encoders import Encoder
from llm2clip.encoders.loop import stack_inputs
from llm2clip.models.embeddings import NonFiniteError
from llm2clip.serving.limits import Limits
from llm2clip.serving.metrics import Metrics
from llm2clip.serving.requests import ApiError
from modeling_llm2clip.modeling_llm2clip_utils import ACCELERATOR_BATCH_TOKENS, CPU_BATCH_TOKENS

logger = logging.getLogger(__name__)

Kind = Literal["text", "image"]
# Values of prepared images in a batch: 20 images of 224 pixels on a CPU, 160 elsewhere.
CPU_BATCH_VALUES, ACCELERATOR_BATCH_VALUES = 3 * 2**20, 3 * 2**23
MAX_RETRY_SECONDS = 60
# Between two questions whether a model that has failed works again.
PROBE_SECONDS = 1.0
# Bytes of a token, about, in text of any language.
TOKEN_BYTES = 4


class Work:
    """The texts, or the prepared images, of one request.

    Args:
        inputs, names: The inputs, and the names of them in errors.
        costs: The cost of each input: about the tokens of a text, values of an image.
        width: Width of the embeddings.

    Attributes:
        rows: Their embeddings, float32 `(inputs, width)`.
        future: Done when all rows are, or one of them failed; cancelled when nobody waits for it any more.
        start: The first input that is in no batch yet.
        tokens: Tokens of the texts, before truncation.
    """

    def __init__(
        self, kind: Kind, inputs: Sequence[Any], names: Sequence[str], costs: Sequence[int], width: int
    ) -> None:
        self.kind, self.inputs, self.names, self.costs = kind, inputs, names, costs
        self.rows = np.empty((len(inputs), width), np.float32)
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()
        self.start, self.tokens = 0, 0
        self.has_failed = False

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it."""
        return self.has_failed or self.future.cancelled()


class Part(NamedTuple):
    """The inputs of one request that are in a batch."""

    work: Work
    rows: range

    @property
    def inputs(self) -> Sequence[Any]:
        return self.work.inputs[self.rows.start : self.rows.stop]


class BatchWorker:
    """Embeds the inputs of all requests in batches, in one thread.

    A batch holds about as many tokens, or as many pixels, as a forward pass. Of a request with more, the rest goes
    behind the requests that wait, so that a long one delays the others by one batch. Texts are tokenized with their
    batch, and not before: all of a long request would take longer, and more memory, than computing a batch.

    Attributes:
        kinds: What the model embeds: `text`, `image` or both.

    Raises:
        NonFiniteError: The model's embeddings are NaN or infinite.
        ValueError: It embeds neither texts nor images.
    """

    def __init__(self, encoder: Encoder, limits: Limits, metrics: Metrics) -> None:
        self.encoder, self.limits, self.metrics = encoder, limits, metrics
        on_cpu = encoder.device.type == "cpu"
        self._budgets: dict[Kind, int] = {
            "text": CPU_BATCH_TOKENS if on_cpu else ACCELERATOR_BATCH_TOKENS,
            "image": CPU_BATCH_VALUES if on_cpu else ACCELERATOR_BATCH_VALUES,
        }
        self.kinds = embedded_kinds(encoder)
        # What the prompt, or padding, adds to each text.
        self._least_tokens = int(encoder.text_lengths(["a"])[0][0]) if "text" in self.kinds else 0
        self._works = True
        self._reserved = 0
        self._seconds_each = 0.01
        self._changed = threading.Condition()
        self._arrived: list[Work] = []
        self._waiting: deque[Work] = deque()
        # Those of which a part was in the last batch.
        self._begun: list[Work] = []
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="llm2clip-model", daemon=True)

    @property
    def is_healthy(self) -> bool:
        """Whether the thread lives, and the model, if it has failed, has embedded a text and an image again."""
        return self._works and self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what waits, and end the thread."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()

    @contextlib.contextmanager
    def room(self, weight: int) -> Iterator[None]:
        """Reserve a place in the queue.

        Args:
            weight: Of the inputs, in texts.

        Raises:
            ApiError: The queue is full, or the thread has ended (503).
        """
        if not self._thread.is_alive():
            raise ApiError(503, "The server has failed, and has to be started again.", "unhealthy")
        if self._reserved + weight > self.limits.max_waiting:
            seconds = math.ceil(self._reserved * self._seconds_each)
            raise ApiError(
                503,
                "The server has more to do than it accepts. Try again later.",
                "queue_full",
                headers={"Retry-After": str(min(max(1, seconds), MAX_RETRY_SECONDS))},
            )
        self._reserve(weight)
        try:
            yield
        finally:
            self._reserve(-weight)

    def _reserve(self, weight: int) -> None:
        self._reserved += weight
        self.metrics.waiting.set(self._reserved)

    async def embed(self, kind: Kind, inputs: Sequence[Any], names: Sequence[str]) -> tuple[np.ndarray, int]:
        """Embed texts, or images that are prepared; errors have their names.

        Returns:
            Unit rows, float32 `(inputs, width)`; and the number of tokens of the texts.

        Raises:
            ApiError: An input cannot be embedded (400), or the model failed (500).
        """
        work = Work(kind, inputs, names, [self._cost(entry) for entry in inputs], self.encoder.width)
        with self._changed:
            self._arrived.append(work)
            self._changed.notify()
        await work.future
        return work.rows, work.tokens

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except Exception as error:  # not of the model: without its thread, the server is not healthy
            log_error(error)

    def _has_work(self) -> bool:
        return bool(self._arrived or self._waiting or self._begun)

    def _step(self) -> bool:
        """Wait for work, and embed a batch; False at the end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._has_work() or self._is_stopping, None if self._works else PROBE_SECONDS
            )
            if self._is_stopping and not self._has_work():
                return False
        if self.limits.max_wait_ms and not (self._waiting or self._begun):
            time.sleep(self.limits.max_wait_ms / 1000)
        with self._changed:
            arrived, self._arrived = self._arrived, []
        self._waiting += [*arrived, *self._begun]
        if parts := self._next_batch():
            start = time.monotonic()
            self._attempt(parts)
            self._measure(parts, time.monotonic() - start)
            done = [part.work for part in parts if part.rows.stop == len(part.work.inputs)]
            self._settle([work for work in done if not work.has_failed], None)
        if not self._works:
            self._probe()
        return True

    def _probe(self) -> None:
        """Ask whether a model that has failed works: what failed may be the input of a single client."""
        try:
            self._works = embedded_kinds(self.encoder) == self.kinds
        except Exception as error:
            log_error(error)

    def _cost(self, entry: str | dict[str, Tensor]) -> int:
        if isinstance(entry, str):
            return self._least_tokens + len(entry.encode()) // TOKEN_BYTES
        return sum(value.numel() for value in entry.values())

    def _next_batch(self) -> list[Part]:
        """Take inputs of the kind that has waited longest, as many as a forward pass takes, and at least one."""
        parts: list[Part] = []
        begun: list[Work] = []
        others: list[Work] = []
        kind, budget = None, 0
        for work in self._waiting:
            if work.is_over:
                continue
            if kind is None:
                kind, budget = work.kind, self._budgets[work.kind]
            first = work.start
            while work.kind == kind and work.start < len(work.inputs):
                if work.costs[work.start] > budget and (parts or work.start > first):
                    break
                budget -= work.costs[work.start]
                work.start += 1
            if work.start > first:
                parts.append(Part(work, range(first, work.start)))
            if work.start < len(work.inputs):
                (begun if work.start > first else others).append(work)
        self._waiting, self._begun = deque(others), begun
        return parts

    def _attempt(self, parts: list[Part]) -> None:
        """Embed inputs of several requests; after an error, each alone: the error is of one."""
        try:
            self._embed(parts)
        except Exception as error:
            alone = [Part(work, range(row, row + 1)) for work, rows in parts for row in rows]
            if len(alone) > 1:
                for part in alone:
                    if not part.work.is_over:
                        self._attempt([part])
                return
            ((work, (row,)),) = parts
            work.has_failed = True
            self._settle([work], self._translated(error, work.names[row]))

    def _translated(self, error: Exception, name: str) -> ApiError:
        if isinstance(error, NonFiniteError):
            message = f"{name} has no embedding: the values that the model gives for it are zero, NaN or infinite."
            return ApiError(400, message, "not_embeddable", name)
        self._works = False
        log_error(error)
        return ApiError(500, "The model failed.", "model_failed")

    def _embed(self, parts: list[Part]) -> None:
        inputs = [entry for part in parts for entry in part.inputs]
        sizes = [len(part.rows) for part in parts]
        lengths, is_cut = torch.zeros(2, len(inputs), dtype=torch.int64)
        if parts[0].work.kind == "text":
            lengths, is_cut = self.encoder.text_lengths(inputs)
            rows = self.encoder.encode_text(inputs)
        else:
            rows = self.encoder.forward_images(stack_inputs(inputs))
        if not torch.allclose(rows.norm(dim=1), torch.ones(()), atol=1e-2):
            raise NonFiniteError("rows without a direction")
        for part, embeds, tokens in zip(parts, rows.split(sizes), lengths.split(sizes), strict=True):
            part.work.rows[part.rows.start : part.rows.stop] = embeds.numpy()
            part.work.tokens += int(tokens.sum())
        self.metrics.tokens.inc(int(lengths.sum()))
        self.metrics.truncated.inc(int(is_cut.sum()))

    def _measure(self, parts: list[Part], seconds: float) -> None:
        kind, count = parts[0].work.kind, sum(len(part.rows) for part in parts)
        self.metrics.inputs.labels(kind).inc(count)
        self.metrics.batches.labels(kind).observe(count)
        self.metrics.batch_seconds.labels(kind).observe(seconds)
        self._seconds_each += 0.1 * (seconds / count - self._seconds_each)

    def _settle(self, works: list[Work], error: ApiError | None) -> None:
        def settle() -> None:
            for future in [work.future for work in works if not work.future.done()]:
                future.set_result(None) if error is None else future.set_exception(error)

        if works:
            with contextlib.suppress(RuntimeError):  # the server has ended without waiting
                works[0].loop.call_soon_threadsafe(settle)


def embedded_kinds(encoder: Encoder) -> list[str]:
    """Embed a text and an image; return which of the two the model takes. The first request then need not wait.

    Raises:
        NonFiniteError: The embeddings are NaN or infinite.
        ValueError: It takes neither.
    """
    kinds, reasons = [], []
    for kind, call in (
        ("text", lambda: encoder.encode_text(["a"])),
        ("image", lambda: encoder.encode_image([Image.new("RGB", (64, 64), "white")])),
    ):
        try:
            call()
        except NonFiniteError:
            raise
        except ValueError as error:
            reasons.append(str(error))
        else:
            kinds.append(kind)
    if not kinds:
        raise ValueError(f"{encoder.name} embeds neither texts nor images: {'; '.join(reasons)}")
    return kinds


def log_error(error: BaseException) -> None:
    """Log where an error was raised; its message may quote what a client sent, or its token."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("A request failed with %s (its message is not logged):\n%s", type(error).__name__, where)

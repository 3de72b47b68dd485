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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from llm2clip.data import SampleError
from llm2clip.encoders import Encoder
from llm2clip.encoders.batches import stack_inputs
from llm2clip.serving.limits import Limits
from llm2clip.serving.metrics import Metrics
from llm2clip.serving.requests import ApiError
from llm2clip.utils.embeddings import NonFiniteError, require_finite_rows
from modeling_llm2clip.modeling_llm2clip_utils import ACCELERATOR_BATCH_TOKENS, CPU_BATCH_TOKENS

logger = logging.getLogger(__name__)

Kind = Literal["text", "image"]
# Values of prepared images in a batch: 20 images of 224 pixels on a CPU, 160 elsewhere.
CPU_BATCH_VALUES, ACCELERATOR_BATCH_VALUES = 3 * 2**20, 3 * 2**23
MAX_RETRY_SECONDS = 60


class Work:
    """The texts, or the prepared images, of one request.

    Attributes:
        costs: The cost of each input: tokens of a text, values of an image.
        rows: Their embeddings, float32 `(inputs, width)`.
        future: Done when all rows are, or one of them failed; cancelled when nobody waits for it any more.
        start: The first input that is in no batch yet.
        tokens: Tokens of the texts, before truncation.
    """

    def __init__(self, kind: Kind, inputs: Sequence[Any], width: int) -> None:
        self.kind, self.inputs = kind, inputs
        self.costs = [sum(value.numel() for value in image.values()) for image in inputs] if kind == "image" else []
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

    A batch holds as many tokens or pixels as a forward pass. Of a request with more, the rest goes behind the requests
    that wait, so that a long one delays the others by one batch.

    Attributes:
        is_healthy: Whether the model could compute the last batch.
    """

    def __init__(self, encoder: Encoder, limits: Limits, metrics: Metrics) -> None:
        self.encoder, self.limits, self.metrics = encoder, limits, metrics
        on_cpu = encoder.device.type == "cpu"
        self._budgets: dict[Kind, int] = {
            "text": CPU_BATCH_TOKENS if on_cpu else ACCELERATOR_BATCH_TOKENS,
            "image": CPU_BATCH_VALUES if on_cpu else ACCELERATOR_BATCH_VALUES,
        }
        self.is_healthy = True
        self._reserved = 0
        self._seconds_each = 0.01
        self._changed = threading.Condition()
        self._arrived: list[Work] = []
        self._waiting: deque[Work] = deque()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="llm2clip-model", daemon=True)

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
            ApiError: The queue is full (503).
        """
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

    async def embed(self, kind: Kind, inputs: Sequence[Any]) -> tuple[np.ndarray, int]:
        """Embed texts, or images that are prepared.

        Returns:
            Unit rows, float32 `(inputs, width)`; and the number of tokens of the texts.

        Raises:
            ApiError: An input cannot be embedded (400), or the model failed (500).
        """
        work = Work(kind, inputs, self.encoder.width)
        with self._changed:
            self._arrived.append(work)
            self._changed.notify()
        await work.future
        return work.rows, work.tokens

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._arrived or self._waiting or self._is_stopping)
                if not (self._arrived or self._waiting):
                    return
            if self.limits.max_wait_ms and not self._waiting:
                time.sleep(self.limits.max_wait_ms / 1000)
            with self._changed:
                arrived, self._arrived = self._arrived, []
            texts = [work for work in arrived if work.kind == "text" and not work.is_over]
            if texts:
                self._attempt([Part(work, range(len(work.inputs))) for work in texts], self._count_tokens)
            self._waiting += arrived
            if parts := self._next_batch():
                start = time.monotonic()
                self._attempt(parts, self._embed)
                self._measure(parts, time.monotonic() - start)
                done = [part.work for part in parts if part.rows.stop == len(part.work.inputs)]
                self._settle([work for work in done if not work.has_failed], None)

    def _next_batch(self) -> list[Part]:
        """Take inputs of the kind that has waited longest, as many as a forward pass takes, and at least one."""
        parts: list[Part] = []
        cut: list[Work] = []
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
                (cut if work.start > first else others).append(work)
        self._waiting = deque([*others, *cut])
        return parts

    def _attempt(self, parts: list[Part], call: Callable[[list[Part]], None]) -> None:
        """Call a function of the inputs of several requests; after an error, of each alone: the error is of one."""
        try:
            call(parts)
        except Exception as error:
            if len(parts) > 1:
                for part in parts:
                    self._attempt([part], call)
                return
            parts[0].work.has_failed = True
            self._settle([parts[0].work], self._translated(error))

    def _translated(self, error: Exception) -> ApiError:
        if isinstance(error, (NonFiniteError, SampleError)):
            return ApiError(400, str(error), "not_embeddable", "input")
        self.is_healthy = False
        log_error(error)
        return ApiError(500, "The model failed.", "model_failed")

    def _count_tokens(self, parts: list[Part]) -> None:
        lengths, is_cut = self.encoder.text_lengths([text for part in parts for text in part.inputs])
        for part, costs in zip(parts, lengths.split([len(part.rows) for part in parts]), strict=True):
            part.work.costs, part.work.tokens = costs.tolist(), int(costs.sum())
        self.metrics.tokens.inc(int(lengths.sum()))
        self.metrics.truncated.inc(int(is_cut.sum()))

    def _embed(self, parts: list[Part]) -> None:
        inputs = [entry for part in parts for entry in part.inputs]
        if parts[0].work.kind == "text":
            rows = self.encoder.encode_text(inputs)
        else:
            rows = self.encoder.forward_images(stack_inputs(inputs)[0])
            require_finite_rows(rows, lambda row: f"image {row} of the request", "images")
        for part, embeds in zip(parts, rows.split([len(part.rows) for part in parts]), strict=True):
            part.work.rows[part.rows.start : part.rows.stop] = embeds.numpy()
        self.is_healthy = True

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


def log_error(error: BaseException) -> None:
    """Log where an error was raised; its message may quote what a client sent, or its token."""
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("A request failed with %s (its message is not logged):\n%s", type(error).__name__, where)

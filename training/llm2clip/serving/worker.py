"""The thread that owns the model: it embeds what waits in batches, and takes of each request in turn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from llm2clip.encoders import Encoder
from llm2clip.encoders.loop import TokenizedTexts, encode_texts, stack_inputs
from llm2clip.models.embeddings import NonFiniteError
from llm2clip.serving.limits import Limits
from llm2clip.serving.metrics import Metrics
from llm2clip.serving.requests import ApiError
from llm2clip.serving.turns import Kind, Part, Turns, Work
from modeling_llm2clip.modeling_llm2clip_utils import ACCELERATOR_BATCH_TOKENS, CPU_BATCH_TOKENS

logger = logging.getLogger(__name__)

# Values of prepared images in a batch: 20 images of 224 pixels on a CPU, 160 elsewhere.
CPU_BATCH_VALUES, ACCELERATOR_BATCH_VALUES = 3 * 2**20, 3 * 2**23
MAX_RETRY_SECONDS = 60
# Between two questions whether a model that has failed works again.
PROBE_SECONDS = 1.0
# Bytes of a token, about, in text of any language.
TOKEN_BYTES = 4
# A request of so few bytes is not tokenized to count its tokens, of which it has fewer.
FEW_BYTES = 1024
# Characters of a request that are tokenized to count them before the texts of others have their turn.
COUNTED_CHARACTERS = 16_384


class Size(NamedTuple):
    """How much of the limits a request, or all of them together, take."""

    inputs: int
    tokens: int
    pixels: int


class Batch(NamedTuple):
    """Inputs of one kind, of one request or several; texts are being tokenized."""

    parts: list[Part]
    tokens: Future[tuple[Tensor, Tensor, TokenizedTexts]] | None


class BatchWorker:
    """Embeds the inputs of all requests in batches, in one thread.

    A batch holds about as many tokens, or as many pixels, as a forward pass, and fewer where that takes long. Of a
    request with more, the rest goes behind the requests that wait: each has its turn, however much another one sent.

    A second thread tokenizes: a batch at a time, before its turn if the batch is full, and to count the tokens of long
    requests. No other may, since tokenizers cannot cut and not cut at the same time.

    Attributes:
        kinds: What the model embeds: `text`, `image` or both.

    Raises:
        NonFiniteError: The model's embeddings are NaN or infinite.
        ValueError: It embeds neither texts nor images.
    """

    def __init__(self, encoder: Encoder, limits: Limits, metrics: Metrics) -> None:
        self.encoder, self.limits, self.metrics = encoder, limits, metrics
        on_cpu = encoder.device.type == "cpu"
        self._turns = Turns(
            {
                "text": CPU_BATCH_TOKENS if on_cpu else ACCELERATOR_BATCH_TOKENS,
                "image": CPU_BATCH_VALUES if on_cpu else ACCELERATOR_BATCH_VALUES,
            }
        )
        self.kinds = embedded_kinds(encoder)
        # What the prompt, or padding, adds to each text.
        self._least_tokens = int(encoder.text_lengths(["a"])[0][0]) if "text" in self.kinds else 0
        self._works = True
        self._reserved = Size(0, 0, 0)
        self._seconds_each = 0.01
        self._busy_since: float | None = None
        self._tokenizing = ThreadPoolExecutor(1, "llm2clip-tokens")
        self._changed = threading.Condition()
        self._arrived: list[Work] = []
        # The batch after the one that is computed.
        self._next: Batch | None = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="llm2clip-model", daemon=True)

    @property
    def is_healthy(self) -> bool:
        """Whether the model answers: the thread lives, no batch takes longer than a request may, and none fails.

        After a failure, the model has to embed a text and an image again.
        """
        since = self._busy_since
        is_stuck = since is not None and time.monotonic() - since > self.limits.timeout
        return self._works and self._thread.is_alive() and not is_stuck

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finish what waits, and end the thread."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    async def count_tokens(self, texts: Sequence[str], param: str) -> int:
        """Count the tokens of the texts of a request, before the model cuts them; of few bytes, count the bytes.

        Raises:
            ApiError: There are more than a request may have (413).
        """
        if (size := sum(len(text.encode()) for text in texts)) <= FEW_BYTES:
            return size
        count, start, most = 0, 0, self.limits.max_request_tokens
        while start < len(texts):
            stop, characters = start, 0
            while stop < len(texts) and (stop == start or characters + len(texts[stop]) <= COUNTED_CHARACTERS):
                characters += len(texts[stop])
                stop += 1
            lengths = self._tokenizing.submit(self.encoder.text_lengths, texts[start:stop])
            count += int((await asyncio.wrap_future(lengths))[0].sum())
            if count > most:
                more = "" if stop == len(texts) else "at least "
                message = f"{param} has {more}{count:,} tokens, but at most {most:,} are allowed (max_request_tokens)."
                raise ApiError(413, message, "too_many_tokens", param)
            start = stop
        return count

    @contextlib.contextmanager
    def room(self, size: Size) -> Iterator[None]:
        """Reserve what a request takes of the limits of all.

        Raises:
            ApiError: All together would take too much, or the thread has ended (503).
        """
        if not self._thread.is_alive():
            raise ApiError(503, "The server has failed, and has to be started again.", "unhealthy")
        limits, taken = self.limits, self._reserved
        if (
            taken.tokens + size.tokens > limits.max_waiting * limits.max_request_tokens
            or taken.pixels + size.pixels > limits.max_waiting * limits.max_request_pixels
        ):
            seconds = math.ceil(taken.inputs * self._seconds_each)
            raise ApiError(
                503,
                "The server has more to do than it accepts. Try again later.",
                "queue_full",
                headers={"Retry-After": str(min(max(1, seconds), MAX_RETRY_SECONDS))},
            )
        self._reserve(size, 1)
        try:
            yield
        finally:
            self._reserve(size, -1)

    def _reserve(self, size: Size, sign: int) -> None:
        self._reserved = Size(*(old + sign * new for old, new in zip(self._reserved, size, strict=True)))
        self.metrics.waiting.set(self._reserved.inputs)

    def submit(self, kind: Kind, inputs: Sequence[Any], names: Sequence[str]) -> Work:
        """Let texts, or images that are prepared, wait for the model; errors have their names.

        Returns:
            The work. Its future raises ApiError if an input cannot be embedded (400), or the model failed (500).
        """
        work = Work(kind, inputs, names, [self._cost(entry) for entry in inputs], self.encoder.width)
        with self._changed:
            self._arrived.append(work)
            self._changed.notify()
        return work

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except Exception as error:  # not of the model: without its thread, the server is not healthy
            log_error(error)

    def _has_work(self) -> bool:
        return bool(self._next or self._arrived or self._turns)

    def _step(self) -> bool:
        """Wait for work, and embed a batch; False at the end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._has_work() or self._is_stopping, None if self._works else PROBE_SECONDS
            )
            if self._is_stopping and not self._has_work():
                return False
        batch = self._next or self._begin()
        # Others that arrive meanwhile would find no room in it.
        self._next = self._begin(only_full=True)
        if batch is not None and not all(part.work.is_over for part in batch.parts):
            self._busy_since = start = time.monotonic()
            self._attempt(batch)
            self._busy_since = None
            self._measure(batch.parts, time.monotonic() - start)
            done = [work for work, rows in batch.parts if rows.stop == len(work.inputs)]
            self._settle([work for work in done if not work.has_failed], None)
        if not self._works:
            self._probe()
        return True

    def _probe(self) -> None:
        """Ask whether a model that has failed works: what failed may be the input of a single client."""
        try:
            self._works = self._tokenizing.submit(embedded_kinds, self.encoder).result() == self.kinds
        except Exception as error:
            log_error(error)

    def _cost(self, entry: str | dict[str, Tensor]) -> int:
        if isinstance(entry, str):
            return self._least_tokens + len(entry.encode()) // TOKEN_BYTES
        return sum(value.numel() for value in entry.values())

    def _begin(self, only_full: bool = False) -> Batch | None:
        with self._changed:
            arrived, self._arrived = self._arrived, []
        parts = self._turns.take(arrived, only_full)
        return self._batch(parts) if parts else None

    def _batch(self, parts: list[Part]) -> Batch:
        if parts[0].work.kind == "image":
            return Batch(parts, None)
        texts = [text for part in parts for text in part.inputs]
        return Batch(parts, self._tokenizing.submit(self._tokenize, texts))

    def _tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor, TokenizedTexts]:
        return *self.encoder.text_lengths(texts), self.encoder.tokenized(texts)

    def _attempt(self, batch: Batch) -> None:
        """Embed inputs of several requests; after an error, each alone: the error is of one."""
        try:
            self._embed(batch)
        except Exception as error:
            alone = [Part(work, range(row, row + 1)) for work, rows in batch.parts for row in rows]
            if len(alone) > 1:
                for part in alone:
                    if not part.work.is_over:
                        self._attempt(self._batch([part]))
                return
            ((work, (row,)),) = batch.parts
            work.has_failed = True
            self._settle([work], self._translated(error, work.names[row]))

    def _translated(self, error: Exception, name: str) -> ApiError:
        if isinstance(error, NonFiniteError):
            message = f"{name} has no embedding: the values that the model gives for it are zero, NaN or infinite."
            return ApiError(400, message, "not_embeddable", name)
        self._works = False
        log_error(error)
        return ApiError(500, "The model failed.", "model_failed")

    def _embed(self, batch: Batch) -> None:
        inputs = [entry for part in batch.parts for entry in part.inputs]
        if batch.tokens is None:
            rows = self.encoder.forward_images(stack_inputs(inputs))
            lengths = torch.zeros(len(inputs), dtype=torch.int64)
        else:
            lengths, is_cut, tokenized = batch.tokens.result()
            rows = self.encoder.compact(encode_texts(tokenized, inputs, self.encoder.full_width))
            self.metrics.tokens.inc(int(lengths.sum()))
            self.metrics.truncated.inc(int(is_cut.sum()))
        if not torch.allclose(rows.norm(dim=1), torch.ones(()), atol=1e-2):
            raise NonFiniteError("rows without a direction")
        sizes = [len(part.rows) for part in batch.parts]
        for part, embeds, tokens in zip(batch.parts, rows.split(sizes), lengths.split(sizes), strict=True):
            part.work.rows[part.rows.start : part.rows.stop] = embeds.numpy()
            part.work.tokens += int(tokens.sum())

    def _measure(self, parts: list[Part], seconds: float) -> None:
        kind, count = parts[0].work.kind, sum(len(part.rows) for part in parts)
        self.metrics.inputs.labels(kind).inc(count)
        self.metrics.batches.labels(kind).observe(count)
        self.metrics.batch_seconds.labels(kind).observe(seconds)
        self._seconds_each += 0.1 * (seconds / count - self._seconds_each)
        self._turns.measure(parts, seconds)

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

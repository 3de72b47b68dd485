"""Decoding the images of requests, outside of the event loop and of the model's thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from llm2clip.encoders import Encoder
from llm2clip.serving.limits import Limits
from llm2clip.serving.requests import EncodedImage, Inputs, prepare_image

# An image is large if it has more than this part of the pixels that one may have.
LARGE_PART = 1 / 8


class Decoders:
    """Threads that decode images, a few of each request at a time, so that those of others come in between.

    Large images have threads of their own, which small ones need not wait for, and are decoded at the same time as
    long as all of them together have no more pixels than one image may have: that bounds the memory.
    """

    def __init__(self, encoder: Encoder, limits: Limits) -> None:
        self.encoder, self.limits = encoder, limits
        self._small, self._large = (
            ThreadPoolExecutor(limits.decode_threads, f"llm2clip-{name}") for name in ("images", "large-images")
        )
        self._free_pixels = limits.max_pixels
        self._turn, self._freed = threading.Lock(), threading.Condition()

    def shutdown(self) -> None:
        """Begin no more images."""
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)

    async def open(self, inputs: Inputs) -> list[EncodedImage]:
        """Read the heads of the images of a request; see [`Inputs.open_images`]."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._small, inputs.open_images, self.limits.max_pixels)

    async def prepare(self, images: Sequence[EncodedImage]) -> list[dict[str, Tensor]]:
        """Decode the images of a request, and prepare them for the model; see [`prepare_image`]."""
        loop = asyncio.get_running_loop()
        prepared: list[Any] = [None] * len(images)
        remaining = iter(enumerate(images))

        async def prepare_one_after_the_other() -> None:
            for place, image in remaining:
                is_large = image.pixels > LARGE_PART * self.limits.max_pixels
                pool = self._large if is_large else self._small
                prepared[place] = await loop.run_in_executor(pool, self._prepare, image, is_large)

        count = min(self.limits.decode_threads, len(images))
        tasks = [asyncio.ensure_future(prepare_one_after_the_other()) for _ in range(count)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return prepared

    def _prepare(self, image: EncodedImage, is_large: bool) -> dict[str, Tensor]:
        with self._reserved(image.pixels if is_large else 0):
            return prepare_image(self.encoder, image, self.limits.max_pixels)

    @contextmanager
    def _reserved(self, pixels: int) -> Iterator[None]:
        if pixels:
            with self._turn, self._freed:  # in order, so that the largest are not overtaken for ever
                self._freed.wait_for(lambda: pixels <= self._free_pixels)
                self._free_pixels -= pixels
        try:
            yield
        finally:
            with self._freed:
                self._free_pixels += pixels
                self._freed.notify_all()

"""Decoding the images of requests, outside of the event loop and of the model's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from llm2clip.encoders import Encoder
from llm2clip.serving.limits import Limits
from llm2clip.serving.requests import EncodedImage, Inputs, prepare_image

# An image is large if it has more than this part of the pixels that one may have.
LARGE_PART = 1 / 8


class Decoders:
    """Threads that decode images, a few of each request at a time, so that those of others come in between.

    Large images, which take a dozen bytes a pixel, are decoded one after the other, and small ones need not wait for
    them.
    """

    def __init__(self, encoder: Encoder, limits: Limits) -> None:
        self.encoder, self.limits = encoder, limits
        self._small = ThreadPoolExecutor(limits.decode_threads, "llm2clip-images")
        self._large = ThreadPoolExecutor(1, "llm2clip-large-image")

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
                max_pixels = self.limits.max_pixels
                pool = self._large if image.pixels > LARGE_PART * max_pixels else self._small
                prepared[place] = await loop.run_in_executor(pool, prepare_image, self.encoder, image, max_pixels)

        count = min(self.limits.decode_threads, len(images))
        tasks = [asyncio.ensure_future(prepare_one_after_the_other()) for _ in range(count)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return prepared

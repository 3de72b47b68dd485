"""Decoding the images of requests, outside of the event loop and of the model's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

from torch import Tensor

from llm2clip.encoders import Encoder
from llm2clip.serving.limits import Limits
from llm2clip.serving.requests import ApiError, EncodedImage, Inputs, open_image

THREADS = 4
# An image is large if it has more than this part of the pixels that one may have.
LARGE_PART = 1 / 8
# Images of a request that are decoded before those of others have their turn.
PART_IMAGES = 8


class Decoders:
    """Threads that decode images, a part of each request at a time, so that those of others come in between.

    Large images, which take a dozen bytes a pixel, are decoded one after the other, and small ones need not wait for
    them.
    """

    def __init__(self, encoder: Encoder, limits: Limits) -> None:
        self.encoder, self.limits = encoder, limits
        self._small = ThreadPoolExecutor(THREADS, "llm2clip-images")
        self._large = ThreadPoolExecutor(1, "llm2clip-large-image")

    def shutdown(self) -> None:
        """Begin no more images."""
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)

    async def open(self, inputs: Inputs, param: str) -> list[EncodedImage]:
        """Read the heads of the images of a request.

        Raises:
            ApiError: One is not base64, or too narrow (400); one is too large, or all of them together (413).
            DamagedImageError: One is no image.
        """
        images = []
        for row, content in zip(inputs.image_rows, inputs.images, strict=True):
            name, most = inputs.names[row], self.limits.max_pixels
            images.append(await asyncio.to_thread(open_image, content, name, most))
        pixels, most = sum(image.pixels for image in images), self.limits.max_request_pixels
        if pixels > most:
            message = (
                f"{param} has images of {pixels:,} pixels, but at most {most:,} are allowed (max_request_pixels)."
            )
            raise ApiError(413, message, "too_many_pixels", param)
        return images

    def parts(self, images: Sequence[EncodedImage]) -> Iterator[list[EncodedImage]]:
        """Divide the images of a request into what is decoded at once: a large one, or a few others."""
        for is_large, group in groupby(images, self._is_large):
            alike, size = list(group), 1 if is_large else PART_IMAGES
            yield from (alike[start : start + size] for start in range(0, len(alike), size))

    async def prepare(self, part: Sequence[EncodedImage]) -> list[dict[str, Tensor]]:
        """Decode a part of the images of a request, and prepare them for the model.

        Raises:
            DamagedImageError: One cannot be decoded.
        """
        loop = asyncio.get_running_loop()
        pool = self._large if self._is_large(part[0]) else self._small
        return await asyncio.gather(*(loop.run_in_executor(pool, self._prepare, image) for image in part))

    def _is_large(self, image: EncodedImage) -> bool:
        return image.pixels > LARGE_PART * self.limits.max_pixels

    def _prepare(self, image: EncodedImage) -> dict[str, Tensor]:
        decoded = self.encoder.decode(image.content, image.name, self.limits.max_pixels)
        return self.encoder.prepare(decoded, image.name)

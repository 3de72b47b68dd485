"""Embed many images: decoding in worker processes, batches through the vision half of a model, no LLM."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, BaseImageProcessor

from llm2clip.data import EvalTransform, ImageBackend, OnError
from llm2clip.encoders.image_batches import ImageSet, PreparedImages, forward_images, image_list
from llm2clip.encoders.opening import open_embedder
from llm2clip.utils.manifests import refuse_changed_model
from llm2clip.utils.non_finite import require_finite_rows
from llm2clip.utils.processes import process_state
from llm2clip.utils.repos import RepoKind, inspect_repo
from llm2clip.utils.vision_identity import vision_fingerprint
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPVisionModelWithProjection, with_pillow
from modeling_llm2clip.modeling_llm2clip_utils import absolute_path, encode_pixels

logger = logging.getLogger(__name__)

MAX_NAMED = 20
NOT_FINITE = "the model's embedding of it is not finite"


class EmbeddedRows(NamedTuple):
    """Embeddings of `rows` of an [`ImageSet`], or of captions.

    Attributes:
        embeds: `(rows, width)` float32 unit rows; zeros where there is a reason.
        reasons: Why a row has no embedding, or None where it has one.
    """

    rows: list[int]
    embeds: np.ndarray
    reasons: list[str | None]


class ImageEmbedder:
    """The vision half of a model with its image processor.

    Args:
        model: The vision half, or a model with its LLM, in evaluation mode.
        name, revision: Hub id or folder of the model, and branch, tag or commit on the Hub.
        image_backend: Library that decodes and resizes images; see `EvalTransform`.
    """

    def __init__(
        self,
        model: Any,
        image_processor: BaseImageProcessor,
        name: str = "",
        revision: str | None = None,
        image_backend: ImageBackend = "exact",
    ) -> None:
        self.model = model
        self.transform = EvalTransform(image_processor, image_backend)
        self.name = name
        self.revision = revision
        self.width: int = model.config.projection_dim

    @classmethod
    def load(
        cls,
        name: str,
        revision: str | None = None,
        image_backend: ImageBackend = "exact",
        *,
        with_llm: bool = False,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> ImageEmbedder:
        """Load an LLM2CLIP model.

        Args:
            name, revision, image_backend: See [`ImageEmbedder`].
            with_llm: Load the whole model, whose LLM embeds captions; the default loads the vision half only.
            device: Device of the model; the default is a GPU if there is one.
            options: Passed to `from_pretrained`, such as `dtype`.

        Raises:
            OSError: There is no such model.
            ValueError: It is not an LLM2CLIP model, or is a vision half when the LLM is needed; or a file of a local
                folder is not the one that was written.
        """
        repo = inspect_repo(name, revision)
        if with_llm:
            repo.require(RepoKind.JOINT, hint="A text query needs the whole model with its LLM.")
        repo.require(RepoKind.JOINT, RepoKind.VISION_HALF)
        refuse_changed_model(name)
        model_class: Any = LLM2CLIPModel if with_llm else LLM2CLIPVisionModelWithProjection
        model = model_class.from_pretrained(name, revision=revision, **options)
        image_processor = with_pillow(AutoImageProcessor.from_pretrained(name, revision=revision))
        model = model.to(device or process_state().device).eval()
        return cls(model, image_processor, absolute_path(name), revision, image_backend)

    def fingerprint(self) -> str:
        """Identify the weights and the preprocessing; see [`vision_fingerprint`]."""
        return vision_fingerprint(self.model, self.transform.image_processor)

    def embed(self, image: Image.Image, key: str) -> np.ndarray:
        """Embed one RGB image: `(width,)` float32, unit length.

        Raises:
            DamagedImageError: The image is too narrow to be resized; the message names `key`.
            NonFiniteError: The embedding is NaN or infinite.
        """
        inputs = self.transform.inputs(image, key)
        embeds = self._forward({name: value[None] for name, value in inputs.items()})
        require_finite_rows(embeds, lambda _: key, "images")
        return embeds.numpy()[0]

    def embed_rows(
        self,
        images: ImageSet,
        rows: Sequence[int],
        batch_size: int = 64,
        num_workers: int = 0,
        part_size: int | None = None,
        on_error: OnError = "skip",
        on_not_finite: OnError | None = None,
        show_progress_bar: bool | None = None,
    ) -> Iterator[EmbeddedRows]:
        """Embed rows in order, a part at a time: no more than a part is in memory.

        Args:
            images, rows: The images, and the numbers of those to embed.
            batch_size, num_workers, show_progress_bar: See [`embed_images`].
            part_size: Rows per part, a multiple of `batch_size`; the default is a single part.
            on_error: `raise` for an image that cannot be embedded, or `skip` it: its row has a reason.
            on_not_finite: The same for embeddings with NaN or infinite values, which have the reason `NOT_FINITE`; the
                default is `on_error`.

        Raises:
            NonFiniteError: Embeddings of a batch are NaN or infinite, and those are not skipped.
        """
        prepared = PreparedImages(images, rows, self.transform.inputs, on_error, self.transform.decode)
        show = show_progress_bar is not False
        first, embeds, reasons = 0, [], []
        for batch in forward_images(prepared, self._forward, batch_size, num_workers, show=show):
            found = np.zeros((len(batch.skipped), self.width), dtype=np.float32)
            if batch.output is not None:
                found[batch.good] = batch.output.numpy()
            embeds.append(found)
            reasons += [None if sample is None else sample.reason for sample in batch.skipped]
            if batch.output is not None and (on_not_finite or on_error) == "raise":
                keys = [images.key(rows[batch.start + position]) for position in batch.good]
                require_finite_rows(batch.output, keys.__getitem__, "images")
            for position in (batch.start + np.flatnonzero(~np.isfinite(found).all(axis=1))).tolist():
                reasons[position - first] = NOT_FINITE
            done = batch.start + len(batch.skipped)
            if done == len(rows) or (part_size and done % part_size == 0):
                yield EmbeddedRows(list(rows[first:done]), np.concatenate(embeds), reasons)
                first, embeds, reasons = done, [], []

    def embed_all(self, images: ImageSet, rows: Sequence[int], **options: Any) -> EmbeddedRows:
        """Embed rows in order; the arguments are those of [`ImageEmbedder.embed_rows`]."""
        parts = list(self.embed_rows(images, rows, **options))
        return parts[0] if parts else EmbeddedRows([], np.zeros((0, self.width), dtype=np.float32), [])

    def _forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return next(encode_pixels(self.model, [inputs]))


def embed_images(
    images: Sequence[Any] | Any,
    model: Any,
    processor: Any = None,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    on_error: OnError = "raise",
    show_progress_bar: bool | None = None,
) -> Tensor:
    """Embed images with an LLM2CLIP model.

    Args:
        images: PIL images, paths, URLs, encoded bytes, arrays, tensors or records of `datasets`, mixed as you like;
            one image counts as a list of one.
        model: A loaded model, which is put into evaluation mode, or the Hub id or folder of one; then only the vision
            half is loaded.
        processor: The model's processor or image processor; required with a loaded model.
        batch_size: Images per forward pass.
        num_workers: Worker processes that read and decode images; 0 decodes in this process.
        device: Device of the model. By default a loaded model stays where it is, and another one uses a GPU if there
            is one.
        on_error: `raise` for an image that cannot be read, or `skip` it: its row is NaN, and a warning names it.
        show_progress_bar: `False` hides the progress bar.

    Returns:
        Unit rows, float32 `(len(images), projection_dim)` on the CPU, in input order.

    Raises:
        DamagedImageError: An image cannot be read.
        NonFiniteError: The model's embedding of an image is NaN or infinite, unless `on_error` is `skip`.
        ValueError: The repository is not an LLM2CLIP model, or a loaded model comes without its processor.
    """
    embedder = open_embedder(ImageEmbedder, model, getattr(processor, "image_processor", processor), device)
    listed, options = image_list(images), {"on_error": on_error, "show_progress_bar": show_progress_bar}
    found = embedder.embed_all(listed, range(len(listed)), batch_size=batch_size, num_workers=num_workers, **options)
    skipped = [row for row, reason in enumerate(found.reasons) if reason is not None]
    for row in skipped[:MAX_NAMED]:
        logger.warning("image %s is skipped: %s", listed.key(row), found.reasons[row])
    if len(skipped) > MAX_NAMED:
        logger.warning("%d more images are skipped.", len(skipped) - MAX_NAMED)
    embeds = torch.from_numpy(found.embeds)
    embeds[skipped] = float("nan")
    return embeds

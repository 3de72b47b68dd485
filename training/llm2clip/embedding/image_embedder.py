"""A model's vision half at work on many images, decoded by worker processes, without the LLM."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, BaseImageProcessor, PretrainedConfig

from llm2clip.data import EvalTransform, ImageBackend, SampleError, SkippedSample, stack_pixels
from llm2clip.data.transforms import Decoder
from llm2clip.utils.processes import process_state
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPVisionModelWithProjection
from modeling_llm2clip.modeling_llm2clip_utils import absolute_path, digest_weights

# Values of every weight that the fingerprint reads.
FINGERPRINT_SAMPLES = 1024


class Images(Protocol):
    """What can be embedded: numbered images, each decoded on demand."""

    def decode(self, row: int, decode: Decoder) -> Any:
        """The image of a row in RGB, as `decode` gives it, or a SampleError that says why there is none."""


class EmbeddedRows(NamedTuple):
    """A stretch of rows.

    Attributes:
        rows: n row numbers.
        embeds: `(n, width)` float32 unit rows; zeros where there is a reason.
        reasons: Why a row has no embedding, or None where it has one.
    """

    rows: list[int]
    embeds: np.ndarray
    reasons: list[str | None]


class ImageEmbedder:
    """The vision half of a model, and its image processor.

    Args:
        model: The vision half, or a model with its LLM, in evaluation mode.
        image_processor: Prepares the images.
        name: Hub id or absolute folder of the model.
        revision: Its revision on the Hub.
        image_backend: How images are decoded and resized; see `EvalTransform`.
    """

    def __init__(
        self,
        model: Any,
        image_processor: BaseImageProcessor,
        name: str,
        revision: str | None = None,
        image_backend: ImageBackend = "exact",
    ) -> None:
        self.model = model
        self.transform = EvalTransform(image_processor, image_backend)
        self.name = name
        self.revision = revision

    @classmethod
    def load(cls, name: str, revision: str | None = None, image_backend: ImageBackend = "exact") -> ImageEmbedder:
        """Load the vision half of an LLM2CLIP model; its LLM is not read.

        Raises:
            OSError: There is no such model.
            ValueError: It is no LLM2CLIP model.
        """
        require_llm2clip(name, revision)
        model = LLM2CLIPVisionModelWithProjection.from_pretrained(name, revision=revision)
        image_processor = AutoImageProcessor.from_pretrained(name, revision=revision)
        model = model.to(process_state().device).eval()
        return cls(model, image_processor, absolute_path(name), revision, image_backend)

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return self.model.config.projection_dim

    def fingerprint(self) -> str:
        """See [`vision_fingerprint`]."""
        return vision_fingerprint(self.model)

    def embed(self, image: Image.Image, key: str) -> np.ndarray:
        """The unit embedding of one RGB image: `(width,)` float32.

        Raises:
            DamagedImageError: It is too narrow to be resized; the message names `key`.
        """
        return self._forward(self.transform(image, key)[None])[0]

    def embed_rows(
        self,
        images: Images,
        rows: Sequence[int],
        batch_size: int,
        num_workers: int,
        part_size: int,
        show_progress_bar: bool | None = None,
    ) -> Iterator[EmbeddedRows]:
        """Embed rows in order, a part at a time, so that no more than a part is in memory.

        Args:
            images: Where the rows are.
            rows: Row numbers.
            batch_size: Images per forward pass.
            num_workers: Processes that read and decode.
            part_size: Rows per part, a multiple of `batch_size`.
            show_progress_bar: Show a bar; None: where standard error is a terminal.

        Yields:
            Parts; a row that cannot be read is in them with the reason.
        """
        loader = DataLoader(
            _Prepared(images, rows, self.transform), batch_size, num_workers=num_workers, collate_fn=stack_pixels
        )
        disable = None if show_progress_bar is None else not show_progress_bar
        bar = tqdm(total=len(rows), desc="Embedding images", unit="image", disable=disable)
        done, part = 0, _Part(self.width)
        with bar:
            for batch in loader:
                count = len(batch.skipped)
                embeds = np.zeros((count, self.width), dtype=np.float32)
                if batch.pixels is not None:
                    embeds[batch.good] = self._forward(batch.pixels)
                part.add(rows[done : done + count], embeds, batch.skipped)
                done += count
                bar.update(count)
                if done % part_size == 0 or done == len(rows):
                    yield part.take()

    def _forward(self, pixels: Tensor) -> np.ndarray:
        with torch.inference_mode():
            pixels = pixels.to(self.model.vision_model.device, self.model.dtype)
            features = self.model.get_image_features(pixels).pooler_output
            assert features is not None
            return F.normalize(features.float(), dim=-1).cpu().numpy()


class _Part:
    """Collects the batches of a part."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.rows: list[int] = []
        self.embeds: list[np.ndarray] = []
        self.reasons: list[str | None] = []

    def add(self, rows: Sequence[int], embeds: np.ndarray, skipped: list[SkippedSample | None]) -> None:
        self.rows += rows
        self.embeds.append(embeds)
        for sample, finite in zip(skipped, np.isfinite(embeds).all(axis=1), strict=True):
            reason = None if sample is None else sample.reason
            self.reasons.append(reason if finite else "the model's embedding of it is not finite")

    def take(self) -> EmbeddedRows:
        part = EmbeddedRows(self.rows, np.concatenate(self.embeds), self.reasons)
        self.rows, self.embeds, self.reasons = [], [], []
        return part


class _Prepared(Dataset):
    """Pixel values of some rows, or why there are none."""

    def __init__(self, images: Images, rows: Sequence[int], transform: EvalTransform) -> None:
        self.images = images
        self.rows = rows
        self.transform = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor | SkippedSample:
        try:
            return self.transform(self.images.decode(self.rows[index], self.transform.decode))
        except SampleError as error:
            return SkippedSample(error.key, error.reason or str(error))


def require_llm2clip(name: str, revision: str | None, with_llm: bool = False) -> None:
    """Refuse what is no LLM2CLIP model by its config.json, before anything large is read.

    Args:
        name: Folder or Hub id.
        revision: Its revision on the Hub.
        with_llm: Refuse a vision half too.

    Raises:
        OSError: There is no such model.
        ValueError: It is no LLM2CLIP model, or a vision half.
    """
    fields, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    if fields.get("model_type") != LLM2CLIPConfig.model_type:
        found = fields.get("model_type")
        raise ValueError(f"{name} is no LLM2CLIP model (its model_type is {found!r}); `llm2clip convert` it.")
    if with_llm and fields.get("architectures") == [LLM2CLIPVisionModelWithProjection.__name__]:
        raise ValueError(f"{name} is a vision half, which reads no texts; name the whole model.")


def vision_fingerprint(model: Any) -> str:
    """Identify the vision tower and projection of a model or of its vision half; equal for both.

    Equal for the same weights in float32 and in bfloat16, whatever LLM and adapter belong to them.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    state = {**model.vision_model.state_dict(prefix="vision_model.")}
    state.update(model.visual_projection.state_dict(prefix="visual_projection."))
    # transformers 5 nests some towers once more than earlier versions.
    names = {name.replace("vision_model.vision_model.", "vision_model."): name for name in state}
    digest_weights(((short, state[names[short]]) for short in sorted(names)), digest, FINGERPRINT_SAMPLES)
    return digest.hexdigest()[:32]

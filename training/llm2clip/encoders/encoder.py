"""An encoder: a model of any library that maps texts and images to rows of one space."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

from llm2clip.command_line.progress import ProgressBar
from llm2clip.data import EvalTransform, ImageBackend, OnError, decode_image
from llm2clip.data.transforms import Decoder, gain_and_offset
from llm2clip.encoders.images import ImageSet, image_list
from llm2clip.encoders.loop import PreparedImages, TokenizedTexts, encode_images, encode_texts
from llm2clip.encoders.patches import patch_embeddings
from llm2clip.files.atomic import digest_json
from llm2clip.models.embeddings import Precision, rounded_rows
from llm2clip.models.identity import RULE, weights_checksum
from llm2clip.models.places import is_repo
from llm2clip.models.repos import hub_commit
from llm2clip.store.shards import ComputedRows

logger = logging.getLogger(__name__)

# Texts that are sorted by length together.
TEXTS_AT_ONCE = 1024
# Skipped images that are named.
MAX_NAMED = 20


class Encoder(ABC):
    """A model that maps texts and images to rows of one space, whatever library it is from.

    A copy in a worker process prepares images, and has no model.

    Args:
        name: How the user named it.
        model: The model, in evaluation mode.
        width: Width of its embeddings.
        device, dtype: Where and in what it computes.

    Attributes:
        library: The library of the model, with its version.
        revision: Branch, tag or commit on the Hub that the user asked for.
        transform: What prepares images; None without images, and where the model has a transform of its own.
    """

    library: str
    revision: str | None = None
    transform: EvalTransform | None = None

    def __init__(self, name: str, model: Any, width: int, device: torch.device, dtype: str) -> None:
        self.name, self.model, self.width = name, model, width
        self.device, self.dtype = device, dtype
        self._fingerprint: str | None = None
        self.full_width = width
        self.precision: Precision = "float32"

    def truncate(self, truncate_dim: int | None, precision: Precision = "float32") -> Encoder:
        """Keep the first values of each embedding alone, scaled to unit length; None keeps all.

        Args:
            precision: What embeddings are rounded to; they stay float32 rows of unit length, which shows what a
                database of such vectors would find. See [`quantize_embeddings`].

        Raises:
            ValueError: Embeddings have fewer values.
        """
        if truncate_dim is not None and not 0 < truncate_dim <= self.full_width:
            raise ValueError(f"truncate_dim is {truncate_dim}, but {self.name} embeds as {self.full_width} values.")
        self.width, self.precision, self._fingerprint = truncate_dim or self.full_width, precision, None
        return self

    def compact(self, rows: Tensor) -> Tensor:
        """Return what `truncate` keeps of unit rows, of unit length."""
        rows = F.normalize(rows[..., : self.width], dim=-1) if self.width < self.full_width else rows
        return rounded_rows(rows, self.precision)

    @property
    def cut(self) -> dict[str, int | str]:
        """What identifies truncated and rounded embeddings beside the model."""
        identity: dict[str, int | str] = {"truncate_dim": self.width} if self.width < self.full_width else {}
        return identity if self.precision == "float32" else {**identity, "precision": self.precision}

    @property
    def image_backend(self) -> ImageBackend:
        """Library that decodes and resizes images; see [`EvalTransform`]."""
        return "exact" if self.transform is None else self.transform.backend

    @property
    def decode(self) -> Decoder:
        """What decodes an image before it is prepared."""
        return decode_image if self.transform is None else self.transform.decode

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None}

    @cached_property
    def commit(self) -> str | None:
        """Its commit on the Hub, which is asked for it; None for a model that is not there."""
        return hub_commit(self.name, self.revision) if self.name and is_repo(self.name) else None

    def identity(self) -> dict[str, str]:
        """Library with its version, name, commit on the Hub or else fingerprint, and dtype."""
        source = {"fingerprint": self.fingerprint()} if self.commit is None else {"commit": self.commit}
        return {"library": self.library, "name": self.name, **source, "dtype": self.dtype}

    def fingerprint(self) -> str:
        """Hash the weights, in 16 bits, the settings of the model, its preprocessing and its tokenizer.

        Stored rows are bound to it.

        Raises:
            ValueError: A weight is offloaded or quantised.
        """
        if self._fingerprint is None:
            weights = weights_checksum(self.model)
            self._fingerprint = RULE + digest_json({"weights": weights, **self.settings(), **self.cut})
        return self._fingerprint

    def image_fingerprint(self) -> str:
        """Identify what rows of images depend on; see [`Encoder.fingerprint`]."""
        return self.fingerprint()

    def text_fingerprint(self) -> str:
        """Identify what rows of texts depend on; see [`Encoder.fingerprint`]."""
        return self.fingerprint()

    def encode_text(
        self, texts: Sequence[str] | str, batch_size: int | None = None, show_progress_bar: bool = False
    ) -> Tensor:
        """Embed texts in batches of similar length. An empty text is one like any other.

        Args:
            texts: The texts, of any length; one string counts as a list of one.
            batch_size: Largest number of texts per forward pass; the default is as many as their tokens allow: 512
                padded tokens on a CPU, 16,384 elsewhere.
            show_progress_bar: Show a progress bar.

        Returns:
            Unit rows, float32 `(texts, width)` on the CPU, in input order.

        Raises:
            NonFiniteError: Embeddings are NaN or infinite; the message names the texts.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self.compact(encode_texts(self.tokenized(texts), texts, self.full_width, batch_size, show_progress_bar))

    @abstractmethod
    def tokenized(self, texts: list[str]) -> TokenizedTexts:
        """Tokenise texts, cut where they are too long; return them with what makes unit rows of them."""

    def encode_text_parts(self, texts: Sequence[str], batch_size: int | None = None) -> Iterator[ComputedRows]:
        """Embed texts as [`Encoder.encode_text`] does, some at a time, as a store takes them."""
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            yield ComputedRows(self.encode_text(texts[start : start + TEXTS_AT_ONCE], batch_size))

    def encode_image(
        self,
        images: Sequence[Any] | Any,
        batch_size: int = 64,
        num_workers: int = 0,
        show_progress_bar: bool = False,
        names: Sequence[str] | None = None,
        on_error: OnError = "raise",
    ) -> Tensor:
        """Embed images.

        Args:
            images: PIL images, paths, URLs, encoded bytes, arrays or tensors, or a single one.
            batch_size: Images per forward pass.
            num_workers: Worker processes that decode and prepare images; 0 for none.
            show_progress_bar: Show a progress bar.
            names: Names of the images in errors; by default their paths, or their positions in the list.
            on_error: `raise` for an image that cannot be decoded, or `skip` it: its row is NaN, with a warning.

        Returns:
            Unit rows, float32 `(images, width)` on the CPU, in input order.

        Raises:
            DamagedImageError: An image cannot be decoded, and is not skipped.
            NonFiniteError: Embeddings are NaN or infinite; the message names the images.
        """
        listed = image_list(images, names)
        rows, done, skipped = torch.empty(len(listed), self.width), 0, list[str]()
        with ProgressBar("Embedding images", len(listed), "image", show_progress_bar) as bar:
            for part in self.encode_image_parts(listed, range(len(listed)), batch_size, num_workers, on_error):
                end = done + len(part.rows)
                rows[done:end] = part.rows
                for place, key, reason in part.skipped:
                    rows[done + place] = torch.nan
                    skipped.append(f"{key}: {reason}")
                done = end
                bar.update(len(part.rows))
        for shown in skipped[:MAX_NAMED]:
            logger.warning("Skipping image %s", shown)
        if len(skipped) > MAX_NAMED:
            logger.warning("Skipping %d more images.", len(skipped) - MAX_NAMED)
        return rows

    def encode_image_parts(
        self,
        images: ImageSet,
        rows: Sequence[int],
        batch_size: int = 64,
        num_workers: int = 0,
        on_error: OnError = "raise",
        forward: Callable[[dict[str, Tensor]], Tensor] | None = None,
    ) -> Iterator[ComputedRows]:
        """Embed rows of an image set in order, a batch at a time, as a store takes them.

        Args:
            images, rows: The images, and the numbers of those to embed.
            batch_size, num_workers: See [`Encoder.encode_image`].
            on_error: `raise` for an image that cannot be decoded, or `skip` it: its row is zero and has a reason.
            forward: What is computed of a batch of prepared images; the default is the embedding.

        Raises:
            DamagedImageError: An image cannot be decoded, and is not skipped.
            NonFiniteError: Embeddings are NaN or infinite; the message names the images.
        """
        prepared = PreparedImages(images, self.prepare, on_error, self.decode)
        width = self.width if forward is None or on_error == "raise" else self._width_of(forward)
        compute = forward or self.forward_images
        return encode_images(self.model, prepared, rows, compute, width, batch_size, num_workers)

    def _width_of(self, forward: Callable[[dict[str, Tensor]], Tensor]) -> int:
        """Return the width of what is computed of images, of which perhaps none can be decoded."""
        sample = self.prepare(Image.new("RGB", (64, 64)), "a blank image")
        return forward({name: value[None] for name, value in sample.items()}).shape[1]

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Describe in JSON what embeddings depend on besides the weights."""

    def prepare(self, image: Any, key: str) -> dict[str, Tensor]:
        """Prepare the inputs of one decoded RGB image; runs in worker processes."""
        return self.image_transform().inputs(image, key)

    def prepare_pixels(self, image: Any) -> dict[str, Tensor]:
        """Prepare a decoded RGB image of any size without resizing or cropping it: `pixel_values`, `(3, H, W)`."""
        gain, offset = gain_and_offset(self.image_transform().image_processor.to_dict())
        return {"pixel_values": V.pil_to_tensor(image) * gain + offset}

    def image_transform(self) -> EvalTransform:
        """Return what prepares images.

        Raises:
            ValueError: It is not known.
        """
        if self.transform is None:
            raise ValueError(f"{self.name} has a transform of its own, whose mean and deviation are not known.")
        return self.transform

    @abstractmethod
    def image_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Compute `(images, width)`, not normalised, of prepared images; called without gradients."""

    @abstractmethod
    def pooled_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Compute the pooled features before the projection, `(images, hidden)`; called without gradients."""

    @torch.no_grad()
    def forward_images(self, inputs: dict[str, Tensor]) -> Tensor:
        """Embed a batch of prepared images: unit rows, float32 `(images, width)` on the CPU."""
        return self.compact(F.normalize(self.image_features(inputs).float(), dim=-1)).cpu()

    @torch.no_grad()
    def forward_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Compute pooled features before the projection, float32 `(images, hidden)` on the CPU.

        They are the projected ones of a tower that has no projection after its pooling (SigLIP, the ResNets of CLIP).
        """
        return self.pooled_features(inputs).float().cpu()

    @torch.no_grad()
    def forward_patches(self, inputs: dict[str, Tensor]) -> Tensor:
        """Patch embeddings after MaskCLIP of images from [`prepare_pixels`]: `(images, rows, columns, width)`, CPU.

        Raises:
            ValueError: The vision tower has no patches that MaskCLIP could embed; see [`patch_embeddings`].
        """
        return patch_embeddings(self.model, inputs["pixel_values"], values_only=True).cpu()

    @abstractmethod
    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of each text before truncation, `(texts,)` int64, and whether it is cut, `(texts,)` bool.

        A length of -1 is not known.
        """


class ClipEncoder(Encoder):
    """A model of another library, with a text tower of its own."""

    @torch.no_grad()
    def measure_width(self) -> None:
        """Set the width, which is 0 before, to that of the embedding of a text."""
        self.width = self.full_width = self.text_features(list(self.tokenize(["a"])[0])).shape[-1]

    @abstractmethod
    def tokenize(self, texts: list[str]) -> tuple[Sequence[Any], list[int]]:
        """Tokenise texts, cut and, where the model reads padding, padded; return the tokens and lengths of each."""

    @abstractmethod
    def text_features(self, tokens: list[Any]) -> Tensor:
        """Compute `(texts, width)`, not normalised, of items of [`tokenize`]; called without gradients."""

    def tokenized(self, texts: list[str]) -> TokenizedTexts:
        """See [`Encoder.tokenized`]. An empty text has the tokens that every text has, such as start and end."""
        tokens, lengths = self.tokenize(texts) if texts else ([], [])

        def prepare(rows: list[int]) -> list[Any]:
            return [tokens[row] for row in rows]

        def forward(chosen: list[Any]) -> Tensor:
            return F.normalize(self.text_features(chosen).float(), dim=-1)

        return TokenizedTexts(self.model, self.device, lengths, prepare, forward)


def compared_lengths(lengths: Sequence[int], limit: int) -> tuple[Tensor, Tensor]:
    """Return lengths in tokens, and which exceed the limit of a model."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    return counts, counts > limit


def dtype_for_device(model: Any, dtype: str, device: torch.device | str) -> None:
    """Compute in float32 what `auto` would leave in float16 on a CPU, where few processors multiply in that type.

    On one core of an AMD EPYC, EVA02-L/14-336 takes 18 s for an image in float16 and 5 s in float32. The LLM of an
    LLM2CLIP model, which may be large, stays as it is.
    """
    if dtype == "auto" and torch.device(device).type == "cpu":
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if weight.dtype == torch.float16 and not (name.startswith("text_model.") and ".decoder." in name):
                weight.data = weight.data.float()

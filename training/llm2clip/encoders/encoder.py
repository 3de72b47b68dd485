"""An encoder: a model of any library that maps texts and images to rows of one space."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V

from llm2clip.command_line.progress import ProgressBar
from llm2clip.data import ImageBackend, OnError, decode_image
from llm2clip.data.transforms import Decoder
from llm2clip.encoders.images import ImageSet, image_list
from llm2clip.encoders.loop import EncodedRows, PreparedImages, TokenizedTexts, encode_images, encode_texts
from llm2clip.encoders.patches import patch_embeddings
from llm2clip.files.atomic import digest_json
from llm2clip.models.embeddings import Precision, rounded_rows
from llm2clip.models.identity import RULE, weights_checksum

# Texts that are sorted by length together.
TEXTS_AT_ONCE = 1024


class Encoder(ABC):
    """A model that maps texts and images to rows of one space, whatever library it is from.

    A copy in a worker process prepares images, and has no model.

    Args:
        name: How the user named it.
        model: The model, in evaluation mode.
        width: Width of its embeddings.
        device, dtype: Where and in what it computes.
        commit: Its commit on the Hub.
        batch_size: Largest number of texts per forward pass; None for as many as their tokens allow.
    """

    library: str
    # What the user asked for, where a model has a choice.
    revision: str | None = None
    image_backend: ImageBackend = "exact"
    decode: Decoder = staticmethod(decode_image)

    def __init__(
        self,
        name: str,
        model: Any,
        width: int,
        device: torch.device,
        dtype: str,
        commit: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.name, self.model, self.width = name, model, width
        self.device, self.dtype, self.commit, self.batch_size = device, dtype, commit, batch_size
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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None}

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
            batch_size: Largest number of texts per forward pass; the default is that of the encoder.
            show_progress_bar: Show a progress bar.

        Returns:
            Unit rows, float32 `(texts, width)` on the CPU, in input order.

        Raises:
            NonFiniteError: Embeddings are NaN or infinite; the message names the texts.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = encode_texts(
            self.tokenized(texts), texts, self.full_width, batch_size or self.batch_size, show_progress_bar
        )
        return self.compact(rows)

    @abstractmethod
    def tokenized(self, texts: list[str]) -> TokenizedTexts:
        """Tokenise texts, cut where they are too long; return them with what makes unit rows of them."""

    def encode_text_parts(self, texts: Sequence[str], batch_size: int | None = None) -> Iterator[Tensor]:
        """Embed texts as [`Encoder.encode_text`] does, some at a time."""
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            yield self.encode_text(texts[start : start + TEXTS_AT_ONCE], batch_size)

    def encode_image(
        self,
        images: Sequence[Any] | Any,
        batch_size: int = 64,
        num_workers: int = 0,
        show_progress_bar: bool = False,
        names: Sequence[str] | None = None,
    ) -> Tensor:
        """Embed images.

        Args:
            images: PIL images, paths, URLs, encoded bytes, arrays or tensors, or a single one.
            batch_size: Images per forward pass.
            num_workers: Worker processes that decode and prepare images; 0 for none.
            show_progress_bar: Show a progress bar.
            names: Names of the images in errors; by default their paths, or their positions in the list.

        Returns:
            Unit rows, float32 `(images, width)` on the CPU, in input order.

        Raises:
            DamagedImageError: An image cannot be decoded.
            NonFiniteError: Embeddings are NaN or infinite; the message names the images.
        """
        listed = image_list(images, names)
        return self.encode_image_rows(
            listed,
            range(len(listed)),
            batch_size=batch_size,
            num_workers=num_workers,
            show_progress_bar=show_progress_bar,
        ).embeds

    def encode_image_rows(self, images: ImageSet, rows: Sequence[int], **options: Any) -> EncodedRows:
        """Embed rows of an image set in order; the arguments are those of [`Encoder.encode_image_parts`]."""
        parts = list(self.encode_image_parts(images, rows, **options))
        return parts[0] if parts else EncodedRows([], torch.empty(0, self.width), [])

    def encode_image_parts(
        self,
        images: ImageSet,
        rows: Sequence[int],
        batch_size: int = 64,
        num_workers: int = 0,
        part_size: int | None = None,
        on_error: OnError = "raise",
        show_progress_bar: bool = False,
        forward: Callable[[dict[str, Tensor]], Tensor] | None = None,
    ) -> Iterator[EncodedRows]:
        """Embed rows of an image set in order, a part at a time: no more than a part is in memory.

        Args:
            images, rows: The images, and the numbers of those to embed.
            batch_size, num_workers, show_progress_bar: See [`Encoder.encode_image`].
            part_size: Rows per part, a multiple of `batch_size`; the default is a single part.
            on_error: `raise` for an image that cannot be decoded, or `skip` it: its row has a reason.
            forward: What is computed of a batch of prepared images; the default is the embedding.

        Raises:
            DamagedImageError: An image cannot be decoded, and is not skipped.
            NonFiniteError: Embeddings are NaN or infinite; the message names the images.
        """
        prepared = PreparedImages(images, self.prepare, on_error, self.decode)
        compute = forward or self.forward_images
        width = (lambda: self.width) if forward is None else (lambda: self._width_of(forward))
        parts: list[EncodedRows] = []
        done = 0
        with ProgressBar("Embedding images", len(rows), "image", show_progress_bar) as bar:
            for batch in encode_images(self.model, prepared, rows, compute, width, batch_size, num_workers):
                bar.update(len(batch.rows))
                parts.append(batch)
                done += len(batch.rows)
                if done == len(rows) or (part_size and done % part_size == 0):
                    yield EncodedRows(
                        [row for part in parts for row in part.rows],
                        torch.cat([part.embeds for part in parts]),
                        [reason for part in parts for reason in part.reasons],
                    )
                    parts = []

    def _width_of(self, forward: Callable[[dict[str, Tensor]], Tensor]) -> int:
        """Return the width of what is computed of images, where none could be decoded."""
        sample = self.prepare(Image.new("RGB", (64, 64)), "a blank image")
        return forward({name: value[None] for name, value in sample.items()}).shape[1]

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Describe in JSON what embeddings depend on besides the weights."""

    @abstractmethod
    def prepare(self, image: Any, key: str) -> dict[str, Tensor]:
        """Prepare the inputs of one decoded RGB image; runs in worker processes."""

    @property
    @abstractmethod
    def pixel_statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of each channel, by which pixels of 0 to 1 are normalised."""

    def prepare_pixels(self, image: Any) -> dict[str, Tensor]:
        """Prepare a decoded RGB image of any size without resizing or cropping it: `pixel_values`, `(3, H, W)`."""
        mean, std = self.pixel_statistics
        return {"pixel_values": V.normalize(V.to_dtype(V.pil_to_tensor(image), torch.float32, True), mean, std)}

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
    def forward_features(self, inputs: dict[str, Tensor], projected: bool = False) -> Tensor:
        """Pooled features before the projection, float32 `(images, hidden)` on the CPU; with `projected` after it.

        A tower that has no projection after its pooling (SigLIP, the ResNets of CLIP) gives the same for both.
        """
        features = self.image_features(inputs) if projected else self.pooled_features(inputs)
        return features.float().cpu()

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


def processor_statistics(image_processor: Any) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation by which an image processor normalises pixels of 0 to 1."""
    settings = image_processor.to_dict()
    normalises = settings.get("do_normalize")
    mean, std = (
        settings[name] if normalises else value for name, value in (("image_mean", [0.0]), ("image_std", [1.0]))
    )
    scale = 255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale") else 255
    return [value / scale for value in mean], [value / scale for value in std]

"""A text encoder of any library and an affine map into the space of stored image vectors (`align --keep-images`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from llm2clip.encoders.encoder import Encoder
from llm2clip.encoders.loop import TokenizedTexts
from llm2clip.encoders.query_encoder import SPACE_FILE
from llm2clip.files.atomic import digest_json, read_json
from llm2clip.models.identity import RULE

# Its linear layer: `linear.weight` `(width, text width)` and `linear.bias` `(width,)`.
MAP = "map.safetensors"


class MappedTextEncoder(Encoder):
    """The rows of a text encoder, of unit length, mapped to unit rows in the space of image vectors.

    Args:
        text: The text encoder.
        weight: `(width, text width)`.
        bias: `(width,)`.
        image_fingerprint: [`Encoder.image_fingerprint`] of the model of the image vectors; None where it is not known.
        images: The model of the images, for queries that are images.

    Raises:
        ValueError: The map is one of texts of another width, or `images` is another model.
    """

    library = "llm2clip"

    def __init__(
        self,
        name: str,
        text: Encoder,
        weight: Tensor,
        bias: Tensor,
        image_fingerprint: str | None = None,
        images: Encoder | None = None,
    ) -> None:
        if weight.shape[1] != text.width:
            raise ValueError(
                f"the query encoder {name} maps texts of {weight.shape[1]} values, but {text.name} embeds as "
                f"{text.width}; give the text model that it was fitted with."
            )
        super().__init__(name, text.model, len(weight), text.device, text.dtype)
        self.text, self.weight, self.bias = text, weight.to(text.device), bias.to(text.device)
        self.of_images = image_fingerprint
        self.images: Encoder | None = None
        if images is not None:
            self.use_images(images)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        open_text: Callable[[str, str | None], Encoder],
        images: Encoder | None = None,
    ) -> MappedTextEncoder:
        """Open a folder that `llm2clip align --keep-images` wrote.

        Args:
            open_text: Opens its text model, by name and revision.

        Raises:
            FileNotFoundError: There is no such folder.
            ValueError: Its text model has changed.
        """
        name = os.fspath(folder)
        if not is_mapped_text(name):
            raise FileNotFoundError(
                f"{name} is no folder of a query encoder that llm2clip align --keep-images wrote: it has no {MAP}."
            )
        record, state = read_json(Path(name, SPACE_FILE)), load_file(Path(name, MAP))
        text = open_text(record["text_model"], record["text_model_revision"])
        if (found := text.text_fingerprint()) != record["text_fingerprint"]:
            raise ValueError(
                f"the query encoder {name} was fitted with {record['text_model']} of fingerprint "
                f"{record['text_fingerprint']}, but that model has {found} now; fit it again."
            )
        return cls(name, text, state["linear.weight"], state["linear.bias"], record["image_fingerprint"], images)

    def use_images(self, images: Encoder) -> None:
        """Embed images by their model.

        Raises:
            ValueError: It is not the one whose vectors the map was fitted to.
        """
        self.require_images(images.name, images.width, images.image_fingerprint())
        self.images, self.transform = images, images.transform

    def require_images(self, name: str, width: int, fingerprint: str | None) -> None:
        """Raise ValueError unless image vectors of a width are of the model whose vectors the map was fitted to.

        Args:
            name: What they are, for the message.
            fingerprint: [`Encoder.image_fingerprint`] of their model.
        """
        if (width, fingerprint) != (self.width, self.of_images):
            fitted = self.of_images or "an unknown model: fit it to the index itself"
            raise ValueError(
                f"the query encoder {self.name} was fitted to image vectors of {self.width} values of {fitted}, but "
                f"{name} has {width} values of {fingerprint}: they cannot be compared. Fit one: llm2clip align "
                "--keep-images."
            )

    def settings(self) -> dict[str, Any]:
        weight, bias = (value.double().cpu().flatten().tolist() for value in (self.weight, self.bias))
        return {"text": self.text.text_fingerprint(), "map": digest_json([weight, bias])}

    def text_fingerprint(self) -> str:
        return RULE + digest_json({**self.settings(), **self.cut})

    def image_fingerprint(self) -> str:
        return self._images().image_fingerprint()

    def tokenized(self, texts: list[str]) -> TokenizedTexts:
        inner = self.text.tokenized(texts)

        def forward(inputs: Any) -> Tensor:
            rows = F.normalize(self.text.compact(inner.forward(inputs)).float(), dim=-1)
            return F.normalize(F.linear(rows.to(self.weight.device), self.weight, self.bias), dim=-1)

        return inner._replace(forward=forward)

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of each text before truncation, and whether it is cut; see [`Encoder.text_lengths`]."""
        return self.text.text_lengths(texts)

    def encode_image(self, images: Any, *args: Any, **options: Any) -> Tensor:
        """Embed images by their model; see [`Encoder.encode_image`]."""
        return self._images().encode_image(images, *args, **options)

    def prepare(self, image: Any, key: str) -> dict[str, Tensor]:
        return self._images().prepare(image, key)

    def forward_images(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._images().forward_images(inputs)

    def image_features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._images().image_features(inputs)

    def pooled_features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._images().pooled_features(inputs)

    def _images(self) -> Encoder:
        if self.images is None:
            raise ValueError(f"the query encoder {self.name} embeds texts only; images need the model of the index.")
        return self.images


def is_mapped_text(folder: str | os.PathLike[str]) -> bool:
    """Tell whether a folder is a query encoder that `llm2clip align --keep-images` wrote."""
    return Path(folder, MAP).is_file()

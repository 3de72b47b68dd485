"""`create_model_and_transforms` and `get_tokenizer` of open_clip, for every model that `llm2clip.load_encoder` opens.

Code for open_clip runs with `from llm2clip import open_clip` in the place of `import open_clip`. It is for inference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llm2clip.encoders.encoder import Encoder
from llm2clip.encoders.load import load_encoder

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# What callers pass although it asks for nothing.
DEFAULTS: dict[str, Any] = {"jit": False, "cache_dir": None}


class Texts(list[str]):
    """Texts in the place of tokens, because an encoder tokenizes them itself.

    Args:
        model_name: The model that they are for.
    """

    def __init__(self, texts: Sequence[str] | str, model_name: str) -> None:
        super().__init__([texts] if isinstance(texts, str) else texts)
        self.model_name = model_name

    def to(self, device: torch.device | str) -> Texts:
        """Return the texts themselves, which are on no device."""
        return self


class Model:
    """An encoder with the methods of a model of open_clip, in evaluation mode and without gradients.

    Attributes:
        logit_scale: That of the model; the attribute is missing where the model has none.
    """

    def __init__(self, encoder: Encoder) -> None:
        inputs = encoder.prepare(Image.new("RGB", (32, 32)), "image")
        if len(inputs) != 1:
            raise ValueError(
                f"{encoder.name} reads an image as {', '.join(inputs)}; open_clip has one tensor an image."
            )
        (self._input,) = inputs
        self.encoder = encoder
        if hasattr(encoder.model, "logit_scale"):
            self.logit_scale = encoder.model.logit_scale

    def eval(self) -> Model:
        return self

    def to(self, device: torch.device | str) -> Model:
        """Return the model, which stays on its device; `cuda` is any of them.

        Raises:
            ValueError: It is on another device.
        """
        own = self.encoder.device
        if str(device) not in (str(own), own.type, f"{own.type}:0" if own.index is None else ""):
            raise ValueError(
                f"the model is on {self.encoder.device} and stays there: give device and precision to "
                "create_model_and_transforms."
            )
        return self

    def preprocess(self, image: Image.Image) -> Tensor:
        """Prepare an image for `encode_image`."""
        return self.encoder.prepare(self.encoder.decode(image, "image"), "image")[self._input]

    def encode_image(self, image: Tensor, normalize: bool = True) -> Tensor:
        """Embed a batch of prepared images: unit rows, float32 on the device of the model.

        Raises:
            ValueError: Rows of another length than one are asked for.
        """
        _require_unit_rows(normalize)
        return self.encoder.forward_images({self._input: image}).to(self.encoder.device)

    def encode_text(self, text: Texts, normalize: bool = True) -> Tensor:
        """Embed what the tokenizer of the model returned: unit rows, float32 on the device of the model.

        Raises:
            ValueError: It is from elsewhere, or rows of another length than one are asked for.
        """
        _require_unit_rows(normalize)
        if getattr(text, "model_name", None) != self.encoder.name:
            raise ValueError(f"encode_text takes what get_tokenizer({self.encoder.name!r}) makes of texts.")
        return self.encoder.encode_text(list(text)).to(self.encoder.device)


def create_model_and_transforms(
    model_name: str,
    pretrained: str | None = None,
    *,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    **other: Any,
) -> tuple[Model, Callable[[Any], Tensor], Callable[[Image.Image], Tensor]]:
    """Open a model of images and texts.

    Args:
        model_name: What `load_encoder` takes, such as a folder, a Hub id or `open_clip:ViT-B-32/openai`.
        pretrained: Branch, tag or commit on the Hub; an empty text is none.
        precision: `fp32`, `bf16` or `fp16`.
        device: Where the model computes.
        **other: Other arguments of open_clip are refused.

    Returns:
        The model, a transform of training, which raises NotImplementedError, and the transform of evaluation.

    Raises:
        OSError: There is no such model.
        TypeError: An argument has no meaning here.
        ValueError: The precision is unknown, or the model lacks a side or reads images in several parts.
    """
    unsupported = [name for name, value in other.items() if name not in DEFAULTS or value != DEFAULTS[name]]
    if unsupported:
        raise TypeError(f"llm2clip.open_clip does not support {', '.join(unsupported)}; leave it out.")
    if precision not in DTYPES:
        raise ValueError(f"precision is {precision!r}; choose {', '.join(DTYPES)}.")
    encoder = load_encoder(model_name, pretrained or None, DTYPES[precision], device, needs=["image", "text"])
    model = Model(encoder)
    return model, _no_training, model.preprocess


def get_tokenizer(model_name: str) -> Callable[[Sequence[str] | str], Texts]:
    """Return what makes the input of `encode_text` of texts.

    Args:
        model_name: The name that the model was created by.
    """
    return lambda texts: Texts(texts, model_name)


def _no_training(image: Any) -> Tensor:
    raise NotImplementedError("llm2clip.open_clip has no transform of training; llm2clip stage2 trains with its own.")


def _require_unit_rows(normalize: bool) -> None:
    if not normalize:
        raise ValueError("rows are of unit length here: leave normalize out.")

"""Models that a function of the user loads."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.encoders.encoder import ClipEncoder, compared_lengths
from llm2clip.files.atomic import sha256

RETURNS = "(model, preprocess, tokenizer), as open_clip and CLIP_benchmark have them"


def module_of(path: Path) -> Any:
    """Run a Python file of the user, and return it as a module."""
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CustomEncoder(ClipEncoder):
    """A model by the conventions of open_clip and CLIP_benchmark.

    Args:
        name, device, dtype: See [`Encoder`].
        model: A module with `encode_image(pixels)` and `encode_text(tokens)`, which return `(batch, width)`.
        preprocess: Makes a tensor of a decoded RGB image.
        tokenizer: Makes a tensor `(texts, tokens)`, or a mapping of such tensors, of a list of texts.
        code: SHA-256 of the file with the function.
    """

    library = "custom"

    def __init__(
        self,
        name: str,
        model: nn.Module,
        preprocess: Any,
        tokenizer: Any,
        code: str,
        device: torch.device,
        dtype: str = "float32",
    ) -> None:
        super().__init__(name, model.to(device, getattr(torch, dtype)).eval(), 0, device, dtype)
        self.preprocess, self.tokenizer, self.code = preprocess, tokenizer, code
        self.measure_width()

    @classmethod
    def load(cls, spec: str, dtype: str, device: torch.device) -> CustomEncoder:
        """Load `PATH.py:FUNCTION`; the function takes no arguments.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It has no such function, or that returns something else.
        """
        path, _, name = spec.rpartition(":")
        if not Path(path).is_file():
            raise FileNotFoundError(f"{spec}: the file {path} does not exist.")
        function = getattr(module_of(Path(path)), name, None)
        if not callable(function):
            raise ValueError(f"{path} has no function {name!r}.")
        made = function()
        if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[0], nn.Module)):
            raise ValueError(f"{spec} has to return {RETURNS}, but returns {type(made).__name__}.")
        return cls(spec, *made, sha256(Path(path)), device, dtype)

    def settings(self) -> dict[str, Any]:
        return {"code": self.code, "model": repr(self.model)}

    def prepare(self, image: Any, key: str) -> dict[str, Tensor]:
        return {"pixel_values": self.preprocess(image)}

    def image_features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model.encode_image(inputs["pixel_values"].to(self.device, getattr(torch, self.dtype)))

    def pooled_features(self, inputs: dict[str, Tensor]) -> Tensor:
        raise ValueError(f"{self.name} does not say what its features are before the projection.")

    def tokenize(self, texts: list[str]) -> tuple[Sequence[Any], list[int]]:
        tokens = self.tokenizer(texts)
        if isinstance(tokens, Mapping):
            rows: list[Any] = [{name: values[row] for name, values in tokens.items()} for row in range(len(texts))]
            return rows, [len(next(iter(row.values()))) for row in rows]
        return tokens, [tokens.shape[1]] * len(tokens)

    def text_features(self, tokens: list[Any]) -> Tensor:
        if isinstance(tokens[0], dict):
            batch = {name: torch.stack([row[name] for row in tokens]).to(self.device) for name in tokens[0]}
            return self.model.encode_text(batch)
        return self.model.encode_text(torch.stack(tokens).to(self.device))

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of each text, padding included; whether one is cut is not known, and counts as not."""
        lengths = self.tokenize(list(texts))[1] if texts else []
        return compared_lengths(lengths, max(lengths, default=0))

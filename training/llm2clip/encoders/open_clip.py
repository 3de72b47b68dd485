"""Models of the open_clip library as encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor
from torchvision.transforms.v2 import functional as V

from llm2clip.encoders.encoder import ClipEncoder, compared_lengths
from llm2clip.models.identity import tokenizer_fingerprint
from llm2clip.models.places import OPEN_CLIP

# Names of models whose weights belong to them.
WITH_WEIGHTS = ("hf-hub:", "local-dir:")
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
INSTALL = "install it with pip install open-clip-torch, or pip install 'llm2clip[eval]'"


class OpenClipEncoder(ClipEncoder):
    """A model of open_clip with its own preprocessing and tokenizer.

    Args:
        name, device, dtype: See [`Encoder`].
        model: The model, in evaluation mode.
        transform: Its transform of evaluation.
        tokenizer: Its tokenizer.
    """

    def __init__(
        self, name: str, model: Any, transform: Any, tokenizer: Any, device: torch.device, dtype: str = "float32"
    ) -> None:
        import open_clip

        self.library = f"open_clip {open_clip.__version__}"
        super().__init__(name, model, 0, device, dtype)
        self.tokenizer = tokenizer
        # Worker processes send pixels as bytes; the last steps run on the batch, with the same operations.
        steps = list(getattr(transform, "transforms", []))
        self.normalises = len(steps) > 1 and isinstance(steps[-1], Normalize) and isinstance(steps[-2], ToTensor)
        self.preprocess = Compose(steps[:-2]) if self.normalises else transform
        self.normalisation = Normalize(steps[-1].mean, steps[-1].std, inplace=True) if self.normalises else None
        self._values: Tensor | None = None
        self.input_dtype = getattr(torch, dtype)
        self.measure_width()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_values": None}

    @classmethod
    def load(cls, spec: str, dtype: str, device: torch.device) -> OpenClipEncoder:
        """Load `open_clip:MODEL/PRETRAINED`, `open_clip:hf-hub:OWNER/NAME` or `open_clip:local-dir:FOLDER`.

        Raises:
            ImportError: open_clip is not installed.
            ValueError: There is no such model or dtype, or it names no weights.
        """
        try:
            import open_clip
        except ImportError as error:
            raise ImportError(f"{spec} is a model of open_clip: {INSTALL} ({error}).") from error
        if dtype not in PRECISIONS:
            raise ValueError(f"dtype {dtype!r} is unknown to open_clip; choose {', '.join(PRECISIONS)}.")
        model_name, pretrained = _parts(spec, open_clip)
        model, _, transform = open_clip.create_model_and_transforms(
            model_name, pretrained=pretrained, precision=PRECISIONS[dtype], device=device
        )
        tokenizer = open_clip.get_tokenizer(model_name)
        return cls(spec, model.eval(), transform, tokenizer, device, dtype)

    def settings(self) -> dict[str, Any]:
        inner = getattr(self.tokenizer, "tokenizer", None)
        vocabulary = None if inner is None else tokenizer_fingerprint(inner)
        # The text of a module or transform names its layers or steps, activations and sizes.
        return {
            "model": repr(self.model),
            "preprocessing": repr([self.preprocess, self.normalisation]),
            "tokenizer": [type(self.tokenizer).__name__, self.tokenizer.context_length, vocabulary],
        }

    def prepare(self, image: Any, key: str) -> dict[str, Tensor]:
        prepared = self.preprocess(image)
        return {"pixels": V.pil_to_tensor(prepared)} if self.normalises else {"pixel_values": prepared}

    def _pixel_values(self, inputs: dict[str, Tensor]) -> Tensor:
        if self.normalisation is None:
            return inputs["pixel_values"].to(self.device, self.input_dtype)
        pixels = inputs["pixels"].to(self.device)
        if self._values is None or self._values.shape[1:] != pixels.shape[1:] or len(self._values) < len(pixels):
            # Memory of inference mode, in which loops run, could not be written to outside of it.
            with torch.inference_mode(False):
                self._values = torch.empty(pixels.shape, device=self.device)
        values = self._values[: len(pixels)]
        # On a CPU image by image in its caches, and in memory that is kept: fresh memory costs more than arithmetic.
        size = 1 if self.device.type == "cpu" else len(pixels)
        for part, source in zip(values.split(size), pixels.split(size), strict=True):
            self.normalisation(part.copy_(source).div_(255))
        return values.to(self.input_dtype)

    def image_features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model.encode_image(self._pixel_values(inputs), normalize=False)

    def pooled_features(self, inputs: dict[str, Tensor]) -> Tensor:
        visual, pixels = self.model.visual, self._pixel_values(inputs)
        if hasattr(visual, "trunk"):
            return visual.trunk(pixels)
        projection = getattr(visual, "proj", None)
        if projection is None:
            return self.model.encode_image(pixels, normalize=False)
        visual.proj = None
        try:
            output = visual(pixels)
        finally:
            visual.proj = projection
        return output[0] if isinstance(output, tuple) else output

    def tokenize(self, texts: list[str]) -> tuple[Sequence[Any], list[int]]:
        rows = self.tokenizer(texts)
        return rows, [rows.shape[1]] * len(rows)

    def text_features(self, tokens: list[Any]) -> Tensor:
        return self.model.encode_text(torch.stack(tokens).to(self.device), normalize=False)

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of each text before truncation, start and end included, and whether it is cut."""
        return compared_lengths([self._length(text) for text in texts], self.tokenizer.context_length)

    def _length(self, text: str) -> int:
        from open_clip.tokenizer import get_clean_fn

        if hasattr(self.tokenizer, "encode"):  # SimpleTokenizer, without start and end
            return len(self.tokenizer.encode(text)) + 2
        # The tokenizer of SigLIP cleans texts in its call.
        cleaned = (getattr(self.tokenizer, "clean_fn", None) or get_clean_fn("canonicalize"))(text)
        if getattr(self.tokenizer, "tokenizer_mode", "") == "clips":  # with start, end and class token
            return len(self.tokenizer.tokenizer(cleaned, add_special_tokens=False, verbose=False)["input_ids"]) + 3
        return len(self.tokenizer.tokenizer(cleaned, verbose=False)["input_ids"])


def _parts(spec: str, open_clip: Any) -> tuple[str, str | None]:
    """Split a name into those of the model and of its weights; see [`OpenClipEncoder.load`]."""
    name = spec.removeprefix(OPEN_CLIP)
    if name.startswith(WITH_WEIGHTS):
        return name, None
    model, _, pretrained = name.partition("/")
    if model not in open_clip.list_models():
        raise ValueError(f"open_clip has no model {model!r}; open_clip.list_models() shows all.")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not (pretrained in tags or Path(pretrained).is_file()):
        fault = f"{pretrained!r} is neither a file nor" if pretrained else "it does not name"
        raise ValueError(f"{spec}: {fault} pretrained weights of {model}. Its tags: {', '.join(tags) or 'none'}.")
    return model, pretrained

"""CLIP_benchmark with LLM2CLIP models: its loader convention, and its command with them.

    python -m llm2clip.evaluation.clip_benchmark eval --model_type llm2clip --model FOLDER --pretrained "" \
        --dataset flickr30k --dataset_root DATA

CLIP_benchmark 1.6.2 cannot print the accuracy of zero-shot classification under NumPy 2.4; an older NumPy can.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor, BatchFeature, PretrainedConfig

from llm2clip.data import EvalTransform, decode_image
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor

MODEL_TYPE = "llm2clip"


class CLIPBenchmarkModel(nn.Module):
    """A model with the two methods and the scale that CLIP_benchmark calls."""

    def __init__(self, model: LLM2CLIPModel) -> None:
        super().__init__()
        self.model = model

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the factor between cosine and logit."""
        return self.model.logit_scale

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images of the transform, `(images, 3, height, width)`; `(images, projection_dim)`, not normalised."""
        features: Any = self.model.get_image_features(images.to(self.model.dtype))
        return features.pooler_output

    def encode_text(self, tokens: BatchFeature) -> Tensor:
        """Embed captions of the tokenizer, on the model's device; `(captions, projection_dim)`, not normalised."""
        features: Any = self.model.get_text_features(**tokens)
        return features.pooler_output


class CLIPBenchmarkTransform:
    """PIL image of any mode to pixels, `(3, height, width)`."""

    def __init__(self, image_processor: Any) -> None:
        self.transform = EvalTransform(image_processor)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(decode_image(image, "image"))


class CLIPBenchmarkTokenizer:
    """Captions to tokens: `tokenizer(texts).to(device)`. Over-long captions are cut, and their number is logged."""

    def __init__(self, processor: LLM2CLIPProcessor) -> None:
        self.processor = processor

    def __call__(self, texts: list[str] | str) -> BatchFeature:
        return self.processor(text=[texts] if isinstance(texts, str) else list(texts), return_tensors="pt")

    def __len__(self) -> int:
        return len(self.processor.tokenizer)


def load_clip(
    model_name: str,
    pretrained: str | None = None,
    cache_dir: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[CLIPBenchmarkModel, CLIPBenchmarkTransform, CLIPBenchmarkTokenizer]:
    """Load a model as CLIP_benchmark wants it.

    Args:
        model_name: Folder or Hub id.
        pretrained: Branch, tag or commit of a Hub id; empty for a folder.
        cache_dir: Where downloads are kept.
        device: Where the model runs.

    Returns:
        The model, the image transform and the tokenizer.

    Raises:
        ValueError: The repo holds another kind of model, or one whose images are more than one tensor of pixels; or
            `pretrained` is given with a folder.
    """
    if pretrained and Path(model_name).is_dir():
        raise ValueError(
            f"pretrained ({pretrained!r}) is a revision on the Hub, but {model_name} is a folder; leave it empty: "
            '--pretrained "".'
        )
    where: dict[str, Any] = {"revision": pretrained or None, "cache_dir": cache_dir}
    kind = PretrainedConfig.get_config_dict(model_name, **where)[0].get("model_type")
    if kind != LLM2CLIPConfig.model_type:
        raise ValueError(f"{model_name} holds a model of type {kind!r}, not an LLM2CLIP model.")
    processor: Any = AutoProcessor.from_pretrained(model_name, **where)
    names = list(processor.image_processor.model_input_names)
    if names != ["pixel_values"]:
        raise ValueError(
            f"the images of {model_name} are {', '.join(names)}, but CLIP_benchmark passes pixels alone; use "
            "`llm2clip evaluate` or LLM2CLIPEncoder."
        )
    model = LLM2CLIPModel.from_pretrained(model_name, **where).to(device)
    return (
        CLIPBenchmarkModel(model).eval(),
        CLIPBenchmarkTransform(processor.image_processor),
        CLIPBenchmarkTokenizer(processor),
    )


def register() -> None:
    """Make `--model_type llm2clip` known to CLIP_benchmark in this process."""
    from clip_benchmark.models import MODEL_TYPES, TYPE2FUNC

    TYPE2FUNC[MODEL_TYPE] = load_clip
    if MODEL_TYPE not in MODEL_TYPES:
        MODEL_TYPES.append(MODEL_TYPE)


def main() -> None:
    """CLIP_benchmark's own command, with `--model_type llm2clip`."""
    register()
    from clip_benchmark.cli import main as clip_benchmark_main

    clip_benchmark_main()


__all__ = ["CLIPBenchmarkModel", "load_clip", "register"]

if __name__ == "__main__":
    main()

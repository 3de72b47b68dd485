"""CLIP_benchmark with LLM2CLIP models: a loader by its conventions, and its command with that loader.

    python -m llm2clip.evaluation.clip_benchmark eval --model_type llm2clip --model FOLDER --pretrained "" \
        --dataset flickr30k --dataset_root DATA

Zero-shot classification in CLIP_benchmark 1.6.2 needs a NumPy older than 2.4.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor, BatchFeature

from llm2clip.data import EvalTransform, decode_image
from llm2clip.utils.non_finite import require_finite_rows
from llm2clip.utils.repos import RepoKind, inspect_repo
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor

MODEL_TYPE = "llm2clip"


class CLIPBenchmarkModel(nn.Module):
    """A model with the methods and the logit scale that CLIP_benchmark expects."""

    def __init__(self, model: LLM2CLIPModel) -> None:
        super().__init__()
        self.model = model

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the factor between cosines and logits."""
        return self.model.logit_scale

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed prepared images `(images, 3, height, width)`; returns `(images, projection_dim)`, not normalised."""
        embeds: Any = self.model.get_image_features(images.to(self.model.dtype)).pooler_output
        require_finite_rows(embeds, str, "images of a batch")
        return embeds

    def encode_text(self, tokens: BatchFeature) -> Tensor:
        """Embed tokenised captions; returns `(captions, projection_dim)`, not normalised."""
        embeds: Any = self.model.get_text_features(**tokens).pooler_output
        require_finite_rows(embeds, str, "captions of a batch")
        return embeds


class CLIPBenchmarkTransform:
    """Prepares a PIL image of any mode: `(3, height, width)`."""

    def __init__(self, image_processor: Any) -> None:
        self.transform = EvalTransform(image_processor)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(decode_image(image, "image"))


class CLIPBenchmarkTokenizer:
    """Tokenises captions: `tokenizer(texts).to(device)`. Long captions are truncated with a warning."""

    def __init__(self, processor: LLM2CLIPProcessor) -> None:
        self.processor = processor

    def __call__(self, texts: list[str] | str) -> BatchFeature:
        return self.processor(text=[texts] if isinstance(texts, str) else list(texts), return_tensors="pt")

    def __len__(self) -> int:
        return len(self.processor.tokenizer)


def load_clip(
    model_name: str, pretrained: str | None = None, cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[CLIPBenchmarkModel, CLIPBenchmarkTransform, CLIPBenchmarkTokenizer]:
    """Load a model for CLIP_benchmark.

    Args:
        model_name: Folder or Hub id.
        pretrained: Branch, tag or commit on the Hub; empty for a folder.
        cache_dir: Folder of downloads.
        device: Device of the model.

    Raises:
        ValueError: The repository is another kind of model, the image processor returns more than `pixel_values`, or
            `pretrained` is given with a folder.
    """
    if pretrained and Path(model_name).is_dir():
        raise ValueError(
            f"pretrained ({pretrained!r}) is a revision on the Hub, but {model_name} is a folder; pass an empty one: "
            '--pretrained "".'
        )
    where: dict[str, Any] = {"revision": pretrained or None, "cache_dir": cache_dir}
    inspect_repo(model_name, **where).require(RepoKind.JOINT)
    processor: Any = AutoProcessor.from_pretrained(model_name, **where)
    names = list(processor.image_processor.model_input_names)
    if names != ["pixel_values"]:
        raise ValueError(
            f"the vision tower of {model_name} needs {', '.join(names)}, but CLIP_benchmark only passes pixel_values; "
            "use `llm2clip evaluate` or LLM2CLIPEncoder."
        )
    model = CLIPBenchmarkModel(LLM2CLIPModel.from_pretrained(model_name, **where)).to(device).eval()
    return model, CLIPBenchmarkTransform(processor.image_processor), CLIPBenchmarkTokenizer(processor)


def register() -> None:
    """Add the model type `llm2clip` to CLIP_benchmark in this process."""
    from clip_benchmark.models import MODEL_TYPES, TYPE2FUNC

    TYPE2FUNC[MODEL_TYPE] = load_clip
    if MODEL_TYPE not in MODEL_TYPES:
        MODEL_TYPES.append(MODEL_TYPE)


def main() -> None:
    """Run the command of CLIP_benchmark, with the model type `llm2clip`."""
    from clip_benchmark import cli

    register()
    cli.main()


if __name__ == "__main__":
    main()

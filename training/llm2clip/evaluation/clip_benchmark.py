"""CLIP_benchmark with LLM2CLIP models: a loader by its conventions, and its command with that loader.

    python -m llm2clip.evaluation.clip_benchmark eval --model_type llm2clip --model FOLDER --pretrained "" \
        --dataset flickr30k --dataset_root DATA

Zero-shot classification in CLIP_benchmark 1.6.2 needs a NumPy older than 2.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from llm2clip.data import decode_image
from llm2clip.encoders import OurEncoder
from llm2clip.utils.embeddings import require_finite_rows

MODEL_TYPE = "llm2clip"


class CLIPBenchmarkModel(nn.Module):
    """An encoder with the methods and the logit scale that CLIP_benchmark expects."""

    def __init__(self, encoder: OurEncoder) -> None:
        super().__init__()
        self.model: Any = encoder.model
        self.encoder = encoder

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the factor between cosines and logits."""
        return self.model.logit_scale

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed prepared images `(images, 3, height, width)`; returns `(images, width)`, not normalised."""
        embeds = self.encoder.image_features({"pixel_values": images})
        require_finite_rows(embeds, str, "images of a batch")
        return embeds

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: unit rows `(texts, width)`."""
        return self.encoder.encode_text(texts).to(self.model.logit_scale.device)


class CLIPBenchmarkTransform:
    """Prepares a PIL image of any mode: `(3, height, width)`."""

    def __init__(self, encoder: OurEncoder) -> None:
        self.encoder = encoder

    def __call__(self, image: Image.Image) -> Tensor:
        return self.encoder.prepare(decode_image(image, "image"), "image")["pixel_values"]


class CLIPBenchmarkTexts(list[str]):
    """Texts in the place of tokens: the encoder tokenises them itself. One string counts as a list of one."""

    def __init__(self, texts: Sequence[str] | str) -> None:
        super().__init__([texts] if isinstance(texts, str) else texts)

    def to(self, device: Any) -> CLIPBenchmarkTexts:
        """Return the texts, which are on no device."""
        return self


def load_clip(
    model_name: str, pretrained: str | None = None, cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[CLIPBenchmarkModel, CLIPBenchmarkTransform, type[CLIPBenchmarkTexts]]:
    """Load a model for CLIP_benchmark.

    Args:
        model_name: Folder or Hub id.
        pretrained: Branch, tag or commit on the Hub; empty for a folder.
        cache_dir: Not supported.
        device: Device of the model.

    Raises:
        ValueError: The repository is another kind of model, the image processor returns more than `pixel_values`,
            `pretrained` is given with a folder, or `cache_dir` is given.
    """
    if cache_dir is not None:
        raise ValueError(f"model_cache_dir ({cache_dir}) is not supported; set HF_HUB_CACHE to that folder instead.")
    if pretrained and Path(model_name).is_dir():
        raise ValueError(
            f"pretrained ({pretrained!r}) is a revision on the Hub, but {model_name} is a folder; pass an empty one: "
            '--pretrained "".'
        )
    encoder = OurEncoder.load(model_name, pretrained or None, ["image", "text"], device=device)
    assert encoder.transform is not None
    names = list(encoder.transform.image_processor.model_input_names)
    if names != ["pixel_values"]:
        raise ValueError(
            f"the vision tower of {model_name} needs {', '.join(names)}, but CLIP_benchmark only passes pixel_values; "
            "use `llm2clip evaluate` or LLM2CLIPEncoder."
        )
    return CLIPBenchmarkModel(encoder), CLIPBenchmarkTransform(encoder), CLIPBenchmarkTexts


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

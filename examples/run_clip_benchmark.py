"""CLIP_benchmark's command with a model type for every model that `llm2clip.load_encoder` opens.

python examples/run_clip_benchmark.py eval --model_type llm2clip --model runs/quickstart/llm2clip --pretrained "" \
    --dataset flickr30k --dataset_root DATA
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from llm2clip import load_encoder


class Model(torch.nn.Module):
    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.logit_scale = encoder.model.logit_scale
        # Models that read images in several parts (NaFlex) are none for CLIP_benchmark.
        (self.name,) = encoder.prepare(Image.new("RGB", (32, 32)), "image")

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.encoder.image_features({self.name: images})

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        return self.encoder.encode_text(texts).to(self.encoder.device)


class Texts(list):  # in the place of tokens: the encoder tokenises texts itself
    def __init__(self, texts: Any) -> None:
        super().__init__([texts] if isinstance(texts, str) else texts)

    def to(self, device: Any) -> Texts:
        return self


def load(model_name: str, pretrained: str = "", cache_dir: str | None = None, device: str = "cpu") -> tuple[Any, ...]:
    model = Model(encoder := load_encoder(model_name, pretrained or None, device=device))

    def transform(image: Image.Image) -> torch.Tensor:
        return encoder.prepare(encoder.decode(image, "image"), "image")[model.name]

    return model, transform, Texts


if __name__ == "__main__":
    from clip_benchmark import cli  # here, because it imports pycocoevalcap for captioning
    from clip_benchmark.models import MODEL_TYPES, TYPE2FUNC

    TYPE2FUNC["llm2clip"] = load
    MODEL_TYPES.append("llm2clip")
    cli.main()

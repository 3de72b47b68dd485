"""transformers' image pipelines with this repository's image decoder.

transformers' own convert an image to RGB before the image processor sees it, which drops transparency and clips 16-bit
images. `config.custom_pipelines` makes `pipeline(task, model=..., trust_remote_code=True)` use these classes instead.
"""

from __future__ import annotations

from typing import Any

from transformers.pipelines.image_feature_extraction import ImageFeatureExtractionPipeline
from transformers.pipelines.zero_shot_image_classification import ZeroShotImageClassificationPipeline

from .image_decoding_llm2clip import DEFAULT_TIMEOUT, decode_image, with_pillow


class LLM2CLIPImagePipeline:
    """Decode an image of any kind that [`decode_image`] reads, and resize it with Pillow."""

    image_processor: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.image_processor = with_pillow(self.image_processor)

    def preprocess(self, image: Any, *args: Any, timeout: float | None = DEFAULT_TIMEOUT, **kwargs: Any) -> Any:
        return super().preprocess(decode_image(image, timeout=timeout), *args, **kwargs)  # type: ignore[misc]


class LLM2CLIPImageFeatureExtractionPipeline(LLM2CLIPImagePipeline, ImageFeatureExtractionPipeline):  # type: ignore[misc]
    """Image embeddings (`pool=True`) or patch states."""


class LLM2CLIPZeroShotImageClassificationPipeline(LLM2CLIPImagePipeline, ZeroShotImageClassificationPipeline):  # type: ignore[misc]
    """Zero-shot classification."""


def custom_pipelines(with_text: bool) -> dict[str, dict[str, Any]]:
    """Build the entry `custom_pipelines` of the config.json of a saved model, which may encode captions too."""
    heads: dict[str, Any] = {"image-feature-extraction": (LLM2CLIPImageFeatureExtractionPipeline, "AutoModel")}
    if with_text:
        head = "AutoModelForZeroShotImageClassification"
        heads["zero-shot-image-classification"] = (LLM2CLIPZeroShotImageClassificationPipeline, head)
    module = __name__.rpartition(".")[2]
    return {task: {"impl": f"{module}.{cls.__name__}", "pt": [head]} for task, (cls, head) in heads.items()}

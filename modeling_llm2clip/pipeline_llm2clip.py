"""transformers' image pipelines with this repository's image decoder.

transformers' own convert an image to RGB before the image processor sees it, which drops transparency and clips 16-bit
images. `config.custom_pipelines` makes `pipeline(task, model=..., trust_remote_code=True)` use these classes instead.
"""

from __future__ import annotations

from typing import Any

from transformers.pipelines.image_feature_extraction import ImageFeatureExtractionPipeline
from transformers.pipelines.zero_shot_image_classification import ZeroShotImageClassificationPipeline

from .image_decoding_llm2clip import decode_image


class LLM2CLIPImageFeatureExtractionPipeline(ImageFeatureExtractionPipeline):
    """Image embeddings (`pool=True`) or patch states of images of any kind that [`decode_image`] reads."""

    def preprocess(  # type: ignore[override]
        self, image: Any, timeout: float | None = None, **image_processor_kwargs: Any
    ) -> Any:
        """Decode and prepare one image."""
        return super().preprocess(decode_image(image, timeout=timeout), **image_processor_kwargs)


class LLM2CLIPZeroShotImageClassificationPipeline(ZeroShotImageClassificationPipeline):
    """Zero-shot classification of images of any kind that [`decode_image`] reads."""

    def preprocess(  # type: ignore[override]
        self, image: Any, *args: Any, timeout: float | None = None, **kwargs: Any
    ) -> Any:
        """Decode and prepare one image, and tokenise the candidate labels."""
        return super().preprocess(decode_image(image, timeout=timeout), *args, **kwargs)


def custom_pipelines(with_text: bool) -> dict[str, dict[str, Any]]:
    """Build the entry `custom_pipelines` of a saved model's config.json.

    Args:
        with_text: Whether the model encodes captions too.
    """
    module = __name__.rpartition(".")[2]
    pipelines = {
        "image-feature-extraction": {
            "impl": f"{module}.{LLM2CLIPImageFeatureExtractionPipeline.__name__}",
            "pt": ["AutoModel"],
        }
    }
    if with_text:
        pipelines["zero-shot-image-classification"] = {
            "impl": f"{module}.{LLM2CLIPZeroShotImageClassificationPipeline.__name__}",
            "pt": ["AutoModelForZeroShotImageClassification"],
        }
    return pipelines


__all__ = ["LLM2CLIPImageFeatureExtractionPipeline", "LLM2CLIPZeroShotImageClassificationPipeline"]

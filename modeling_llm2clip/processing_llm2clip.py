"""The processor of LLM2CLIP, for images and captions, and its image pipelines."""

from __future__ import annotations

import copy
from typing import Any

from transformers import BatchFeature
from transformers.pipelines.image_feature_extraction import ImageFeatureExtractionPipeline
from transformers.pipelines.zero_shot_image_classification import ZeroShotImageClassificationPipeline
from transformers.processing_utils import ProcessorMixin

from .compatibility_llm2clip import ProcessorParts, make_readable_by_version_4
from .image_decoding_llm2clip import (
    DEFAULT_TIMEOUT,
    decode_image,
    decode_images,
    is_list,
    refuse_picture,
    require_file,
    with_pillow,
)
from .tokenization_llm2clip import CuttingTokenizer, clean_captions


class LLM2CLIPProcessor(ProcessorParts, ProcessorMixin):
    """Image processor and caption tokenizer.

    Images are resized with Pillow where possible, see [`with_pillow`]. By default captions are padded to the longest
    and truncated at the tokenizer's maximum length; the number of truncated captions is logged.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(with_pillow(image_processor), tokenizer, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Save the processor, readable by transformers 4.57 too."""
        if push_to_hub:
            raise ValueError("save_pretrained(push_to_hub=True) would upload other files; call push_to_hub(repo_id).")
        saved = super().save_pretrained(save_directory, **kwargs)
        make_readable_by_version_4(save_directory)
        return saved

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Prepare images, captions or both.

        Args:
            images: One image or a list, of any kind that [`decode_image`] reads (PIL images, paths, URLs, bytes);
                arrays and tensors go to the image processor as they are. A column of `datasets` is a list.
            text: A caption, or a list of captions.
            kwargs: `return_tensors`, and options of the tokenizer and the image processor.

        Raises:
            DamagedImageError: An image cannot be decoded.
            FileNotFoundError: `images` is a string that names no file.
            TypeError, ValueError: A caption is not a string, is empty, or is the path of a picture.
        """
        require_file(images, "text=")
        images = decode_images(images)
        if text is None:
            return super().__call__(images=images, **kwargs)
        several = is_list(text)
        texts = clean_captions(text if several else [text])
        for caption in texts:
            refuse_picture(caption)
        if not texts:
            raise ValueError("the list of captions is empty.")
        options = {"padding": True, "truncation": True, **kwargs.get("text_kwargs", kwargs)}
        kwargs = {**kwargs, "text_kwargs": options} if "text_kwargs" in kwargs else options
        # Whose tokenizer is not changed, since other threads use it too.
        once = copy.copy(self)
        once.tokenizer = CuttingTokenizer(self.tokenizer)
        return super(LLM2CLIPProcessor, once).__call__(images=images, text=texts if several else texts[0], **kwargs)


class LLM2CLIPImagePipeline:
    """Decode an image of any kind that [`decode_image`] reads, and resize it with Pillow.

    transformers' own pipelines convert an image to RGB before the image processor sees it, which drops transparency
    and clips 16-bit images. `config.custom_pipelines` makes `pipeline(task, model=..., trust_remote_code=True)` use
    these classes instead.
    """

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

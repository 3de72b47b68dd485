"""The rows that stage 2 trains on: which data sets and processors it takes, and which settings they make useless."""

from __future__ import annotations

import logging
from typing import Any, cast

import datasets
from transformers import AutoTokenizer, BaseImageProcessor, PreTrainedTokenizerBase

from llm2clip.data import CaptionImageDataset, EvalTransform, TrainTransform
from llm2clip.trainers.base_config import defaults_of
from llm2clip.trainers.stage2_config import Stage2Config
from llm2clip.trainers.stored_rows import StoredPairsDataset
from modeling_llm2clip import LLM2CLIPProcessor

logger = logging.getLogger(__name__)

# Columns of rows that are prepared already.
PREPARED = {"pixel_values", "vision_states", "llm_embeds", "input_ids"}
# Settings that the collator of stage 2 follows for plain rows; this package's data sets follow all but the first.
COLLATED = ("on_error", "max_pixels", "image_column", "caption_column", "crop_scale", "image_backend")
# Settings that need images whose features or states can be stored.
STORING = (
    *("alignment", "feature_dtype", "feature_views", "feature_cache", "standardize_features"),
    *("frozen_states_dir", "warm_start", "distill_from"),
)


def usable_processor(processing_class: Any, model: Any) -> Any:
    """Return a processor for the model: of an image processor, or one of another library, with the LLM's tokenizer.

    Args:
        model: A model, in whose folder or repo that tokenizer is.

    Raises:
        ValueError: It has no image processor.
    """
    if processing_class is None or isinstance(processing_class, LLM2CLIPProcessor | PreTrainedTokenizerBase):
        return processing_class
    image_processor = processing_class
    if not isinstance(processing_class, BaseImageProcessor):
        image_processor = getattr(processing_class, "image_processor", None)
    if image_processor is None:
        raise ValueError(
            f"processing_class is a {type(processing_class).__name__}; give an LLM2CLIPProcessor, an image processor "
            "or a tokenizer."
        )
    try:
        return LLM2CLIPProcessor(image_processor, AutoTokenizer.from_pretrained(model.name_or_path))
    except (AttributeError, OSError, ValueError):
        logger.warning(
            "the model has no folder with the LLM's tokenizer: rows with a caption need an LLM2CLIPProcessor, and the "
            "saved model will have no tokenizer."
        )
        return image_processor


def open_rows(dataset: Any, args: Stage2Config, image_processor: BaseImageProcessor | None) -> Any:
    """Read a `datasets.Dataset` of images and captions as the command reads a source; return others as they are."""
    is_plain = isinstance(dataset, datasets.Dataset) and dataset.format["type"] is None
    columns = {args.image_column, args.caption_column}
    if not is_plain or image_processor is None or not columns <= set(dataset.column_names):
        return dataset
    if PREPARED & set(dataset.column_names):
        return dataset
    return CaptionImageDataset.of_table(
        dataset,
        args.image_column,
        args.caption_column,
        EvalTransform(image_processor, args.image_backend),
        TrainTransform(image_processor, (args.crop_scale[0], args.crop_scale[1])),
        seed=args.sampling_seed,
        on_error=args.on_error,
        max_pixels=args.max_pixels,
    )


def with_images(dataset: Any) -> CaptionImageDataset | None:
    """Return a data set if its images can be stored."""
    is_ours = isinstance(dataset, CaptionImageDataset) and dataset.make_sample.eval_transform is not None
    return cast(CaptionImageDataset, dataset) if is_ours else None


def refuse_useless(args: Stage2Config, dataset: Any) -> None:
    """Raise a ValueError if a setting would change nothing with a data set."""
    defaults = defaults_of(args)
    maker = getattr(dataset, "make_sample", None)
    if maker is not None and maker.eval_transform is not None:
        crops = maker.train_transform
        own: dict[str, Any] = {"on_error": maker.on_error, "max_pixels": maker.max_pixels}
        own |= {"image_backend": maker.eval_transform.backend}
        own |= {"crop_scale": [1.0, 1.0] if crops is None else list(crops.scale)}
        columns = dataset.columns[0] if isinstance(dataset.columns, list) else dataset.columns
        own |= {"image_column": columns.image, "caption_column": columns.captions[0]}
        for name, value in own.items():
            if (given := getattr(args, name)) not in (defaults[name], value):
                raise ValueError(
                    f"{name} is {given}, but train_dataset was made with {value}; give it to the data set instead."
                )
    stored = (args.freeze_vision == "all" and args.feature_views == 1) or args.frozen_states_dir
    if stored and with_images(dataset) is not None and args.crop_scale not in (defaults["crop_scale"], [1.0, 1.0]):
        raise ValueError(f"crop_scale is {args.crop_scale}, but images are stored without crops; see feature_views.")
    if dataset is None or with_images(dataset) is not None or isinstance(dataset, StoredPairsDataset):
        return
    for name in STORING:
        if getattr(args, name) not in (defaults[name], False):
            raise ValueError(
                f"{name} needs a train_dataset whose images can be stored: a datasets.Dataset with the columns "
                f"{args.image_column} and {args.caption_column}, or a CaptionImageDataset."
            )

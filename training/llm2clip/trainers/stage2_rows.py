"""The rows of stage 2: the data sets, processors and settings that it takes, and the metrics of rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import datasets
import torch
from torch import Tensor
from transformers import AutoTokenizer, BaseImageProcessor, EvalPrediction, PreTrainedTokenizerBase

from llm2clip.data import CaptionImageDataset, EvalTransform, TrainTransform
from llm2clip.evaluation.metrics import retrieval_metrics
from llm2clip.trainers.base_config import require_prefixes
from llm2clip.trainers.stage2_config import Stage2Config
from llm2clip.trainers.stored_rows import StoredPairsDataset
from llm2clip.utils.settings import refuse
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPProcessor
from modeling_llm2clip.modeling_llm2clip_heads import LLM2CLIPTextAdapter

logger = logging.getLogger(__name__)

CAPTION_INPUTS = ("input_ids", "attention_mask", "pooling_mask")
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
    text_config = getattr(getattr(model, "config", None), "text_config", None)
    if getattr(text_config, "encoders", None):
        return image_processor
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
    maker = getattr(dataset, "make_sample", None)
    if maker is not None and maker.eval_transform is not None:
        crops = maker.train_transform
        columns = dataset.columns[0] if isinstance(dataset.columns, list) else dataset.columns
        made_with: dict[str, Any] = {
            "on_error": maker.on_error,
            "max_pixels": maker.max_pixels,
            "image_backend": maker.eval_transform.backend,
            "crop_scale": [1.0, 1.0] if crops is None else list(crops.scale),
            "image_column": columns.image,
            "caption_column": columns.captions[0],
        }
        for name, value in made_with.items():
            if getattr(args, name) != value:
                refuse(args, [name], f"train_dataset was made with {value}: give it to the data set")
    stored = (args.freeze_vision == "all" and args.feature_views == 1) or args.frozen_states_dir
    if stored and with_images(dataset) is not None and args.crop_scale != [1.0, 1.0]:
        refuse(args, ["crop_scale"], "images are stored without crops, see feature_views")
    if dataset is None or with_images(dataset) is not None or isinstance(dataset, StoredPairsDataset):
        return
    columns = f"{args.image_column} and {args.caption_column}"
    what = f"images of a datasets.Dataset with the columns {columns}, or a CaptionImageDataset"
    refuse(args, STORING, f"only the {what} as train_dataset can be stored")


def refuse_unfit(args: Stage2Config, config: LLM2CLIPConfig, has_bias: bool) -> None:
    """Raise a ValueError if a setting does not fit the model that is trained, of this config, with a logit bias."""
    width = config.projection_dim
    require_prefixes(args.matryoshka_dims, width)
    if config.text_config.encoders is None:
        refuse(args, ["text_losses"], "the model has one text encoder")
    else:
        refuse(args, ["bundle_text_model", "lora_rank"], "the model takes llm_embeds alone")
    if args.projection_dim != width and "alignment" not in args.warm_start and args.alignment == "train":
        refuse(args, ["projection_dim"], f"the model has {width}: it is a setting of a new model")
    if has_bias != (args.loss == "sigmoid"):
        raise ValueError(
            f"loss is {args.loss}, but the model has {'a' if has_bias else 'no'} logit bias; give "
            "logit_bias_init_value to a new model."
        )


def retrieval_scores(prediction: EvalPrediction) -> dict[str, float | int]:
    """Compute retrieval metrics from the embeddings of the images and captions of rows, and from their ids if any.

    Rows with equal captions are one query, for which every image with that caption is right.
    """
    images, texts = (torch.as_tensor(embeds) for embeds in prediction.predictions)
    if not isinstance(prediction.label_ids, tuple):
        return retrieval_metrics(images, texts, torch.arange(len(texts))[:, None].expand(-1, 2))
    caption_ids, image_caption_ids = (ids.tolist() for ids in prediction.label_ids)
    queries = {identity: row for row, identity in reversed(list(enumerate(caption_ids)))}
    positions = {identity: position for position, identity in enumerate(queries)}
    matches = [
        (positions[identity], image)
        for image, identities in enumerate(image_caption_ids)
        for identity in dict.fromkeys(identities)
        if identity in positions
    ]
    return retrieval_metrics(images, texts[list(queries.values())], torch.tensor(matches))


def with_each_alone(
    inputs: dict[str, Tensor], adapter: LLM2CLIPTextAdapter, widths: Sequence[int], with_both: bool
) -> tuple[dict[str, Tensor], int]:
    """Replace the rows of several text encoders by those of each alone; also return how many rows a caption then has.

    In place of another's values is the mean that the adapter subtracts, 0 if it does not.

    Args:
        widths: Those of the encoders.
        with_both: Keep the rows of all, in front.
    """
    embeds = inputs["llm_embeds"]
    mean = embeds.new_zeros(embeds.shape[1]) if adapter.center is None else adapter.center.to(embeds)
    encoder = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths)).to(embeds.device)
    alone = [torch.where(encoder == number, embeds, mean) for number in range(len(widths))]
    rows = [*([embeds] if with_both else []), *alone]
    return {**inputs, "llm_embeds": torch.cat(rows)}, len(rows)

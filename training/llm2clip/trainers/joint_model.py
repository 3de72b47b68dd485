"""The model of two towers that a recipe names, and its measurement on retrieval sets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase

from llm2clip.command_line.processes import on_main_process
from llm2clip.command_line.settings import refuse, require
from llm2clip.data import CaptionImageDataset, CaptionSource, OnError
from llm2clip.data.stage2_collator import DEFAULT_CROP
from llm2clip.encoders.image_features import ImageFeatures
from llm2clip.encoders.stored import StoredEncoder
from llm2clip.evaluation.data import RetrievalData
from llm2clip.evaluation.protocols.retrieval import image_text_metrics
from llm2clip.evaluation.session import Session
from llm2clip.files.manifests import refuse_changed_model
from llm2clip.models.identity import text_tower_fingerprint, tokenizer_fingerprint
from llm2clip.models.new_model import from_vision_text_pretrained
from llm2clip.models.repos import OUR_MODELS, inspect_repo, refuse_revision
from llm2clip.models.towers import describe_text_tower, loading_options
from llm2clip.store import EmbeddingCache, PairedCache
from llm2clip.store.store import stored_manifest
from llm2clip.trainers.joint_recipe import FEATURES, JointRecipe
from llm2clip.trainers.stored_rows import StoredPairsDataset, store_pairs
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor, LLM2CLIPTextConfig, with_pillow

logger = logging.getLogger(__name__)


def load_trained_model(name: str, attn_implementation: str | None = None) -> tuple[LLM2CLIPModel, Any]:
    """Load a model to train on, in float32 and without its LLM, and its processor; see [`make_model`]."""
    refuse_changed_model(name)
    options = loading_options("float32", attn_implementation)
    model = LLM2CLIPModel.from_pretrained(name, text_model=False, **options)
    image_processor = AutoImageProcessor.from_pretrained(name)
    if model.config.text_config.encoders:
        return model, with_pillow(image_processor)
    return model, LLM2CLIPProcessor(image_processor, AutoTokenizer.from_pretrained(name))


def make_model(config: JointRecipe, **fields: Any) -> tuple[LLM2CLIPModel, Any]:
    """Make a model of two towers, in float32 and without the LLM, and its processor.

    The processor of a model of two embedding caches, which takes `llm_embeds` alone, is its image processor.

    Args:
        fields: Fields of the model's config.

    Raises:
        ValueError: A tower is not named, or a revision is given for a local folder.
    """
    pair = next((folder for folder in config.caches if isinstance(folder, tuple)), None)
    require(config, ["vision_model_name_or_path", *(() if pair else ["text_model_name_or_path"])])
    vision, text = config.vision_model_name_or_path, config.text_model_name_or_path or None
    refuse_revision(vision, config.vision_model_revision)
    refuse_changed_model(vision)
    tokenizer: Any = None
    if pair:
        names = ["text_model_name_or_path", "text_model_revision"]
        refuse(config, names, "a model of two embedding caches takes llm_embeds alone")
        cache = PairedCache.of_folders(pair, verify=False)
        text_config = LLM2CLIPTextConfig(encoders=cache.encoders)
        fields["text_model_fingerprint"] = cache.manifest.fingerprint
    else:
        path: Any = next(iter(config.caches), None)
        text_config, tokenizer = _describe_text_tower(str(text), config.text_model_revision, path)
        if text_config.dense and inspect_repo(str(text), config.text_model_revision).kind not in OUR_MODELS:
            raise ValueError(
                f"text_model_name_or_path is {text}, an embedding model with Dense layers, which a model reads only "
                "from a saved text tower: save what llm2clip.open_text_tower returns, model and tokenizer, and give "
                "that folder."
            )
    options = {**loading_options("float32", config.attn_implementation), "revision": config.vision_model_revision}
    model = from_vision_text_pretrained(
        vision,
        text,
        text_config=text_config,
        text_model_revision=config.text_model_revision,
        vision_model_kwargs=options,
        **fields,
    )
    image_processor = AutoImageProcessor.from_pretrained(vision)
    return model, with_pillow(image_processor) if pair else LLM2CLIPProcessor(image_processor, tokenizer)


def _describe_text_tower(
    name: str, revision: str | None, path: str | Path | None
) -> tuple[LLM2CLIPTextConfig, PreTrainedTokenizerBase]:
    """Describe a text tower as [`describe_text_tower`] does; a plain LLM with the prompt that a cache was made with.

    Args:
        path: The cache, if there is one. Its prompt is taken only if that gives the tokenizer that the cache records,
            which an instruction or another LLM does not.
    """
    described = describe_text_tower(name, revision)
    if path is None or inspect_repo(name, revision).kind in OUR_MODELS:
        return described
    made_by = stored_manifest(path).identity
    if made_by["tokenizer_fingerprint"] in (None, tokenizer_fingerprint(described[1])):
        return described
    prompt = {name: made_by[name] for name in ("prompt_prefix", "prompt_suffix")}
    prompted = describe_text_tower(name, revision, **prompt)
    if tokenizer_fingerprint(prompted[1]) != made_by["tokenizer_fingerprint"]:
        return described
    logger.info("Prompt of %s, from the embedding cache: %r caption %r.", name, *prompt.values())
    return prompted


def describe_text_model(model: LLM2CLIPModel) -> None:
    """Let the config of a model whose LLM stays on disk say what the LLM is."""
    if model.config.text_model_name_or_path is None:
        return
    text = model.config.text_model_name_or_path, model.config.text_model_revision, model.config.text_config
    if model.config.text_model_fingerprint is None:
        model.config.text_model_fingerprint = on_main_process(partial(text_tower_fingerprint, *text))


def open_retrieval(config: JointRecipe) -> dict[str, RetrievalData]:
    """Open the retrieval sets of a recipe."""
    sources = {name: CaptionSource.from_dict(source) for name, source in config.eval_sources.items()}
    return {name: RetrievalData.from_source(source) for name, source in sources.items()}


def store_images(
    config: Any,
    model: LLM2CLIPModel,
    image_processor: Any,
    dataset: CaptionImageDataset,
    cache: EmbeddingCache | None,
    retrieval: Mapping[str, RetrievalData],
    views: int = 1,
    crop_scale: Sequence[float] = DEFAULT_CROP,
) -> StoredPairsDataset:
    """Store what the frozen tower of a recipe makes of its images; see [`store_pairs`].

    Args:
        config: Settings of `llm2clip align` or `llm2clip stage2`.
        cache: The embeddings of all captions.
        retrieval: Sets whose images are stored too.
        views, crop_scale: Views of each image, and the area of the random crops among them.

    Raises:
        ValueError: There is no such cache.
    """
    if cache is None:
        raise ValueError("frozen towers read one random-access cache; embed the captions with store: cache.")
    return store_pairs(
        model,
        image_processor,
        dataset,
        cache,
        config.feature_cache or Path(config.output_dir, FEATURES),
        also=[data.images for data in retrieval.values()],
        dtype=config.feature_dtype,
        image_backend=config.image_backend,
        on_error=config.on_error,
        views=views,
        crop_scale=crop_scale,
        batch_size=config.per_device_eval_batch_size,
        num_workers=config.dataloader_num_workers,
    )


def measure_retrieval(
    model: LLM2CLIPModel,
    processor: Any,
    embed: Callable[[list[str]], Tensor],
    retrieval: RetrievalData,
    features: ImageFeatures | None = None,
    *,
    batch_size: int,
    num_workers: int,
    on_error: OnError = "raise",
) -> dict[str, float | int]:
    """Measure a model on a retrieval set.

    Args:
        embed: Maps its captions to the LLM's embeddings.
        features: Where its images are stored; by default the vision tower computes them.
    """
    encoder = StoredEncoder(model.eval(), processor, embed, features)
    session = Session(encoder, None, batch_size, num_workers, on_error, show_progress_bar=False)
    return image_text_metrics(session, retrieval)

"""A model measured on one's own images and captions, or pairs of captions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerBase

from llm2clip.data import CaptionSource, PairSource
from llm2clip.data.table_identity import data_revision
from llm2clip.encoders import OurEncoder
from llm2clip.encoders.cache_of_model import open_cache_of_model
from llm2clip.evaluation.caption_pairs import CaptionRetrieval
from llm2clip.evaluation.evaluate_config import OWN_DATA, EvaluateConfig
from llm2clip.evaluation.image_text import ImageTextRetrieval
from llm2clip.utils.attention_probe import verify_text_tower
from llm2clip.utils.manifests import refuse_changed_model
from llm2clip.utils.processes import process_state
from llm2clip.utils.towers import open_text_tower
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor, LLM2CLIPTextModel


def described(config: EvaluateConfig, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return metrics with the model, the task and the data, including its revision, that they are about."""
    data = _source_fields(config)
    data["revision"] = data_revision(data)
    return {
        "model": config.model,
        "task": config.task,
        "protocol": config.protocol or OWN_DATA,
        "data": data,
        **metrics,
    }


def _source_fields(config: EvaluateConfig) -> dict[str, Any]:
    fields: dict[str, Any] = dict(config.data) if isinstance(config.data, dict) else {"path": config.data}
    fields.setdefault("split", config.split)
    if config.caption_columns is not None:
        fields["caption_columns"] = config.caption_columns
    return fields


def measure_retrieval(config: EvaluateConfig) -> dict[str, Any]:
    """Load a model and measure image-text retrieval."""
    _require_own_model(config.model)
    model = LLM2CLIPModel.from_pretrained(config.model, text_model=config.embedding_cache is None)
    if model.text_model is not None:
        verify_text_tower(model.text_model)
    processor = AutoProcessor.from_pretrained(config.model)
    return open_retrieval(config, model.to(process_state().device).eval(), processor)()


def open_retrieval(
    config: EvaluateConfig, model: LLM2CLIPModel, processor: LLM2CLIPProcessor
) -> Callable[[], dict[str, Any]]:
    """Return a function that measures image-text retrieval of a loaded model as it is then.

    The LLM's embeddings of the captions are computed once, or looked up; the model may change except for its LLM.
    """
    source = CaptionSource.from_dict(_source_fields(config))
    retrieval = ImageTextRetrieval(
        source, processor.image_processor, config.on_error, positives=config.protocol or OWN_DATA
    )
    embed: Callable[[list[str]], Tensor]
    if config.embedding_cache is not None:
        model_config = cast(LLM2CLIPConfig, model.config)
        embed = open_cache_of_model(config.embedding_cache, model_config, processor.tokenizer, is_trained=True).lookup
    else:
        encoder = OurEncoder(model.text_model, processor)
        embed = partial(encoder.embed, batch_size=config.batch_size, show_progress_bar=True)
    llm_embeds = embed(retrieval.captions)
    options: dict[str, Any] = {"batch_size": config.batch_size, "num_workers": config.num_workers or 0}
    return partial(retrieval, model, lambda captions: llm_embeds, **options, show_progress_bar=True)


def _require_own_model(name: str) -> None:
    """Raise ValueError for a model that only published benchmarks can be measured with, or with changed files."""
    if name.startswith("open_clip:") or name.rpartition(":")[0].endswith(".py"):
        raise ValueError(f"{name} is measured with --benchmark; --data alone is for models of llm2clip.")
    refuse_changed_model(name)


def measure_caption_retrieval(config: EvaluateConfig) -> dict[str, Any]:
    """Load a text tower and measure caption retrieval."""
    _require_own_model(config.model)
    model: Any
    model, tokenizer = open_text_tower(config.model)
    return open_caption_retrieval(config, model.to(process_state().device).eval(), tokenizer)()


def open_caption_retrieval(
    config: EvaluateConfig, model: LLM2CLIPTextModel, tokenizer: PreTrainedTokenizerBase
) -> Callable[[], dict[str, Any]]:
    """Return a function that measures caption retrieval of a loaded text tower as it is then."""
    fields = _source_fields(config)
    if config.query_column and config.target_column:
        fields |= {"anchor_column": config.query_column, "positive_column": config.target_column}
    retrieval = CaptionRetrieval.from_source(PairSource.from_dict(fields))
    return partial(retrieval, model, tokenizer, config.batch_size, show_progress_bar=True)

"""The `llm2clip evaluate` command: the metrics of a saved model on a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerBase

from llm2clip.data import CaptionSource, OnError, PairSource
from llm2clip.embedding import CaptionEmbedder
from llm2clip.embedding.cache_of_model import open_cache_of_model
from llm2clip.evaluation.caption_pairs import CaptionRetrieval
from llm2clip.evaluation.image_text import ImageTextRetrieval
from llm2clip.utils.files import write_json
from llm2clip.utils.identity import data_revision
from llm2clip.utils.processes import process_state
from llm2clip.utils.settings import check_choices, setting
from llm2clip.utils.towers import open_text_tower
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor, LLM2CLIPTextModel


@dataclass
class EvaluateConfig:
    """Settings of an evaluation."""

    model: str = setting("", "The model: Hub id or folder.")
    task: Literal["retrieval", "caption_retrieval"] = setting(
        "retrieval",
        "retrieval: between images and captions, of an LLM2CLIP model. caption_retrieval: between two captions of one "
        "image, of a text tower or of the LLM of an LLM2CLIP model.",
    )
    data: dict[str, Any] | str = setting(
        "",
        "The data: a path or Hub id, or a mapping with the fields of CaptionSource (retrieval) or PairSource "
        "(caption_retrieval).",
    )
    split: str = setting("test", "Split of the data, unless the mapping names one.")
    caption_columns: list[str] | None = setting(None, "Columns of the captions.")
    query_column: str | None = setting(None, "caption_retrieval: column of the queries.")
    target_column: str | None = setting(None, "caption_retrieval: column of the targets.")
    embedding_cache: str | None = setting(
        None, "retrieval: embedding cache of the captions, from `llm2clip embed`; the LLM is not loaded then."
    )
    batch_size: int = setting(64, "Images or captions per forward pass; lower it when memory runs out.")
    num_workers: int = setting(0, "Worker processes that read images; raise it when the GPU waits for images.")
    on_error: OnError = setting("raise", "How to treat an image that cannot be read: raise an error, or skip it.")
    output: str | None = setting(None, "JSON file to which the result is also written.")

    def __post_init__(self) -> None:
        check_choices(self)


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a model.

    Returns:
        The metrics; see `retrieval_metrics` and `caption_retrieval_metrics`.

    Raises:
        ValueError: A required setting is missing.
    """
    for name in ("model", "data"):
        if not getattr(config, name):
            raise ValueError(f"evaluate needs {name}; give it as an option (--{name}).")
    metrics = _retrieval(config) if config.task == "retrieval" else _caption_retrieval(config)
    if config.output and process_state().is_main_process:
        write_json(config.output, described(config, metrics))
    return metrics


def described(config: EvaluateConfig, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return metrics with the model, the task and the data, including its revision, that they are about."""
    data = _source_fields(config)
    data["revision"] = data_revision(data)
    return {"model": config.model, "task": config.task, "data": data, **metrics}


def _source_fields(config: EvaluateConfig) -> dict[str, Any]:
    fields: dict[str, Any] = dict(config.data) if isinstance(config.data, dict) else {"path": config.data}
    fields.setdefault("split", config.split)
    if config.caption_columns is not None:
        fields["caption_columns"] = config.caption_columns
    return fields


def _retrieval(config: EvaluateConfig) -> dict[str, Any]:
    model = LLM2CLIPModel.from_pretrained(config.model, text_model=config.embedding_cache is None)
    processor = AutoProcessor.from_pretrained(config.model)
    return open_retrieval(config, model.to(process_state().device).eval(), processor)()


def open_retrieval(
    config: EvaluateConfig, model: LLM2CLIPModel, processor: LLM2CLIPProcessor
) -> Callable[[], dict[str, Any]]:
    """Return a function that measures image-text retrieval of a loaded model as it is then.

    The LLM's embeddings of the captions are computed once, or looked up; the model may change except for its LLM.
    """
    source = CaptionSource.from_dict(_source_fields(config))
    retrieval = ImageTextRetrieval(source, processor.image_processor, config.on_error)
    embed: Callable[[list[str]], Tensor]
    if config.embedding_cache is not None:
        model_config = cast(LLM2CLIPConfig, model.config)
        embed = open_cache_of_model(config.embedding_cache, model_config, processor.tokenizer, is_trained=True).lookup
    else:
        embed = partial(CaptionEmbedder(model.text_model, processor).embed, batch_size=config.batch_size)
    llm_embeds = embed(retrieval.captions)
    options: dict[str, Any] = {"batch_size": config.batch_size, "num_workers": config.num_workers}
    return partial(retrieval, model, lambda captions: llm_embeds, **options, show_progress_bar=True)


def _caption_retrieval(config: EvaluateConfig) -> dict[str, Any]:
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

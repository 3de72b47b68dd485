"""The `llm2clip evaluate` command: a model on published benchmarks, or a model of ours on one's own data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console
from torch import Tensor
from transformers import AutoProcessor, PreTrainedTokenizerBase

from llm2clip.data import CaptionSource, OnError, PairSource
from llm2clip.embedding import CaptionEmbedder
from llm2clip.embedding.cache_of_model import open_cache_of_model
from llm2clip.evaluation.benchmarks import all_benchmarks, choose_benchmarks
from llm2clip.evaluation.benchmarks.listing import list_benchmarks
from llm2clip.evaluation.caption_pairs import CaptionRetrieval
from llm2clip.evaluation.encoders import open_encoder
from llm2clip.evaluation.image_text import ImageTextRetrieval, Positives
from llm2clip.evaluation.protocols.classification import with_prompts
from llm2clip.evaluation.results import Result
from llm2clip.evaluation.results_table import print_results
from llm2clip.evaluation.session import EvaluationSession
from llm2clip.evaluation.suite import Suite, find_benchmarks
from llm2clip.evaluation.text_formats import RAW, choose_text_format
from llm2clip.utils.files import write_json
from llm2clip.utils.identity import data_revision
from llm2clip.utils.processes import process_state, worker_count
from llm2clip.utils.settings import check_choices, setting
from llm2clip.utils.towers import open_text_tower
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPProcessor, LLM2CLIPTextModel

Names = list[str]  # the field `list` hides the type in the class
OWN_DATA: Positives = "distinct"
DATA_FOLDER, RESULTS_FOLDER = "benchmarks", "results"


@dataclass
class EvaluateConfig:
    """Settings of an evaluation."""

    model: str = setting(
        "",
        "The model: Hub id or folder. With --benchmark also any CLIP-like model of transformers, or "
        "open_clip:NAME/PRETRAINED.",
    )
    benchmark: Names = setting(
        [],
        "Published benchmarks, each by its protocol: names, groups (short, long, languages, classification, "
        "composition, dense, paper), all-found (all whose files are below --data), or a Python file with a list "
        "BENCHMARKS.",
    )
    list: bool = setting(
        False,
        "Show all benchmarks: files, counts, license, where to get them, and which are below --data.",
    )
    task: Literal["retrieval", "caption_retrieval"] = setting(
        "retrieval",
        "retrieval: between images and captions, of an LLM2CLIP model. caption_retrieval: between two captions of one "
        "image, of a text tower or of the LLM of an LLM2CLIP model.",
    )
    data: dict[str, Any] | str = setting(
        "",
        "With --benchmark the folder of the benchmarks (./benchmarks by default). Otherwise your data: a path or Hub "
        "id, or a mapping with the fields of CaptionSource (retrieval) or PairSource (caption_retrieval).",
    )
    protocol: Positives | None = setting(
        None,
        "What is right on your own data. distinct (the default): equal captions are one query, right for all images "
        "that have it. rows: each caption of each row is a query, and its own image alone is right, as on benchmarks.",
    )
    split: str = setting("test", "Split of the data, unless the mapping names one.")
    caption_columns: Names | None = setting(None, "Columns of the captions.")
    query_column: str | None = setting(None, "caption_retrieval: column of the queries.")
    target_column: str | None = setting(None, "caption_retrieval: column of the targets.")
    embedding_cache: str | None = setting(
        None, "retrieval: embedding cache of the captions, from `llm2clip embed`; the LLM is not loaded then."
    )
    batch_size: int = setting(64, "Images or captions per forward pass; lower it when memory runs out.")
    num_workers: int | None = setting(
        None,
        "Worker processes that read images; by default one for each core, at most 8, with --benchmark, and none on "
        "your own data.",
    )
    on_error: OnError = setting("raise", "How to treat an image that cannot be read: raise an error, or skip it.")
    output: str | None = setting(
        None,
        "JSON file to which the result is also written; with --benchmark the folder of the results (./results "
        "by default).",
    )
    revision: str | None = setting(None, "With --benchmark: branch, tag or commit of the model.")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "With --benchmark: dtype of the model.")
    text_format: str = setting(
        RAW,
        "With --benchmark: what is done to texts first, as in other evaluations: raw (nothing), lower, albef, blip, "
        "flair, long-clip. Recalls of two formats are not comparable.",
    )
    templates: str | None = setting(
        None,
        "With --benchmark, for zero-shot classification: openai-80, openai-7, paper, openai-cifar, or a file with a "
        "template a line, {c} in the place of the class; by default those of the set.",
    )
    classnames: str | None = setting(
        None,
        "With --benchmark, for zero-shot classification: file with the name of a class a line, in the order of the "
        "labels; by default the names of the set.",
    )
    embeddings: str | None = setting(
        None,
        "With --benchmark: folder of the stored embeddings, which later runs find again; by default `embeddings` in "
        "the output folder.",
    )
    allow_counts: bool = setting(False, "With --benchmark: measure sets whose counts differ from the published ones.")
    overwrite: bool = setting(False, "With --benchmark: measure again what is finished.")

    def __post_init__(self) -> None:
        check_choices(self)
        given = {field.name for field in fields(self) if getattr(self, field.name) != _default(field)}
        for name in sorted(given & (FOR_OWN_DATA if self.benchmark else FOR_BENCHMARKS)):
            is_for = "your own data, not with" if self.benchmark else "use with"
            raise ValueError(f"--{name.replace('_', '-')} is for {is_for} --benchmark.")
        if self.task == "caption_retrieval" and self.protocol == "rows":
            raise ValueError("caption_retrieval has no protocol rows: equal texts are one query, and one target.")


FOR_BENCHMARKS = {
    "revision", "dtype", "text_format", "templates", "classnames", "embeddings", "allow_counts", "overwrite",
}  # fmt: skip
FOR_OWN_DATA = {
    "task", "protocol", "split", "caption_columns", "query_column", "target_column", "embedding_cache", "on_error",
}  # fmt: skip


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate a model.

    Returns:
        On one's own data the protocol and the metrics; see `retrieval_metrics` and `caption_retrieval_metrics`.
        Benchmarks print tables, and the list prints itself.

    Raises:
        ValueError: A required setting is missing.
    """
    if config.list:
        print(list_benchmarks(all_benchmarks().values(), _benchmark_folder(config)))
        return {}
    for name in ("model",) if config.benchmark else ("model", "data"):
        if not getattr(config, name):
            raise ValueError(f"evaluate needs {name}; give it as an option (--{name}).")
    if config.benchmark:
        run_benchmarks(config)
        return {}
    metrics = _retrieval(config) if config.task == "retrieval" else _caption_retrieval(config)
    if config.output and process_state().is_main_process:
        write_json(config.output, described(config, metrics))
    return {"protocol": config.protocol or OWN_DATA, **metrics}


def run_benchmarks(config: EvaluateConfig) -> list[Result]:
    """Measure benchmarks and print the results, which are also written; see [`Suite`].

    Raises:
        ValueError: A benchmark is unknown, its files are missing or not what was published, or a finished result is of
            something else.
    """
    data, output = _benchmark_folder(config), Path(config.output or RESULTS_FOLDER)
    text_format = choose_text_format(config.text_format)
    chosen = with_prompts(choose_benchmarks(config.benchmark, data), config.templates, config.classnames)
    found = find_benchmarks(chosen, data)
    suite = Suite(output, config.text_format, config.allow_counts, config.overwrite)
    suite.check(found)
    encoder = open_encoder(config.model, config.revision, config.dtype, process_state().device)
    session = EvaluationSession(
        encoder,
        Path(config.embeddings) if config.embeddings else output / "embeddings",
        text_format,
        config.text_format,
        config.batch_size,
        worker_count(config.num_workers),
    )
    results = suite.run(found, session)
    if process_state().is_main_process:
        print_results(Console(), results)
        print(f"Results: {output}")
    return results


def _benchmark_folder(config: EvaluateConfig) -> Path:
    if isinstance(config.data, dict):
        raise ValueError("data has to be the folder of the benchmarks with --benchmark or --list.")
    return Path(config.data or DATA_FOLDER)


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
    retrieval = ImageTextRetrieval(
        source, processor.image_processor, config.on_error, positives=config.protocol or OWN_DATA
    )
    embed: Callable[[list[str]], Tensor]
    if config.embedding_cache is not None:
        model_config = cast(LLM2CLIPConfig, model.config)
        embed = open_cache_of_model(config.embedding_cache, model_config, processor.tokenizer, is_trained=True).lookup
    else:
        embed = partial(CaptionEmbedder(model.text_model, processor).embed, batch_size=config.batch_size)
    llm_embeds = embed(retrieval.captions)
    options: dict[str, Any] = {"batch_size": config.batch_size, "num_workers": config.num_workers or 0}
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

"""Settings of `llm2clip evaluate`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from llm2clip.data import OnError
from llm2clip.evaluation.image_text import Positives
from llm2clip.evaluation.text_formats import RAW
from llm2clip.utils.settings import check_choices, setting

Names = list[str]  # the field `list` hides the type in the class
OWN_DATA: Positives = "distinct"


@dataclass
class EvaluateConfig:
    """Settings of an evaluation."""

    model: str = setting(
        "",
        "The model: Hub id or folder. With --benchmark also any CLIP-like model of transformers, or "
        "open_clip:NAME/PRETRAINED, or PATH.py:FUNCTION, which returns (model, preprocess, tokenizer).",
    )
    benchmark: Names = setting(
        [],
        "Published benchmarks, each by its protocol: names, groups (short, long, languages, classification, "
        "composition, dense, paper), all-found (all whose files are below --data), or a Python file with a list "
        "BENCHMARKS.",
    )
    list: bool = setting(
        False,
        "Show all benchmarks in a line each and which are below --data; with --benchmark all that is known of those: "
        "files, counts, license, where to get them.",
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

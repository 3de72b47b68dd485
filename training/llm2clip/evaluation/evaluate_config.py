"""Settings of `llm2clip evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm2clip.command_line.settings import check_choices, setting
from llm2clip.data import OnError
from llm2clip.evaluation.benchmarks.hub_files import DATA
from llm2clip.evaluation.data import Positives
from llm2clip.evaluation.text_formats import RAW, TextFormat
from llm2clip.models.embeddings import Precision

Names = list[str]  # the field `list` hides the type in the class

# Settings that only say how own data is read.
OWN_DATA = ("task", "positives", "split", "image_column", "caption_columns", "query_column", "target_column")


@dataclass
class EvaluateConfig:
    """Settings of an evaluation."""

    model: Names = setting(
        [],
        "Models, one or several: Hub ids or folders of LLM2CLIP models, text towers and CLIP-like models of "
        "transformers, open_clip:NAME/PRETRAINED, or PATH.py:FUNCTION, which returns (model, preprocess, tokenizer).",
    )
    benchmark: Names = setting(
        [],
        "What to measure: published sets by name or group (short, long, languages, classification, composition, "
        "dense, paper: those below --data) or all-found (all below --data); your own data by its path or Hub id, or "
        "the fields of a source as JSON; a YAML file of sets, or a Python file with a list BENCHMARKS.",
    )
    list: bool = setting(
        False,
        "Show all published sets in a line each and which are below --data; with --benchmark all that is known of "
        "those: files, counts, license, where to get them.",
    )
    data: str = setting(
        DATA,
        "Folder of the published sets. One that is named and not there is fetched from the Hub, if it is there.",
    )
    download: bool = setting(False, "Fetch sets of more than 2 GB too.", affects_numbers=False)
    output: str | None = setting("results", "Folder of the results.")
    task: Literal["retrieval", "caption_retrieval"] = setting(
        "retrieval",
        "Own data. retrieval: between images and captions. caption_retrieval: between two captions of one image, "
        "which a text tower is measured by too.",
    )
    positives: Positives = setting(
        "distinct",
        "Own data: what is right. distinct: equal captions are one query, right for all images that have it. rows: "
        "each caption of each row is a query, and its own image alone is right, as on published sets.",
    )
    split: str | None = setting(
        None, "Own data: split; by default test. A single file is taken whole, or a slice of it: train[90%:]."
    )
    image_column: str | None = setting(None, "Own data: column of the images; by default image, or jpg, png, ...")
    caption_columns: Names | None = setting(
        None, "Own data: columns of the captions; by default caption, txt or text."
    )
    query_column: str | None = setting(None, "Own data, caption_retrieval: column of the queries.")
    target_column: str | None = setting(None, "Own data, caption_retrieval: column of the targets.")
    embedding_cache: str | Names | None = setting(
        None,
        "Embedding cache of all captions, from `llm2clip embed`; the LLM of the model is not loaded then. Two for a "
        "model that was trained on two.",
    )
    batch_size: int | None = setting(
        None,
        "Images and texts per forward pass; lower it when memory runs out. By default 64 images, and as many texts as "
        "their tokens allow.",
    )
    num_workers: int | None = setting(
        None, "Worker processes that read images; by default one for each core, at most 8."
    )
    on_error: OnError = setting(
        "raise", "How image-text retrieval treats an image that cannot be read: raise an error, or skip it."
    )
    revision: str | None = setting(None, "Branch, tag or commit of the model on the Hub.")
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Dtype of the models.")
    truncate_dim: int | None = setting(
        None, "Number of values that are kept of each embedding, scaled to unit length again; by default all."
    )
    precision: Precision = setting(
        "float32",
        "What embeddings of both sides are rounded to, as a database of such vectors compares them: float16, int8 by "
        "cosine, binary by Hamming distance.",
    )
    text_format: TextFormat = setting(
        RAW,
        "What is done to captions first, as in other evaluations: raw (nothing), lower, albef, blip, flair, "
        "long-clip. Recalls of two formats are not comparable. Prompts of classes stay as they are.",
    )
    templates: str | None = setting(
        None,
        "Zero-shot classification: openai-80, openai-7, paper, openai-cifar, or a file with a template a line, {c} in "
        "the place of the class; by default those of the set.",
    )
    classnames: str | None = setting(
        None,
        "Zero-shot classification: file with the name of a class a line, in the order of the labels; by default the "
        "names of the set.",
    )
    embeddings: str | None = setting(
        None,
        "Folder of the stored embeddings, which later runs find again; by default `embeddings` in the output folder.",
    )
    allow_counts: bool = setting(False, "Measure published sets whose counts differ from the published ones.")
    overwrite: bool = setting(False, "Measure again what is finished.")

    def __post_init__(self) -> None:
        check_choices(self)
        if bool(self.query_column) != bool(self.target_column):
            raise ValueError("query_column and target_column go together: give both, or caption_columns.")
        if self.query_column:
            self.task = "caption_retrieval"
        if self.task == "caption_retrieval" and self.positives == "rows":
            raise ValueError("positives is rows, but in caption_retrieval equal texts are one query, and one target.")
        if self.task == "caption_retrieval" and self.image_column:
            raise ValueError("image_column is given, but caption_retrieval reads no images: leave it out.")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}.")

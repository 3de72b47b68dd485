"""The facts about a model that its card states."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm2clip.models.repos import hub_ids
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPTextConfig

JOINT_TASK, TEXT_TASK = "zero-shot-image-classification", "feature-extraction"
VISION_TASK, QUERY_TASK = "image-feature-extraction", "sentence-similarity"
EXAMPLE, CURVES = "example.png", "training_curves.png"

RECALL = re.compile(r"(^|_)recall@(1|5|10)$")
# Scores that are shares of right answers, and the names of their metrics on the Hub.
ACCURACIES = {
    "top1": "accuracy",
    "accuracy": "accuracy",
    "mean_per_class": "mean_per_class_accuracy",
    "text_score": "text_score",
    "image_score": "image_score",
    "group_score": "group_score",
    "miou": "mean_iou",
}
# `llm2clip evaluate` names counts `num_texts`, `truncated_texts`, `tied_text_queries` and the like.
COUNT = re.compile(r"_rank$|^num_|(^|_)(images|texts|queries|classes|languages|pairs|choices|comparisons)$")


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model on a data set.

    Args:
        task: Name of the task, such as `image-text retrieval` or `caption retrieval`.
        dataset: Hub id or name of the data set.
        split: Split of it.
        revision: Commit of the data set, or a checksum of its content.
        metrics: Scores in 0..1, ranks and counts, by name; the Hub shows those of `compared`.
        note: Further identification of the measurement, such as the caption column.
        protocol: How it was measured, in words.
        name: Title of the data set, if it is not `dataset`.
        intervals: 95% intervals `[low, high]` of scores, by their names.
        baseline: What the same scores were before the training, by their names.
    """

    task: str
    dataset: str
    split: str
    revision: str | None
    metrics: dict[str, float]
    note: str = ""
    protocol: str = ""
    name: str = ""
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    baseline: Mapping[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        parts = ", ".join(part for part in (self.split, self.note) if part)
        return f"{self.name or self.dataset} ({parts})" if parts else self.name or self.dataset

    @property
    def compared(self) -> dict[str, str]:
        """Names of the scores that the field compares, by their names on the Hub: recall at 1, 5, 10 and accuracy.

        Ranks, counts and times are not comparable, and a page that sorts models by a number must not see them.
        """
        recalls = {name: name for name in self.metrics if RECALL.search(name)}
        return recalls | {type: name for name, type in ACCURACIES.items() if name in self.metrics}

    def shown(self, name: str) -> str:
        """Return a score in percent, with its interval if that is known: `24.8 (21.0-28.1)`."""
        percent = f"{100 * self.metrics[name]:.1f}"
        ends = self.intervals.get(name)
        return percent if ends is None else f"{percent} ({100 * ends[0]:.1f}-{100 * ends[1]:.1f})"

    def before(self, name: str) -> str:
        """Return the baseline of a score in percent; empty if it has none."""
        return f"{100 * self.baseline[name]:.1f}" if name in self.baseline else ""

    def remarks_on(self, name: str) -> dict[str, Any]:
        """Interval and baseline of a score, as far as they are known, for the model index."""
        ends = {"interval_95": [*self.intervals[name]]} if name in self.intervals else {}
        return {**ends, "baseline": self.baseline[name]} if name in self.baseline else ends

    @property
    def remarks(self) -> str:
        """How it was measured, and its ranks and counts, in words; empty if nothing is known."""
        counts = {
            name: value for name, value in self.metrics.items() if COUNT.search(name) and not RECALL.search(name)
        }
        numbers = [
            f"{name.removeprefix('num_').replace('_', ' ')} {format(value, ',' if isinstance(value, int) else '.1f')}"
            for name, value in counts.items()
        ]
        return "; ".join(part for part in (self.protocol, ", ".join(numbers)) if part)


@dataclass
class CardFacts:
    """Content of a card.

    Args:
        name: Title.
        task: Pipeline tag; it selects the code examples.
        repo: Hub id or folder that the code examples load.
        summary: One or two sentences below the title.
        license: License of the weights as the Hub spells it.
        license_name: Name of the license, if `license` is `other`.
        license_link: URL of that license, or a file of the repo.
        base_licenses: The models that it was made from, with their licenses, such as `Llama-3.1-8B (llama3.1)`.
        shown: Words that the licenses of these demand on the card.
        base_models: Hub ids of the models that this one was trained from.
        datasets: Hub ids of the training data.
        languages: ISO 639 codes of the caption languages.
        merged: How the weights were merged from those of `base_models`, instead of training.
        methods: How it was trained beside the method of this package, with the papers, in sentences.
        sources: Description of training data without a Hub id.
        recipe: Settings that differ from the defaults.
        evaluations: Evaluation results.
        comparison: A table of a student beside its teacher, in Markdown.
        captions: Labels of the example image, the correct one first, or captions for the code examples.
        has_example: Whether the folder contains an example image, `EXAMPLE`.
        has_curves: Whether the folder contains training curves, `CURVES`.
        is_adapter: Whether the folder contains a PEFT adapter, which `AutoModel` only loads from a local folder.
    """

    name: str
    task: str
    repo: str
    summary: str
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    base_licenses: Sequence[str] = ()
    shown: Sequence[str] = ()
    base_models: Sequence[str] = ()
    datasets: Sequence[str] = ()
    languages: Sequence[str] = ()
    merged: str = ""
    methods: Sequence[str] = ()
    sources: Sequence[str] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    evaluations: Sequence[Evaluation] = ()
    comparison: str = ""
    captions: Sequence[str] = ()
    has_example: bool = False
    has_curves: bool = False
    is_adapter: bool = False


def public_name(name: str) -> str:
    """Return a Hub id, or only the name of a local folder: its path means nothing to others, and may be private."""
    return name if hub_ids(name) else Path(name).name


def summary(model: Any, processor: Any = None) -> str:
    """Describe a model in one or two sentences; `processor`, its own or its image processor, knows the image size."""
    config = model.config
    if config.model_type == LLM2CLIPTextConfig.model_type:
        kind = config.decoder_config.model_type
        attention = "" if config.bidirectional is None else " with bidirectional attention"
        model = f"{kind} text model" if config.bidirectional is None else f"{kind} language model"
        return (
            f"A caption encoder (LLM2CLIP, stage 1): a {model}{attention}; "
            f"{config.hidden_size} dimensions, captions of up to {config.max_text_length} tokens."
        )
    if config.model_type != LLM2CLIPConfig.model_type:
        kind = f"a {config.model_type} text model" if config.model_type else "a table of token vectors"
        return (
            f"A query encoder: {kind} that was taught the space of an LLM2CLIP model, without images; {model.width} "
            "dimensions. Compare its vectors with those that the model gives images."
        )
    vision = config.vision_config
    text = config.text_config
    if text.encoders:
        parts = " and ".join(f"{public_name(encoder['name'])} ({encoder['width']})" for encoder in text.encoders)
        llm = f"an adapter that takes the embeddings of {parts} side by side, each of unit length, as `llm_embeds`"
    else:
        # The path of a local folder means nothing to others and may be private.
        name = config.text_model_name_or_path or ""
        llm = name if hub_ids(name) else f"a {text.decoder_config.model_type} language model"
        llm = f"{llm} as the caption encoder"
    size = _image_size(vision, getattr(processor, "image_processor", processor))
    return (
        f"An LLM2CLIP model: a vision tower ({vision.model_type}{f', {size} px' if size else ''}) and {llm}, "
        f"with embeddings of {config.projection_dim} dimensions in one space."
    )


def _image_size(vision: Any, image_processor: Any) -> str | None:
    """Return the size of the images that a tower sees, which may differ from the one that it was pretrained at."""
    if image_processor is None:
        size = getattr(vision, "image_size", None)
        return None if size is None else str(size)
    settings = image_processor.to_dict()
    size = settings.get("crop_size" if settings.get("do_center_crop") else "size") or {}
    if not {"height", "width"} <= set(size):  # it depends on the image
        return None
    height, width = size["height"], size["width"]
    return str(height) if height == width else f"{height} × {width}"


def base_models(config: Any) -> list[str]:
    """Names that the parts of a model were loaded from."""
    if config.model_type == LLM2CLIPTextConfig.model_type:
        return [config.decoder_config.name_or_path]
    if config.model_type != LLM2CLIPConfig.model_type:
        return [config.name_or_path]
    text, llm = config.text_config, config.text_model_name_or_path
    return [
        config.vision_config.name_or_path,
        *([encoder["name"] for encoder in text.encoders or ()] or [llm or text.decoder_config.name_or_path]),
    ]

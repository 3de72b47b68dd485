"""What is known about a model and goes on its card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

JOINT_TASK, TEXT_TASK, VISION_TASK = (
    "zero-shot-image-classification",
    "feature-extraction",
    "image-feature-extraction",
)
EXAMPLE, CURVES = "example.png", "training_curves.png"


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model on a data set.

    Args:
        task: `image-text retrieval`, `caption retrieval` or another name of the task.
        dataset: Hub id or name of the data set.
        split: Its split.
        revision: Its commit, or a checksum of its content.
        metrics: Values in 0..1 (recalls) or counts, by name.
        note: What else identifies the measurement, such as the caption column.
    """

    task: str
    dataset: str
    split: str
    revision: str | None
    metrics: dict[str, float]
    note: str = ""

    @property
    def title(self) -> str:
        return f"{self.dataset} ({', '.join(part for part in (self.split, self.note) if part)})"


@dataclass
class CardFacts:
    """What a card says.

    Args:
        name: Title.
        task: Pipeline tag, by which the snippets are chosen.
        repo: Hub id or folder that the snippets load.
        summary: One or two sentences after the title.
        licence: Licence of the weights, in the Hub's spelling.
        licence_name: Name of a licence that the Hub calls `other`.
        licence_link: Its address, or a file of the repo.
        base_models: Hub ids of what the model was made of.
        datasets: Hub ids of the training data.
        languages: ISO codes of the languages of the captions.
        sources: Training data in words, where it has no Hub id.
        recipe: Settings that differ from the defaults.
        evaluations: What was measured.
        captions: Labels of the example picture, or captions for the snippets; the first is the right one.
        has_example: Whether the folder holds an example picture, `EXAMPLE`.
        is_adapter: Whether the folder holds a PEFT adapter, which `AutoModel` loads from a folder alone.
        has_curves: Whether the folder holds training curves, `CURVES`.
    """

    name: str
    task: str
    repo: str
    summary: str
    licence: str | None = None
    licence_name: str | None = None
    licence_link: str | None = None
    base_models: Sequence[str] = ()
    datasets: Sequence[str] = ()
    languages: Sequence[str] = ()
    sources: Sequence[str] = ()
    recipe: dict[str, Any] = field(default_factory=dict)
    evaluations: Sequence[Evaluation] = ()
    captions: Sequence[str] = ()
    has_example: bool = False
    has_curves: bool = False
    is_adapter: bool = False

"""The card of a built folder: the source's card, new results, and the settings of the build."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from llm2clip.evaluation.results import Result, notes_on, protocol_words, read_result
from llm2clip.files.atomic import read_json, write_text
from llm2clip.files.manifests import QUERY_ENCODER
from llm2clip.hub.build_config import BuildConfig
from llm2clip.hub.cards.card import CARD, LICENSE_FIELDS, as_list, read_card, render
from llm2clip.hub.cards.curves import write_curves
from llm2clip.hub.cards.facts import (
    CURVES,
    EXAMPLE,
    CardFacts,
    Evaluation,
    base_models,
    public_name,
    summary,
)
from llm2clip.hub.licenses import ModelLicense
from llm2clip.hub.source_model import SourceModel
from llm2clip.models.repos import hub_ids

logger = logging.getLogger(__name__)

HISTORY = "trainer_state.json"
# With which the name of the library begins in results of a model of this package.
LIBRARY = "llm2clip"
TASK_TITLES = {"retrieval": "image-text retrieval"}


def read_results(paths: Sequence[Path]) -> list[Evaluation]:
    """Read results of `llm2clip evaluate` for the card of a model.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file does not contain results, or they are of several models, or of one that is not of this
            package: a folder of results also has those of other models beside it.
    """
    evaluations: list[Evaluation] = []
    first: tuple[Path, dict[str, Any]] | None = None
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"there is no result file {path}: `llm2clip evaluate` writes one.")
        result = read_result(path)
        model, first = result.model, first or (path, result.model)
        if not str(model.get("library")).startswith(LIBRARY):
            raise ValueError(
                f"{path} is of {model['given']}, a model of {model.get('library')}, and a card has results of its "
                "own model alone: give those of `llm2clip evaluate` on the model that you build from."
            )
        if model["fingerprint"] != first[1]["fingerprint"]:
            raise ValueError(
                f"{first[0]} is of {first[1]['given']} and {path} of {model['given']}, with other weights or "
                "preprocessing: give the results of one model."
            )
        evaluations.append(_evaluation_of(result))
    return evaluations


def _evaluation_of(result: Result) -> Evaluation:
    name, data = str(result.protocol.get("name")), result.data
    common: dict[str, Any] = {
        "task": TASK_TITLES.get(name, name),
        "metrics": {**result.counts, **result.scores, **result.ranks},
        "protocol": protocol_words(result),
        "intervals": result.intervals,
    }
    if "path" in data:
        dataset, note = public_name(str(data["path"])), ", ".join(data.get("caption_columns") or ())
        return Evaluation(
            dataset=dataset, split=str(data.get("split")), revision=data.get("revision"), note=note, **common
        )
    note, checksum = ", ".join(notes_on(result)), data.get("checksum")
    return Evaluation(dataset=result.benchmark, split="", revision=checksum, note=note, name=result.title, **common)


def source_folder(config: BuildConfig) -> Path:
    """Return the folder of the source's card, pictures and training history; for a Hub id, a snapshot of these."""
    if Path(config.model).is_dir():
        return Path(config.model)
    files = [CARD, CURVES, EXAMPLE, HISTORY, "LICENSE*", "NOTICE", f"{QUERY_ENCODER}/*"]
    folder = Path(snapshot_download(config.model, revision=config.revision, allow_patterns=files))
    if not (folder / CARD).is_file():
        logger.warning("%s has no %s, so the new card starts empty.", config.model, CARD)
    return folder


def source_card(config: BuildConfig, source: Path) -> tuple[BuildConfig, tuple[dict[str, Any], str]]:
    """Read the source's card, for that of the built folder.

    Args:
        config: The settings of the build.
        source: Folder of that card.

    Returns:
        The settings, with the example image of the source and its captions unless they name an image; and the front
        matter of the card, without the fields that the settings replace or that only show this example, and its text.
    """
    data, text = read_card(source)
    widget = as_list(data.get("widget"))
    # A pushed card has the URL of the image.
    names = [str(entry.get("src")).split("/")[-1] if isinstance(entry, dict) else "" for entry in widget]
    examples = [entry for entry, name in zip(widget, names, strict=True) if name == EXAMPLE]
    if config.example_image is None and examples and (source / EXAMPLE).is_file():
        labels = str(examples[0].get("candidate_labels") or "")
        captions = config.example_captions or [label for label in labels.split(", ") if label.strip()]
        config = replace(config, example_image=str(source / EXAMPLE), example_captions=captions)
    replaced = [
        "base_licenses",
        *(LICENSE_FIELDS if config.license else ()),
        *(["language"] if config.languages else []),
        *(["widget"] if config.example_image is not None and examples == widget else []),
    ]
    return config, ({key: value for key, value in data.items() if key not in replaced}, text)


def copy_curves(source: Path, folder: Path) -> None:
    """Copy the source's curves, or draw them from its history, if it has either."""
    if (source / CURVES).is_file():
        shutil.copy(source / CURVES, folder / CURVES)
    elif (source / HISTORY).is_file():
        write_curves(folder, read_json(source / HISTORY)["log_history"])


def write_built_card(
    config: BuildConfig,
    source: SourceModel,
    card: tuple[dict[str, Any], str],
    results: list[Evaluation],
    folder: Path,
    license: ModelLicense,
) -> None:
    """Write the card of a built folder, which has its pictures already; `card` is that of [`source_card`].

    Raises:
        ValueError: People wrote the card, and it does not show what a license demands.
    """
    facts = CardFacts(
        name=config.name or Path(config.destination).name,
        task=source.task,
        repo=config.repo_id or config.destination,
        summary=summary(source.model, source.processor),
        base_models=config.base_models or hub_ids(*base_models(source.model.config)),
        datasets=config.datasets,
        languages=config.languages,
        evaluations=results,
        captions=config.example_captions,
        has_example=config.example_image is not None,
        has_curves=(folder / CURVES).is_file(),
        is_adapter=getattr(source.model, "has_adapter", False),
        **license.facts(),
    )
    # The Trainer, which knew the settings, wrote about the training.
    written = render(facts, *card, keep_training=True)
    if missing := [words for words in facts.shown if words not in written]:
        raise ValueError(
            f"the card of {config.model} was edited and does not show {missing[0]!r}, which the license of a model "
            "that it was made from demands; write it there, and build again."
        )
    write_text(folder / CARD, written)

"""The card of a built folder: what the source's card says, what was measured, and what is asked for."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download

from llm2clip.hub.cards import (
    CARD,
    CURVES,
    CardFacts,
    Evaluation,
    base_models,
    check_metadata,
    read_card,
    render,
    summary,
    write_curves,
)
from llm2clip.utils.files import write_text
from llm2clip.utils.repos import hub_ids

if TYPE_CHECKING:
    from llm2clip.hub.build import BuildConfig, Loaded

logger = logging.getLogger(__name__)

HISTORY = "trainer_state.json"
LICENCE = ("license", "license_name", "license_link")
TASK_TITLES = {"retrieval": "image-text retrieval", "caption_retrieval": "caption retrieval"}


def read_results(path: Path) -> Evaluation:
    """The results of a run of `llm2clip evaluate --output`.

    Raises:
        ValueError: The file holds no such results.
    """
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("data"), dict) or "task" not in fields:
        raise ValueError(f"{path} holds no results of `llm2clip evaluate --output`.")
    data = fields["data"]
    # A folder's name, since its path says nothing to others.
    dataset = str(data["path"]) if hub_ids(str(data["path"])) else Path(data["path"]).name
    metrics = {key: value for key, value in fields.items() if isinstance(value, (int, float))}
    note = ", ".join(data.get("caption_columns") or ())
    task = TASK_TITLES.get(fields["task"], str(fields["task"]))
    return Evaluation(task, dataset, str(data.get("split")), data.get("revision"), metrics, note)


def source_folder(config: BuildConfig) -> Path:
    """Where the source's card and training history are; of a Hub id, a snapshot of those alone."""
    folder = Path(config.model)
    if folder.is_dir():
        return folder
    files = [CARD, CURVES, HISTORY]
    folder = Path(snapshot_download(config.model, revision=config.revision, allow_patterns=files))
    if not (folder / CARD).is_file():
        logger.warning("%s has no %s here, so that the new card begins from nothing.", config.model, CARD)
    return folder


def source_card(config: BuildConfig, source: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of the source's card, without what the settings say themselves.

    Raises:
        ValueError: The Hub would not take its metadata.
    """
    data, text = read_card(source)
    asked = (*(LICENCE if config.license else ()), *(("language",) if config.languages else ()))
    data = {key: value for key, value in data.items() if key not in asked}
    check_metadata(data, source / CARD)
    return data, text


def copy_curves(source: Path, folder: Path) -> bool:
    """Copy the source's curves, or draw them from its history; returns whether there was either."""
    if (source / CURVES).is_file():
        shutil.copy(source / CURVES, folder / CURVES)
        return True
    if (source / HISTORY).is_file():
        return write_curves(folder, json.loads((source / HISTORY).read_text(encoding="utf-8"))["log_history"])
    return False


def write_built_card(
    config: BuildConfig,
    loaded: Loaded,
    card: tuple[dict[str, Any], str],
    results: list[Evaluation],
    has_curves: bool,
    folder: Path,
) -> None:
    """Write the card of a built folder.

    Args:
        config: The settings.
        loaded: The model.
        card: Front matter and text of the source's card.
        results: What was measured.
        has_curves: Whether the folder holds training curves.
        folder: The folder.
    """
    data, text = card
    licence = {name: getattr(config, name) or data.get(name) for name in LICENCE}
    facts = CardFacts(
        name=config.name or Path(config.destination).name,
        task=loaded.task,
        repo=config.repo_id or config.destination,
        summary=summary(loaded.model),
        licence=licence["license"],
        licence_name=licence["license_name"],
        licence_link=licence["license_link"],
        base_models=config.base_models or hub_ids(*base_models(loaded.model.config)),
        datasets=config.datasets,
        languages=config.languages,
        evaluations=results,
        captions=config.example_captions,
        has_example=config.example_image is not None,
        has_curves=has_curves,
        is_adapter=getattr(loaded.model, "has_adapter", False),
    )
    # The Trainer knew its recipe.
    write_text(folder / CARD, render(facts, data, text, keep=["training"]))


__all__ = ["LICENCE", "copy_curves", "read_results", "source_card", "source_folder", "write_built_card"]

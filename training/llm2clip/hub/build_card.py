"""The card of a built folder: the source's card, new results, and the settings of the build."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download

from llm2clip.evaluation.comparison import notes_on
from llm2clip.evaluation.results import Result, read_result
from llm2clip.evaluation.results_table import protocol_words
from llm2clip.hub.base_licenses import LICENSE_FIELDS, Licensing
from llm2clip.hub.cards.card import CARD, as_list, read_card, render
from llm2clip.hub.cards.curves import write_curves
from llm2clip.hub.cards.facts import CURVES, EXAMPLE, MERGE_CURVE, CardFacts, Evaluation, base_models, summary
from llm2clip.hub.source_model import SourceModel
from llm2clip.utils.files import read_json, write_text
from llm2clip.utils.manifests import read_checked
from llm2clip.utils.repos import hub_ids

if TYPE_CHECKING:
    from llm2clip.hub.build import BuildConfig

logger = logging.getLogger(__name__)

HISTORY = "trainer_state.json"
# With which the name of the library begins in results of a model of this package.
LIBRARY = "llm2clip"
TASK_TITLES = {"retrieval": "image-text retrieval", "caption_retrieval": "caption retrieval"}


def read_results(path: Path) -> Evaluation:
    """Read the results of `llm2clip evaluate --output`, of one's own data or of a published set.

    Raises:
        ValueError: The file does not contain such results.
    """
    fields = read_checked(path)
    if "schema_version" in fields:
        return evaluation_of_result(read_result(path))
    if not isinstance(fields.get("data"), dict) or "task" not in fields:
        raise ValueError(f"{path} does not contain results of `llm2clip evaluate --output`.")
    return evaluation_of(fields)


def results_of_one_model(paths: Sequence[Path]) -> list[Evaluation]:
    """Read the files of results for the card of a model.

    Raises:
        ValueError: A file does not contain results, or those of published sets are of several models, or of one that
            is not of this package: a folder of results also has those of other models beside it.
    """
    evaluations = [read_results(path) for path in paths]
    published = [(path, read_result(path).model) for path in paths if "schema_version" in read_json(path)]
    for path, model in published:
        if not str(model.get("library")).startswith(LIBRARY):
            raise ValueError(f"{path} is of {model['given']}, a model of {model.get('library')}: leave it out.")
        if model["fingerprint"] != published[0][1]["fingerprint"]:
            raise ValueError(
                f"{published[0][0]} is of {published[0][1]['given']} and {path} of {model['given']}, with other "
                "weights or preprocessing: give the results of one model."
            )
    return evaluations


def evaluation_of(fields: dict[str, Any]) -> Evaluation:
    """Turn the content of a file of `llm2clip evaluate --output` into results for a card."""
    data = fields["data"]
    # Only the name of a local folder: its path means nothing to others.
    dataset = str(data["path"]) if hub_ids(str(data["path"])) else Path(data["path"]).name
    metrics = {key: value for key, value in fields.items() if isinstance(value, (int, float))}
    note = ", ".join(data.get("caption_columns") or ())
    task = TASK_TITLES.get(fields["task"], str(fields["task"]))
    protocol = f"protocol {fields['protocol']}" if fields.get("protocol") else ""
    return Evaluation(task, dataset, str(data.get("split")), data.get("revision"), metrics, note, protocol)


def evaluation_of_result(result: Result) -> Evaluation:
    """Turn the result of a published set into results for a card."""
    name = str(result.protocol.get("name"))
    return Evaluation(
        task=TASK_TITLES.get(name, name),
        dataset=result.benchmark,
        split="",
        revision=result.data.get("checksum"),
        metrics={**result.counts, **result.scores},
        note=", ".join(notes_on(result)),
        protocol=protocol_words(result),
        name=result.title,
    )


def source_folder(config: BuildConfig) -> Path:
    """The folder of the source's card, its pictures and training history; for a Hub id, a snapshot of these files."""
    if Path(config.model).is_dir():
        return Path(config.model)
    files = [CARD, CURVES, MERGE_CURVE, EXAMPLE, HISTORY, "LICENSE*", "NOTICE"]
    folder = Path(snapshot_download(config.model, revision=config.revision, allow_patterns=files))
    if not (folder / CARD).is_file():
        logger.warning("%s has no %s, so the new card starts empty.", config.model, CARD)
    return folder


def source_card(config: BuildConfig, source: Path) -> tuple[dict[str, Any], str]:
    """Read front matter and text of the source's card, without the fields that the settings replace.

    Raises:
        ValueError: The Hub would reject its metadata.
    """
    data, text = read_card(source)
    replaced = (*(LICENSE_FIELDS if config.license else ()), *(("language",) if config.languages else ()))
    data = {key: value for key, value in data.items() if key not in replaced}
    return data, text


def keep_example(
    config: BuildConfig, source: Path, card: tuple[dict[str, Any], str]
) -> tuple[BuildConfig, tuple[dict[str, Any], str]]:
    """Take the example image of the source and its captions into the settings, unless these name an image.

    Args:
        config: The settings.
        source: Folder of the source's card.
        card: Front matter and text of that card.

    Returns:
        The settings, and the card without a widget that only showed the source's example; a new one is written.
    """
    data, text = card
    widget = as_list(data.get("widget"))
    # A pushed card has the URL of the image.
    own = [entry for entry in widget if isinstance(entry, dict) and str(entry.get("src")).split("/")[-1] == EXAMPLE]
    if config.example_image is None and own and (source / EXAMPLE).is_file():
        labels = str(own[0].get("candidate_labels") or "")
        captions = config.example_captions or [label for label in labels.split(", ") if label.strip()]
        config = replace(config, example_image=str(source / EXAMPLE), example_captions=captions)
    if config.example_image is not None and own == widget:
        data = {key: value for key, value in data.items() if key != "widget"}
    return config, (data, text)


def copy_curves(source: Path, folder: Path) -> bool:
    """Copy the source's curves, or draw those of training from its history; returns whether it had either."""
    if (source / MERGE_CURVE).is_file():
        shutil.copy(source / MERGE_CURVE, folder / MERGE_CURVE)
    if (source / CURVES).is_file():
        shutil.copy(source / CURVES, folder / CURVES)
        return True
    return (source / HISTORY).is_file() and write_curves(folder, read_json(source / HISTORY)["log_history"])


def write_built_card(
    config: BuildConfig,
    source: SourceModel,
    card: tuple[dict[str, Any], str],
    results: list[Evaluation],
    has_curves: bool,
    folder: Path,
    licensing: Licensing,
) -> None:
    """Write the card of a built folder; `card` is front matter and text of the source's card.

    Raises:
        ValueError: People wrote the card, and it does not show what a license demands.
    """
    data, text = card
    shown = list(dict.fromkeys(terms.shown for terms in licensing.terms if terms.shown))
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
        has_curves=has_curves,
        is_adapter=getattr(source.model, "has_adapter", False),
        license=licensing.stated.get("license"),
        license_name=licensing.stated.get("license_name"),
        license_link=licensing.stated.get("license_link"),
        base_licenses=[str(base) for base in licensing.bases],
        shown=shown,
    )
    # The section on training was written by the Trainer, which knew the settings.
    written = render(facts, data, text, keep=["training"])
    if missing := [words for words in shown if words not in written]:
        raise ValueError(
            f"the card of {config.model} was edited and does not show {missing[0]!r}, which the license of a model "
            "that it was made from demands; write it there, and build again."
        )
    write_text(folder / CARD, written)

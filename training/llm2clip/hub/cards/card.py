"""Rendering, reading and merging model cards.

Each generated section is enclosed in marks with its checksum. A later card replaces the sections whose checksum is
still right, and keeps everything that people wrote, changed or deleted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llm2clip.hub.cards.facts import EXAMPLE, QUERY_TASK, VISION_TASK, CardFacts, Evaluation
from llm2clip.hub.cards.sections import PAPER, sections
from llm2clip.utils.files import write_text
from llm2clip.utils.library_errors import wrap_read_errors
from llm2clip.utils.yaml_text import load_yaml

CARD = "README.md"
PEFT_TEMPLATE = "# Model Card for Model ID"
SECTION = re.compile(r"<!-- llm2clip:(\w+) ([0-9a-f]{12}) -->\n(.*?)\n?<!-- /llm2clip:\1 -->", re.DOTALL)
# The repo or folder in the code examples.
LOADED_REPO = re.compile(
    r'((?:from_pretrained\(|SentenceTransformer\(|snapshot_download\(|cached_file\(|model=)")[^"]*(")'
)
LICENSE_FIELDS = ("license", "license_name", "license_link")
# Lists that are united with those of the earlier card.
MERGED_LISTS = ("tags", "base_model", "base_licenses", "datasets")


def license_of(folder: Path | None) -> dict[str, Any]:
    """Read the license in a folder's card, as fields of [`CardFacts`]; empty if there is no card."""
    return license_fields(read_card(folder)[0]) if folder else {}


def license_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """The license in front matter, as fields of [`CardFacts`]."""
    return {name: str(data[name]) for name in LICENSE_FIELDS if data.get(name)}


def read_card(folder: Path) -> tuple[dict[str, Any], str]:
    """Read front matter and text of the card in a folder; both are empty if there is none."""
    path = folder / CARD
    if not path.is_file():
        return {}, ""
    with wrap_read_errors(path):
        data, text = split_card(path.read_text(encoding="utf-8"))
    # The unfilled template that PEFT writes does not count as a card.
    return ({}, "") if text.lstrip().startswith(PEFT_TEMPLATE) else (data, text)


def split_card(content: str) -> tuple[dict[str, Any], str]:
    """Split a card into front matter and text.

    Raises:
        ValueError: The front matter is not a YAML mapping.
    """
    match = re.match(r"\s*---\n(.*?)\n---\n*", content, re.DOTALL)
    if match is None:
        return {}, content
    try:
        data = load_yaml(match[1]) or {}
    except ValueError as error:
        raise ValueError(f"the front matter of README.md is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError("the front matter of README.md is not a YAML mapping.")
    return data, content[match.end() :]


def write_card(folder: Path, facts: CardFacts) -> None:
    """Write README.md, keeping the edits in an existing one."""
    write_text(folder / CARD, render(facts, *read_card(folder)))


def render(facts: CardFacts, data: dict[str, Any] | None = None, text: str = "", keep: Sequence[str] = ()) -> str:
    """Render a card.

    Args:
        facts: Content of the card.
        data: Front matter of an existing card.
        text: Text of an existing card.
        keep: Sections that are only replaced if they are empty.
    """
    new = "\n\n".join(_marked(name, content) for name, content in sections(facts).items())
    return _merged(data or {}, text, front_matter(facts), new, keep)


def merge_cards(theirs: str, ours: str) -> str:
    """Merge a new card, `ours`, into an older one that people may have edited."""
    return _merged(*split_card(theirs), *split_card(ours))


def _merged(data: dict[str, Any], text: str, new_data: dict[str, Any], new_text: str, keep: Sequence[str] = ()) -> str:
    new = {name: content for name, _, content in SECTION.findall(new_text)}

    def renewed(name: str, content: str) -> str | None:
        return None if name in keep and content.strip() else new.get(name)

    return _assemble(_merge_data(data, new_data), _renew_sections(text, renewed) if text.strip() else new_text)


def _assemble(data: dict[str, Any], text: str) -> str:
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n\n{text.strip()}\n"


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """Collect the metadata that the Hub reads."""
    results = [result for evaluation in facts.evaluations for result in _eval_results(evaluation, facts.task)]
    # The Hub separates the labels at commas.
    labels = ", ".join(" ".join(caption.replace(",", " ").split()) for caption in facts.captions)
    widget = [{"src": EXAMPLE, "candidate_labels": labels}] if facts.has_example else None
    is_encoder = facts.task != VISION_TASK and not facts.is_adapter
    return ModelCardData(
        language=list(facts.languages) or None,
        license=facts.license,
        license_name=facts.license_name,
        license_link=facts.license_link,
        base_model=list(facts.base_models) or None,
        base_model_relation="merge" if facts.merged and facts.base_models else None,
        base_licenses=list(facts.base_licenses) or None,
        datasets=list(facts.datasets) or None,
        library_name="sentence-transformers" if facts.task == QUERY_TASK else "transformers",
        pipeline_tag=facts.task,
        tags=["llm2clip", "clip", *(["sentence-transformers"] if is_encoder else []), f"arxiv:{PAPER}"],
        widget=widget,
        model_name=facts.name if results else None,
        eval_results=results or None,
    ).to_dict()


def _eval_results(evaluation: Evaluation, pipeline_tag: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=pipeline_tag,
            task_name=evaluation.task,
            dataset_type=evaluation.dataset,
            dataset_name=evaluation.title,
            # Without it the Hub would merge the results of two caption columns of one split.
            dataset_config=evaluation.note or None,
            dataset_split=evaluation.split or None,
            dataset_revision=evaluation.revision,
            metric_type=name,
            metric_value=value,
        )
        for name, value in evaluation.compared.items()
    ]


def _merge_data(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = {**new, **old}
    for key in MERGED_LISTS:
        if values := [*as_list(old.get(key)), *as_list(new.get(key))]:
            merged[key] = list(dict.fromkeys(values))
    if "model-index" in new:
        ours = new["model-index"][0]
        measured = [_measured(result) for result in ours["results"]]
        others = [result for entry in old.get("model-index") or [] for result in entry.get("results") or []]
        kept = [result for result in others if _measured(result) not in measured]
        merged["model-index"] = [{**ours, "results": [*ours["results"], *kept]}]
    return merged


def _measured(result: dict[str, Any]) -> tuple[Any, ...]:
    """Task and data of a result in a model-index."""
    dataset = result.get("dataset") or {}
    return ((result.get("task") or {}).get("name"), *(dataset.get(key) for key in ("type", "config", "split")))


def _marked(name: str, content: str) -> str:
    content = content.strip()
    return f"<!-- llm2clip:{name} {_checksum(content)} -->\n{content}\n<!-- /llm2clip:{name} -->"


def _checksum(content: str) -> str:
    return hashlib.sha256(content.strip().encode()).hexdigest()[:12]


def _renew_sections(text: str, renewed: Callable[[str, str], str | None]) -> str:
    """Replace the sections that nobody changed by `renewed(name, content)`; None or an empty text keeps a section."""

    def renew(match: re.Match[str]) -> str:
        name, checksum, content = match.groups()
        new = renewed(name, content) if _checksum(content) == checksum else None
        return _marked(name, new) if new else match[0]

    return SECTION.sub(renew, text)


def with_repo(card: str, repo: str, example: str) -> str:
    """Rewrite a card so that its code examples load `repo` and its widget shows the image at the URL `example`."""
    data, text = split_card(card)
    for entry in data.get("widget") or []:
        if entry.get("src") == EXAMPLE:
            entry["src"] = example

    def renewed(name: str, content: str) -> str | None:
        return LOADED_REPO.sub(rf"\g<1>{repo}\g<2>", content) if name == "use" else None

    return _assemble(data, _renew_sections(text, renewed))


def validate_card(folder: Path) -> None:
    """Check that the card in a folder can be read; the Hub checks the values of its metadata before an upload.

    Raises:
        FileNotFoundError: There is no README.md.
        ValueError: Its metadata is not valid.
    """
    if not (folder / CARD).is_file():
        raise FileNotFoundError(f"{folder} lacks {CARD}; `llm2clip build` writes one.")
    read_card(folder)
    ModelCard.load(folder / CARD)


def as_list(value: Any) -> list[Any]:
    """The values of a field that may be a single value, a list or absent."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]

"""Rendering, reading and merging model cards.

What is generated stands between two marks, and a later card replaces it. What people write above or below stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from llm2clip.command_line.tables import RECALLS, markdown_table
from llm2clip.command_line.yaml_text import load_yaml
from llm2clip.files.atomic import write_text
from llm2clip.files.library_errors import wrap_read_errors
from llm2clip.hub.cards.facts import EXAMPLE, QUERY_TASK, RECALL, VISION_TASK, CardFacts, Evaluation

CARD = "README.md"
PAPER = "2411.04997"
PEFT_TEMPLATE = "# Model Card for Model ID"
BEGIN = "<!-- llm2clip: generated; what you write above or below these two marks stays -->"
END = "<!-- /llm2clip -->"
GENERATED = re.compile(f"{re.escape(BEGIN)}\n(.*?)\n{re.escape(END)}", re.DOTALL)
# A part of what is generated, with its title.
PART = re.compile(r"^## ([^\n]+)\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
# The repo or folder in the code examples.
LOADED_REPO = re.compile(
    r'((?:from_pretrained\(|SentenceTransformer\(|snapshot_download\(|cached_file\(|model=)")[^"]*(")'
)
LICENSE_FIELDS = ("license", "license_name", "license_link")
# Lists that are united with those of the earlier card.
MERGED_LISTS = ("tags", "base_model", "base_licenses", "datasets")
DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text", "": "query → target"}
OWN_PICTURE = '"picture.jpg"  # path of an image'
CAPTIONS = ("a photo of a dog", "a photo of a cat")


def license_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the license in front matter, as fields of [`CardFacts`]."""
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
    """Write README.md; what people wrote on an existing one outside of the marks stays."""
    write_text(folder / CARD, render(facts, *read_card(folder)))


def render(facts: CardFacts, data: dict[str, Any] | None = None, text: str = "", keep_training: bool = False) -> str:
    """Render a card.

    Args:
        facts: Content of the card.
        data: Front matter of an existing card.
        text: Text of an existing card. Its results stay if `facts` has none.
        keep_training: Its description of the training stays, which was written by whoever knew the settings.
    """
    found = GENERATED.search(text)
    parts = {} if found is None else {part[1]: part[0].strip() for part in PART.finditer(found[1])}
    body = _body(facts, parts.get("Results", ""), parts.get("Training", "") if keep_training else "")
    return _merged(data or {}, text, front_matter(facts), f"{BEGIN}\n{body}\n{END}")


def merge_cards(theirs: str, ours: str) -> str:
    """Merge a new card, `ours`, into an older one: its generated text is replaced, and what people wrote stays."""
    return _merged(*split_card(theirs), *split_card(ours))


def _merged(data: dict[str, Any], text: str, new_data: dict[str, Any], new_text: str) -> str:
    generated = GENERATED.search(new_text)
    if not text.strip():
        text = new_text
    elif generated is not None:
        text = GENERATED.sub(lambda _: generated[0], text)
    return _assemble(_merge_data(data, new_data), text)


def _assemble(data: dict[str, Any], text: str) -> str:
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n\n{text.strip()}\n"


def _body(facts: CardFacts, results: str, training: str) -> str:
    """Fill `template.md`; `results` and `training` are parts that stay as they are."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("template.md").read_text(encoding="utf-8"))
    recalls = [row for evaluation in facts.evaluations for row in _recall_rows(evaluation)]
    shares = [row for evaluation in facts.evaluations for row in _share_rows(evaluation)]
    intervals = ", with 95% intervals" if any(evaluation.intervals for evaluation in facts.evaluations) else ""
    heads = ["task", "data", "direction", "R@1", "R@5", "R@10"]
    text = template.render(
        **vars(facts),
        kept_results="" if facts.evaluations else results,
        kept_training=training,
        intervals=intervals,
        # A list with double quotes, as formatters write them.
        examples=json.dumps(list(facts.captions or CAPTIONS), ensure_ascii=False),
        # `cached_file` finds the image in a folder as well as in a repo on the Hub.
        imports="from transformers.utils import cached_file\n" if facts.has_example else "",
        picture=f'cached_file("{facts.repo}", "{EXAMPLE}")' if facts.has_example else OWN_PICTURE,
        recalls=markdown_table(heads, recalls, range(3)),
        has_recalls=bool(recalls or not shares),
        shares=shares and markdown_table(["task", "data", "score", "value"], shares, range(3)),
        data=[*facts.datasets, *facts.sources],
        settings=yaml.safe_dump(_plain(facts.recipe), sort_keys=True, allow_unicode=True),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _recall_rows(evaluation: Evaluation) -> list[list[str]]:
    rows = []
    for direction, title in DIRECTIONS.items():
        names = [f"{direction}_{recall}" if direction else recall for recall in RECALLS]
        if all(name in evaluation.metrics for name in names):
            rows.append([evaluation.task, evaluation.title, title, *map(evaluation.shown, names)])
            if evaluation.baseline:
                rows.append([evaluation.task, evaluation.title, f"{title}, before", *map(evaluation.before, names)])
    return rows


def _share_rows(evaluation: Evaluation) -> list[list[str]]:
    rows = []
    for title, name in evaluation.compared.items():
        if not RECALL.search(name):
            rows.append([evaluation.task, evaluation.title, title.replace("_", " "), evaluation.shown(name)])
            if name in evaluation.baseline:
                rows.append([*rows[-1][:2], f"{rows[-1][2]}, before", evaluation.before(name)])
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


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
            metric_value=evaluation.metrics[metric],
            metric_args=evaluation.remarks_on(metric) or None,
        )
        for name, metric in evaluation.compared.items()
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


def with_repo(card: str, repo: str, example: str) -> str:
    """Rewrite a card so that its code examples load `repo` and its widget shows the image at the URL `example`."""
    data, text = split_card(card)
    for entry in data.get("widget") or []:
        if entry.get("src") == EXAMPLE:
            entry["src"] = example
    return _assemble(data, GENERATED.sub(lambda found: LOADED_REPO.sub(rf"\g<1>{repo}\g<2>", found[0]), text))


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
    """Return the values of a field that may be a single value, a list or absent."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]

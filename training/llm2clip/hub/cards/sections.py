"""The generated sections of a model card: `template.md`, filled with facts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from llm2clip.hub.cards.facts import EXAMPLE, RECALL, CardFacts, Evaluation
from llm2clip.utils.tables import RECALLS, markdown_table

PAPER = "2411.04997"
DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text", "": "query → target"}
OWN_PICTURE = '"picture.jpg"  # path of an image'
CAPTIONS = ("a photo of a dog", "a photo of a cat")


def sections(facts: CardFacts) -> dict[str, str]:
    """Render all sections by name; a section without content is empty."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("template.md").read_text(encoding="utf-8"))
    recalls = [row for evaluation in facts.evaluations for row in _recall_rows(evaluation)]
    shares = [
        [evaluation.task, evaluation.title, name.replace("_", " "), f"{100 * value:.1f}"]
        for evaluation in facts.evaluations
        for name, value in evaluation.compared.items()
        if not RECALL.search(name)
    ]
    text = template.render(
        **vars(facts),
        # A list with double quotes, as formatters write them.
        examples=json.dumps(list(facts.captions or CAPTIONS), ensure_ascii=False),
        # `cached_file` finds the image in a folder as well as in a repo on the Hub.
        imports="from transformers.utils import cached_file\n" if facts.has_example else "",
        picture=f'cached_file("{facts.repo}", "{EXAMPLE}")' if facts.has_example else OWN_PICTURE,
        recalls=markdown_table(["task", "data", "direction", "R@1", "R@5", "R@10"], recalls, range(3)),
        has_recalls=bool(recalls or not shares),
        shares=shares and markdown_table(["task", "data", "score", "value"], shares, range(3)),
        data=[*facts.datasets, *facts.sources],
        settings=yaml.safe_dump(_plain(facts.recipe), sort_keys=True, allow_unicode=True),
    )
    _, *parts = re.split(r"^<!-- section: (\w+) -->\n", text, flags=re.MULTILINE)
    return {name: content.strip() for name, content in zip(parts[::2], parts[1::2], strict=True)}


def _recall_rows(evaluation: Evaluation) -> list[list[str]]:
    rows = []
    for direction, title in DIRECTIONS.items():
        names = [f"{direction}_{recall}" if direction else recall for recall in RECALLS]
        if all(name in evaluation.metrics for name in names):
            values = [f"{100 * evaluation.metrics[name]:.1f}" for name in names]
            rows.append([evaluation.task, evaluation.title, title, *values])
    return rows


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)

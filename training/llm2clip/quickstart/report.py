"""The report of the quickstart: one self-contained HTML page of queries, and the pictures that they find."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.evaluation.data import RetrievalData
from llm2clip.files.atomic import write_text
from llm2clip.quickstart.config import Arm
from llm2clip.quickstart.data import QUERY, SHOWN_LANGUAGES
from llm2clip.quickstart.final_model import FinalModel
from llm2clip.quickstart.run_context import RunContext
from llm2clip.search.top_k import top_k

NUM_TYPED, NUM_QUERIES, NUM_FOUND, THUMBNAIL = 4, 12, 6, 96

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1d2430; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
.found { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; margin: .3rem 0 .9rem; }
.found img { width: 96px; height: 96px; border: 3px solid #d9dee6; border-radius: 6px; }
.found img.right { border-color: #2e9e4f; } .query { font-weight: 600; }
.note { color: #5a6678; font-size: .9rem; }
"""


def write_report(path: Path, results: dict[str, Any], run: RunContext, best: Arm, final: FinalModel) -> None:
    """Write the report of a run to the HTML file `path`.

    Args:
        results: Content of `results.json`.
        best: The text encoder of the final model.
    """
    settings, machine = results["settings"], results["machine"]
    minutes = sum(results["seconds"].values()) / 60
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>LLM2CLIP quickstart</title>",
        f"<style>{STYLE}</style></head><body><h1>LLM2CLIP quickstart</h1>",
        f"<p>The model finds pictures by text. Its text encoder is {_text(best.title)}, the best on the validation "
        f"set; it searches {len(final.rows)} pictures, whose names are captions of no picture of the training.</p>",
        *_typed(results["typed_queries"], final),
        *(f"<p class='note'>{_text(sentence)}</p>" for sentence in results["protocol"].values()),
        "<h2>Retrieved images</h2>",
        _queries(run, best, final),
        f"<p class='note'>Profile {_text(settings['profile'])}, seed {_text(settings['seed'])}. "
        f"LLM: {_text(settings['llm'])}. Vision tower: {_text(settings['vision_model'])}. "
        f"Data: {_text(settings['data'])}. {minutes:.1f} minutes on {_text(machine['threads'])} threads of "
        f"{_text(machine['processor'])}. results.json has every number and setting.</p>",
        "</body></html>",
    ]
    write_text(path, "\n".join(parts))


def _typed(typed: dict[str, Any], final: FinalModel) -> list[str]:
    """Show what typed queries find: the first ones, which are easy, and how many of all are right."""
    if not typed:
        return []
    shown = []
    for entry in typed["results"][:NUM_TYPED]:
        pictures = [(row, right, "") for row, right in zip(entry["rows"], entry["right"], strict=True)]
        shown.append(_pictures(entry["query"], pictures, final))
    note = (
        f"<p>Of {typed['queries']} queries as somebody would type them, the first picture is right for "
        f"{typed['first']}, and one of the first {typed['shown']} for {typed['found']}.</p>"
    )
    return ["<h2>Typed queries</h2>", *shown, note]


def _text(value: Any) -> str:
    return html.escape(str(value))


def _pictures(query: str, pictures: Sequence[tuple[int, bool, str]], final: FinalModel) -> str:
    """Show a query and its pictures: rows of the test set, whether they are right, and a note on each."""
    shown = []
    for row, right, note in pictures:
        image, buffer = final.retrieval.image(row).copy(), io.BytesIO()
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.save(buffer, "WEBP", quality=80)
        data = base64.b64encode(buffer.getvalue()).decode()
        frame = "right" if right else ""
        shown.append(f"<img class='{frame}' alt='' title='{_text(note)}' src='data:image/webp;base64,{data}'>")
    return f"<div class='query'>{_text(query)}</div><div class='found'>{''.join(shown)}</div>"


def _queries(run: RunContext, best: Arm, final: FinalModel) -> str:
    """Show what captions of each language find."""
    columns, rows = run.data.queries(best.kind), final.rows
    names = [name for name in (QUERY, *SHOWN_LANGUAGES) if name in columns]
    parts = [
        f"<p class='note'>Random {_text(', '.join(names))} of the test split, and the first {NUM_FOUND} of "
        f"{len(rows)} images. Correct images have a green frame.</p>"
    ]
    for name in names:
        retrieval = RetrievalData.from_source(run.data.test_source(columns[name])).select(rows)
        text_embeds = final.encoder.encode_text(retrieval.texts)
        right = {(int(text), int(image)) for text, image in retrieval.pairs}
        total = len(retrieval.texts)
        generator, count = np.random.default_rng(run.config.seed), min(NUM_QUERIES // len(names), total)
        chosen = sorted(generator.choice(total, count, replace=False).tolist())
        nearest = top_k(text_embeds[chosen], final.image_embeds, NUM_FOUND)
        for text, scores, images in zip(chosen, *(column.tolist() for column in nearest), strict=True):
            query = retrieval.texts[text] + ("" if name == QUERY else f" ({name})")
            pictures = [
                (rows[image], (text, image) in right, f"cosine {score:.2f}")
                for score, image in zip(scores, images, strict=True)
            ]
            parts.append(_pictures(query, pictures, final))
    return "".join(parts)

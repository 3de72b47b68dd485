"""What the model at the end of the quickstart finds, and the report: an HTML page of tables, queries and pictures."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm2clip.encoders.stored import StoredEncoder
from llm2clip.evaluation.data import RetrievalData
from llm2clip.files.atomic import write_text
from llm2clip.files.bundled import bundled_data
from llm2clip.quickstart.data import QUERY, SHOWN_LANGUAGES, QuickstartData
from llm2clip.quickstart.results import all_tables
from llm2clip.search.top_k import top_k

NUM_TYPED, NUM_QUERIES, NUM_FOUND, THUMBNAIL = 4, 12, 6, 96
# What somebody would type, and which of the bundled test pictures are right for it: judged once, and committed.
TYPED_QUERIES, SHOWN = "typed_queries.json", 5

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1d2430; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem; border-bottom: 1px solid #d9dee6; }
th { text-align: left; white-space: pre-line; vertical-align: bottom; }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child { text-align: left; white-space: pre; }
.found { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; margin: .3rem 0 .9rem; }
.found img { width: 96px; height: 96px; border: 3px solid #d9dee6; border-radius: 6px; }
.found img.right { border-color: #2e9e4f; } .query { font-weight: 600; }
.note { color: #5a6678; font-size: .9rem; }
"""


class FinalModel(NamedTuple):
    """The model at the end, and the test images as it embeds them.

    Attributes:
        model, processor: The model with its text encoder, and its processor.
        encoder: The model, with the embeddings of captions that are stored.
        data, retrieval: The data, and its test set.
        image_embeds, rows: Unit embeddings of the readable images, and their row numbers.
    """

    model: Any
    processor: Any
    encoder: StoredEncoder
    data: QuickstartData
    retrieval: RetrievalData
    image_embeds: Tensor
    rows: list[int]


@torch.no_grad()
def sample_logits(final: FinalModel) -> dict[str, Any]:
    """Compute a few logits, to compare a model that is loaded elsewhere with."""
    captions, images = final.retrieval.texts[:4], [final.retrieval.image(row) for row in range(4)]
    output = final.model(**final.processor(text=captions, images=images, return_tensors="pt"))
    return {
        "captions": captions,
        "images": "the first four of the test split",
        "logits_per_image": output.logits_per_image.tolist(),
    }


def search_typed(final: FinalModel) -> dict[str, Any]:
    """Search the test pictures with the typed queries, whose right pictures are named by their captions.

    Returns:
        The number of `queries`; those whose `first` picture is right, and those with a right one `found` among the
        first `shown`; and of each query the rows that it finds, and whether they are right, as `results`.
    """
    file = bundled_data(TYPED_QUERIES, "give --data a folder or Hub id")
    typed = json.loads(file.read_text(encoding="utf-8"))
    embeds = final.model.encode_text([entry["query"] for entry in typed], final.processor)
    results = []
    for entry, images in zip(typed, top_k(embeds, final.image_embeds, SHOWN)[1].tolist(), strict=True):
        rows = [final.rows[image] for image in images]
        right = [bool(set(final.retrieval.captions_of(row)) & set(entry["captions"])) for row in rows]
        results.append({"query": entry["query"], "rows": rows, "right": right})
    return {
        "queries": len(results),
        "first": sum(result["right"][0] for result in results),
        "found": sum(any(result["right"]) for result in results),
        "shown": SHOWN,
        "results": results,
    }


def write_report(path: Path, results: dict[str, Any], columns: Mapping[str, str], final: FinalModel) -> None:
    """Write the report of a run to the HTML file `path`.

    Args:
        results: Content of `results.json`.
        columns: The caption columns that query the model, by what they are.
    """
    settings, machine = results["settings"], results["machine"]
    minutes = f"{sum(results['seconds'].values()) / 60:.1f} minutes on " if results["seconds"] else ""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>LLM2CLIP quickstart</title>",
        f"<style>{STYLE}</style></head><body><h1>LLM2CLIP quickstart</h1>",
        f"<p>The model finds pictures by text. Its text encoder is {_text(results['best_text_encoder'])}, the best on "
        f"the validation set; it searches {len(final.rows)} pictures, whose names are captions of no picture of the "
        "training.</p>",
        *_typed(results["typed_queries"], final),
        *(_table(title, *table) for title, table in all_tables(results)),
        *(f"<p class='note'>{_text(sentence)}</p>" for sentence in results["protocol"].values()),
        "<h2>Retrieved images</h2>",
        _queries(columns, settings["seed"], final),
        f"<p class='note'>Profile {_text(settings['profile'])}, seed {_text(settings['seed'])}. "
        f"LLM: {_text(settings['llm'])}. Vision tower: {_text(settings['vision_model'])}. "
        f"Data: {_text(settings['data'])}. {minutes}{_text(machine['threads'])} threads of "
        f"{_text(machine['processor'])}. results.json has every number and setting.</p>",
        "</body></html>",
    ]
    write_text(path, "\n".join(parts))


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """Show a table of the terminal."""
    heads = "".join(f"<th>{_text(column)}</th>" for column in columns)
    lines = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<h2>{_text(title)}</h2><table><tr>{heads}</tr>{lines}</table>"


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


def _queries(columns: Mapping[str, str], seed: int, final: FinalModel) -> str:
    """Show what captions of each language find."""
    rows = final.rows
    names = [name for name in (QUERY, *SHOWN_LANGUAGES) if name in columns]
    parts = [
        f"<p class='note'>Random {_text(', '.join(names))} of the test split, and the first {NUM_FOUND} of "
        f"{len(rows)} images. Correct images have a green frame.</p>"
    ]
    for name in names:
        retrieval = RetrievalData.from_source(final.data.test_source(columns[name])).select(rows)
        text_embeds = final.encoder.encode_text(retrieval.texts)
        right = {(int(text), int(image)) for text, image in retrieval.pairs}
        total = len(retrieval.texts)
        generator, count = np.random.default_rng(seed), min(NUM_QUERIES // len(names), total)
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

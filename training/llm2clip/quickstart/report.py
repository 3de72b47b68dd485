"""The report of the quickstart: one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.nn import functional as F
from transformers import AutoProcessor

from llm2clip.data import EvalTransform
from llm2clip.embedding import EmbeddingCache
from llm2clip.evaluation import ImageTextRetrieval
from llm2clip.evaluation.heat_map import draw_heat_map, patch_similarity, seen_part
from llm2clip.quickstart.arms import Arm
from llm2clip.quickstart.curves import draw_curves
from llm2clip.quickstart.data import QUERY
from llm2clip.quickstart.run_context import RunContext
from llm2clip.quickstart.tables import all_tables
from llm2clip.search.top_k import top_k
from llm2clip.utils.files import write_text
from modeling_llm2clip import LLM2CLIPModel

NUM_QUERIES, NUM_FOUND, NUM_MAPS, THUMBNAIL, MAP_WIDTH = 12, 6, 6, 96, 224
# Beside the captions.
SHOWN_LANGUAGES = ("German", "Chinese")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1d2430; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; } th, td { padding: .35rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #8792a5; font-weight: 600; }
tbody tr { border-bottom: 1px solid #dde2ea; } td:first-child { white-space: pre; }
.found { display: flex; flex-wrap: wrap; gap: .4rem; align-items: center; margin: .3rem 0 .9rem; }
.found img { width: 96px; height: 96px; border: 3px solid #d9dee6; border-radius: 6px; }
.found img.right { border-color: #2e9e4f; } .query { font-weight: 600; }
.note { color: #5a6678; font-size: .9rem; } .plot { max-width: 100%; }
pre { background: #f3f5f8; padding: 1rem; overflow: auto; font-size: .8rem; }
"""


def write_report(path: Path, results: dict[str, Any], run: RunContext, best: Arm) -> None:
    """Write the report of a run to the HTML file `path`.

    Args:
        results: Content of `results.json`.
        best: The text encoder of the final model.
    """
    model: Any = LLM2CLIPModel.from_pretrained(run.folder / "llm2clip", text_model=False)
    model.eval()
    processor = AutoProcessor.from_pretrained(run.folder / "llm2clip")
    cache = EmbeddingCache.open(run.cache(best.name))
    settings = results["settings"]
    tables = [part for title, table in all_tables(results) for part in (f"<h2>{_text(title)}</h2>", _table(*table))]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>LLM2CLIP quickstart</title>",
        f"<style>{STYLE}</style></head><body><h1>LLM2CLIP quickstart</h1>",
        f"<p>Profile {_text(settings['profile'])}, seed {settings['seed']}. LLM: {_text(settings['llm'])}. "
        f"Vision tower: {_text(settings['vision_model'])}. Data: {_text(settings['data'])}. "
        f"Text encoder of the final model, chosen on the validation set: {_text(best.title)}.</p>",
        *tables,
        *(f"<p>{_text(sentence)}</p>" for sentence in results["reading"]),
        *(f"<p class='note'>{_text(sentence)}</p>" for sentence in results["protocol"].values()),
        "<h2>Training</h2>",
        f"<img class='plot' alt='curves' src='{_figure(draw_curves(results['runs'], run.arms))}'>",
        "<h2>Retrieved images</h2>",
        _queries(model, processor, run, best, cache),
        "<h2>Similarity of captions and image patches</h2>",
        "<p class='note'>Cosine similarity between the caption and every patch of its image, from blue (low) to red "
        "(high). Where the vision tower was frozen, no patch was trained to match captions: it says little.</p>",
        _patch_maps(model, processor, run, cache),
        "<h2>Settings and durations</h2>",
        f"<pre>{_text(json.dumps({k: results[k] for k in ('settings', 'seconds', 'machine')}, indent=2))}</pre>",
        "</body></html>",
    ]
    write_text(path, "\n".join(parts))


def _text(value: Any) -> str:
    return html.escape(str(value))


def _table(columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in columns).replace("\n", "<br>")
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _thumbnail(image: Image.Image) -> str:
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _sample(count: int, total: int, seed: int) -> list[int]:
    return sorted(np.random.default_rng(seed).choice(total, size=min(count, total), replace=False).tolist())


def _queries(model: LLM2CLIPModel, processor: Any, run: RunContext, best: Arm, cache: EmbeddingCache) -> str:
    """Show what queries of each language find."""
    columns = run.data.queries(best.kind)
    names = [name for name in (QUERY, *SHOWN_LANGUAGES) if name in columns]
    first = ImageTextRetrieval(run.data.test_source(), processor.image_processor)
    image_embeds, rows = first.embed_images(model)
    parts = [
        f"<p class='note'>Random {_text(', '.join(names))} of the test split, and the first {NUM_FOUND} of "
        f"{len(rows)} images. Correct images have a green frame.</p>"
    ]
    for name in names:
        retrieval = ImageTextRetrieval(run.data.test_source(columns[name]), processor.image_processor)
        text_embeds = retrieval.embed_captions(model, cache.lookup)
        right = {(int(text), int(image)) for text, image in retrieval.matches(rows)}
        chosen = _sample(NUM_QUERIES // len(names), len(retrieval.captions), run.config.seed)
        found = top_k(text_embeds[chosen], image_embeds, NUM_FOUND)
        for text, scores, images in zip(chosen, *(column.tolist() for column in found), strict=True):
            pictures = "".join(
                f"<img class='{'right' if (text, image) in right else ''}' alt='' title='cosine {score:.2f}' "
                f"src='{_thumbnail(retrieval.image(rows[image]))}'>"
                for score, image in zip(scores, images, strict=True)
            )
            query = _text(retrieval.captions[text]) + ("" if name == QUERY else f" ({name})")
            parts.append(f"<div class='query'>{query}</div><div class='found'>{pictures}</div>")
    return "".join(parts)


@torch.no_grad()
def _patch_maps(model: LLM2CLIPModel, processor: Any, run: RunContext, cache: EmbeddingCache) -> str:
    retrieval = ImageTextRetrieval(run.data.test_source(), processor.image_processor)
    rows = _sample(4 * NUM_MAPS, len(retrieval.images), run.config.seed + 1)
    chosen = [row for row in rows if retrieval.image_captions[row]][:NUM_MAPS]
    images = [retrieval.image(row) for row in chosen]
    transform = EvalTransform(processor.image_processor)
    pixels = torch.stack([transform(image) for image in images])
    captions = [retrieval.image_captions[row][0] for row in chosen]
    features = model.get_text_features(llm_embeds=cache.lookup(captions)).pooler_output
    assert features is not None
    maps = patch_similarity(model, pixels, F.normalize(features.float(), dim=-1))
    figure = Figure(figsize=(2 * len(chosen), 4.3), layout="constrained")
    axes = figure.subplots(2, len(chosen), squeeze=False)
    for column, (image, caption, heat) in enumerate(zip(images, captions, maps, strict=True)):
        picture = seen_part(image, processor.image_processor)
        axes[0, column].imshow(picture)
        axes[0, column].set_title(caption[:22], fontsize=9, parse_math=False)
        axes[1, column].imshow(draw_heat_map(picture, heat, MAP_WIDTH))
    for axis in axes.flat:
        axis.axis("off")
    return f"<img class='plot' alt='patch similarity' src='{_figure(figure)}'>"

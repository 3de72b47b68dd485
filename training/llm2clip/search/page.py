"""Search results as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from PIL import Image

from llm2clip.search.results import QueryResults, ResultImages, SearchResult
from llm2clip.utils.files import write_text

THUMBNAIL = 320
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1.2rem; color: #1d2430;
  background: #fafbfc; }
h1 { font-size: 1.35rem; font-weight: 600; margin: 2.2rem 0 1rem; display: flex; align-items: center; gap: .8rem; }
h1 img { width: 72px; height: 72px; object-fit: contain; border-radius: 6px; border: 1px solid #dde2ea;
  background: #fff; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); }
li { background: #fff; border: 1px solid #e3e7ee; border-radius: 10px; overflow: hidden; }
.frame { aspect-ratio: 1; display: flex; align-items: center; justify-content: center; background: #fff;
  border-bottom: 1px solid #eef1f5; color: #8792a5; }
.frame img { max-width: 100%; width: 100%; height: 100%; object-fit: contain; }
.text { padding: .55rem .7rem .65rem; }
.line { display: flex; justify-content: space-between; font-size: .85rem; color: #5a6678; }
.score { font-variant-numeric: tabular-nums; font-weight: 600; color: #1d2430; }
.caption { margin: .15rem 0; }
.place { font-size: .78rem; color: #8792a5; overflow-wrap: anywhere; }
"""


def write_page(path: Path, found: list[QueryResults], images: ResultImages) -> None:
    """Write the results of queries to one HTML file."""
    title = html.escape(", ".join(entry.title for entry in found))
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
    ]
    for entry in found:
        shown = "" if entry.image is None else _image(entry.image, "the query")
        parts.append(f"<h1>{shown}{html.escape(entry.title)}</h1><ol>")
        parts += [_result(rank, result, images) for rank, result in enumerate(entry.results, 1)]
        parts.append("</ol>")
    write_text(path, "\n".join([*parts, "</body></html>"]))


def _result(rank: int, result: SearchResult, images: ResultImages) -> str:
    image = images.load(result)
    shown = "no longer available" if image is None else _image(image, result.caption or result.key)
    frame = f"<div class='frame'>{shown}</div>" if images.exist else ""
    caption = f"<div class='caption'>{html.escape(result.caption)}</div>" if result.caption else ""
    return (
        f"<li>{frame}<div class='text'>"
        f"<div class='line'><span>{rank}</span><span class='score'>{result.score:.3f}</span></div>{caption}"
        f"<div class='place'>{html.escape(result.place)}</div></div></li>"
    )


def _image(image: Image.Image, text: str) -> str:
    image, file = image.copy(), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    image.save(file, "WEBP", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img alt='{html.escape(text)}' src='data:image/webp;base64,{data}'>"

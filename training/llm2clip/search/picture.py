"""Search results as a PNG file: each query with the thumbnails of its results."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from PIL import Image

from llm2clip.search.results import QueryResults, ResultImages
from llm2clip.utils.files import atomic_file

logger = logging.getLogger(__name__)

WIDTH = 1000
DPI = 100
LINE, SPACE, LABEL, GAP, MARGIN = 26, 14, 26, 14, 24
TITLE_SIZE = 14
# Captions that were found are drawn below their images.
CAPTION_SIZE, CAPTION_LINE, CAPTION_LINES = 9, 16, 4
MOST_IN_A_ROW = 8


def draw_picture(path: Path, found: list[QueryResults], images: ResultImages) -> None:
    """Draw a PNG 1000 pixels wide, with rows of at most eight results below each query.

    Characters that matplotlib's default font lacks are drawn in other installed fonts; characters that no font has are
    logged. Captions that were found are below their images, up to four lines of each.
    """
    titles = [f"“{entry.text}”" if entry.image is None else entry.title for entry in found]
    texts = [result.caption or "" for entry in found for result in entry.results] if _has_captions(images) else []
    font = FontProperties(family=font_families("".join([*titles, *texts])), size=TITLE_SIZE)
    with warnings.catch_warnings(), atomic_file(path) as file:
        # `font_families` has logged the missing characters once.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        _figure(titles, font, found, images).savefig(file, format="png", dpi=DPI)


def _has_captions(images: ResultImages) -> bool:
    return images.embed == "caption"


def _measure(font: FontProperties) -> Callable[[str], float]:
    renderer = RendererAgg(WIDTH, LINE, DPI)
    return lambda text: renderer.get_text_width_height_descent(text, font, ismath=False)[0]


def _figure(titles: list[str], font: FontProperties, found: list[QueryResults], images: ResultImages) -> Figure:
    measure = _measure(font)
    wrapped = [wrap(title, WIDTH - 2 * MARGIN, measure) for title in titles]
    most = max(1, *(len(entry.results) for entry in found))
    rows = math.ceil(most / MOST_IN_A_ROW)
    columns = math.ceil(most / rows)
    side = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns
    label = LABEL + CAPTION_LINES * CAPTION_LINE * _has_captions(images)
    blocks = [len(lines) * LINE + SPACE + rows * (side + label) for lines in wrapped]
    height = 2 * MARGIN + sum(blocks) + (len(found) - 1) * GAP
    figure = Figure((WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    top = height - MARGIN
    for entry, lines, block in zip(found, wrapped, blocks, strict=True):
        for number, line in enumerate(lines):
            at = (MARGIN / WIDTH, (top - 8 - number * LINE) / height)
            figure.text(*at, line, font=font, va="top", color="#1d2430", parse_math=False)
        first = top - len(lines) * LINE - SPACE
        for number, result in enumerate(entry.results):
            row, column = divmod(number, columns)
            left, bottom = MARGIN + column * (side + GAP), first - row * (side + label) - side
            frame = figure.add_axes((left / WIDTH, bottom / height, side / WIDTH, side / height), xticks=[], yticks=[])
            frame.spines[:].set_color("#dde2ea")
            image = images.load(result)
            if image is not None:
                image.thumbnail((2 * round(side), 2 * round(side)), Image.Resampling.LANCZOS)
                frame.imshow(image, interpolation="lanczos", aspect="equal")
                frame.set_adjustable("datalim")
                frame.set_anchor("C")
            frame.set_xlabel(f"{result.score:.2f}", fontsize=10, color="#5a6678", labelpad=4)
            if _has_captions(images):
                _draw_caption(figure, font, result.caption or "", left, bottom - LABEL, side)
        top -= block + GAP
    return figure


def _draw_caption(figure: Figure, font: FontProperties, text: str, left: float, top: float, width: float) -> None:
    """Draw the first lines of a caption below a place of the figure, in pixels."""
    small = font.copy()
    small.set_size(CAPTION_SIZE)
    lines = wrap(text, width, _measure(small))
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], f"{lines[CAPTION_LINES - 1]}…"]
    height = figure.get_figheight() * DPI
    for number, line in enumerate(lines):
        at = (left / WIDTH, (top - number * CAPTION_LINE) / height)
        figure.text(*at, line, font=small, va="top", color="#1d2430", parse_math=False)


def font_families(text: str) -> list[str]:
    """Choose fonts for a text: matplotlib's default, and installed fonts for the characters that it lacks."""
    usual = FontProperties()
    families = list(usual.get_family())
    missing = {ord(character) for character in text if character.isprintable()} - _characters(findfont(usual))
    if missing:
        files = {entry.name: entry.fname for entry in fontManager.ttflist if entry.style == "normal"}
        # Some versions of matplotlib include a font that has a box for every character.
        files = {name: file for name, file in files.items() if not name.startswith("Last Resort")}
        covered = {name: missing & _characters(file) for name, file in files.items()}
        for name in sorted(covered, key=lambda name: len(covered[name]), reverse=True):
            if covered[name] & missing:
                families.append(name)
                missing -= covered[name]
    if missing:
        logger.warning(
            "no installed font has the characters %s, which the picture shows as boxes; install a font that has them, "
            "such as Noto Sans CJK for Chinese, Japanese and Korean.",
            " ".join(map(chr, sorted(missing))),
        )
    return families


def _characters(file: str) -> set[int]:
    """Return the characters of a font; an empty set if it is not scalable."""
    try:
        font = get_font(file)
    except (RuntimeError, OSError):
        return set()
    return set(font.get_charmap()) if font.scalable else set()


def wrap(text: str, width: float, measure: Callable[[str], float]) -> list[str]:
    """Break a text into lines, between words if possible.

    Args:
        text: The text; a run of white space counts as one space.
        width: Maximum width of a line.
        measure: Function that returns the width of a text.
    """
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if measure(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        # Only a word longer than a line is broken, as in languages that are written without spaces.
        for character in word:
            if lines[-1] and measure(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines

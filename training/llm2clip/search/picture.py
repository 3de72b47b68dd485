"""Search results as one picture: thumbnails below each query."""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

from llm2clip.search.results import Found, Thumbnails

logger = logging.getLogger(__name__)

WIDTH = 1000
DPI = 100
LINE, SPACE, LABEL, GAP, MARGIN = 26, 14, 26, 14, 24
TITLE_SIZE = 14
MOST_IN_A_ROW = 8


def draw_picture(path: Path, found: list[Found], thumbnails: Thumbnails) -> None:
    """Draw a PNG 1000 pixels wide, with rows of at most eight results below each query.

    Characters that the usual font lacks come from other installed fonts; what none of them has is logged.

    Args:
        path: The file.
        found: Queries and their results.
        thumbnails: The images of the results.
    """
    titles = [each.query.title if each.query.image is not None else f"“{each.query.title}”" for each in found]
    font = FontProperties(family=font_families("".join(titles)), size=TITLE_SIZE)
    wrapped = [wrap(title, WIDTH - 2 * MARGIN, _measure(font)) for title in titles]
    most = max(len(each.images) for each in found)
    rows = math.ceil(most / MOST_IN_A_ROW)
    columns = math.ceil(most / rows)
    side = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns
    blocks = [len(lines) * LINE + SPACE + rows * (side + LABEL) for lines in wrapped]
    height = 2 * MARGIN + sum(blocks) + (len(found) - 1) * GAP
    figure = Figure((WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    top = height - MARGIN
    for each, lines, block in zip(found, wrapped, blocks, strict=True):
        for number, line in enumerate(lines):
            at = (MARGIN / WIDTH, (top - 8 - number * LINE) / height)
            figure.text(*at, line, font=font, va="top", color="#1d2430", parse_math=False)
        first = top - len(lines) * LINE - SPACE
        for number, image in enumerate(each.images):
            row, column = divmod(number, columns)
            left, bottom = MARGIN + column * (side + GAP), first - row * (side + LABEL) - side
            frame = figure.add_axes((left / WIDTH, bottom / height, side / WIDTH, side / height), xticks=[], yticks=[])
            frame.spines[:].set_color("#dde2ea")
            pixels = thumbnails.of(image, 2 * round(side))
            if pixels is not None:
                frame.imshow(pixels, interpolation="lanczos", aspect="equal")
                frame.set_adjustable("datalim")
                frame.set_anchor("C")
            frame.set_xlabel(f"{image.score:.2f}", fontsize=10, color="#5a6678", labelpad=4)
        top -= block + GAP
    file = io.BytesIO()
    with warnings.catch_warnings():
        # It is logged, once and by name.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="png", dpi=DPI)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.getvalue())


def font_families(text: str) -> list[str]:
    """The fonts to draw a text with: matplotlib's usual one, and installed ones for the characters that it lacks."""
    usual = FontProperties()
    families = list(usual.get_family())
    missing = {ord(character) for character in text if character.isprintable()} - _characters(findfont(usual))
    if missing:
        files = {entry.name: entry.fname for entry in fontManager.ttflist if entry.style == "normal"}
        # Some versions of matplotlib bring a font that has a box for everything.
        files = {name: file for name, file in files.items() if not name.startswith("Last Resort")}
        covered = {name: missing & _characters(file) for name, file in files.items()}
        for name in sorted(covered, key=lambda name: len(covered[name]), reverse=True):
            if covered[name] & missing:
                families.append(name)
                missing -= covered[name]
    if missing:
        logger.warning(
            "no installed font has the characters %s, which the picture shows as boxes; install one that does, as "
            "Noto Sans CJK does for Chinese, Japanese and Korean.",
            " ".join(map(chr, sorted(missing))),
        )
    return families


def _characters(file: str) -> set[int]:
    """The characters of a font; none where it is no scalable one."""
    try:
        font = get_font(file)
    except (RuntimeError, OSError):
        return set()
    return set(font.get_charmap()) if font.scalable else set()


def _measure(font: FontProperties) -> Callable[[str], float]:
    renderer = RendererAgg(WIDTH, LINE, DPI)

    def width(text: str) -> float:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            return renderer.get_text_width_height_descent(text, font, ismath=False)[0]

    return width


def wrap(text: str, width: float, measure: Callable[[str], float]) -> list[str]:
    """Break a text into lines, between words where that is possible.

    Args:
        text: The text; any white space in it is one space.
        width: The most that a line may measure.
        measure: Gives the width of a text.
    """
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if measure(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        # Broken only where it is longer than a line, as in a language that is written without spaces.
        for character in word:
            if lines[-1] and measure(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines

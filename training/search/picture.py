"""Search results as one picture: a row of thumbnails for each query."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from llm2clip_training.search.results import Found, Thumbnails

WIDTH = 1000
DPI = 100
HEADLINE, LABEL, GAP, MARGIN = 40, 26, 14, 24
MOST_IN_A_ROW = 8


def draw_picture(path: Path, found: list[Found], thumbnails: Thumbnails) -> None:
    """Draw a PNG 1000 pixels wide; of each query at most the first eight results.

    Args:
        path: The file.
        found: Queries and their results.
        thumbnails: The images of the results.
    """
    columns = min(MOST_IN_A_ROW, max(len(each.images) for each in found))
    side = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns
    block = HEADLINE + side + LABEL
    height = 2 * MARGIN + len(found) * block + (len(found) - 1) * GAP
    figure = Figure((WIDTH / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    for number, each in enumerate(found):
        top = height - MARGIN - number * (block + GAP)
        title = each.query.title if each.query.image is not None else f"“{each.query.title}”"
        figure.text(
            MARGIN / WIDTH, (top - 8) / height, title, fontsize=14, va="top", color="#1d2430", parse_math=False
        )
        for column, image in enumerate(each.images[:columns]):
            left = MARGIN + column * (side + GAP)
            frame = figure.add_axes(
                (left / WIDTH, (top - HEADLINE - side) / height, side / WIDTH, side / height), xticks=[], yticks=[]
            )
            frame.spines[:].set_color("#dde2ea")
            pixels = thumbnails.of(image, 2 * round(side))
            if pixels is not None:
                frame.imshow(pixels, interpolation="lanczos", aspect="equal")
                frame.set_adjustable("datalim")
                frame.set_anchor("C")
            frame.set_xlabel(f"{image.score:.2f}", fontsize=10, color="#5a6678", labelpad=4)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(file.getvalue())

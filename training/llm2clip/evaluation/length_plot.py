"""Recall by caption length as a figure."""

from __future__ import annotations

from pathlib import Path

from llm2clip.evaluation.results import Result
from llm2clip.utils.figures import panels, write_figure

SIDES = {"text_to_image": "text to image", "image_to_text": "image to text"}


def write_length_plot(path: Path, result: Result) -> bool:
    """Draw the recalls of a result over the length of captions, if it has captions of several lengths.

    Args:
        path: PNG file.

    Returns:
        Whether there was anything to draw.
    """
    buckets = result.groups.get("length", {})
    if len(buckets) < 2:
        return False
    names = [name for name in result.scores if name in next(iter(buckets.values()))]
    sides = [side for side in SIDES if any(name.startswith(side) for name in names)]
    figure, axes = panels(len(sides))
    ticks = [f"{bucket}\n({group['texts']:,.0f})" for bucket, group in buckets.items()]
    for side, axis in zip(sides, axes, strict=True):
        for name in names:
            if name.startswith(side):
                values = [100 * group[name] for group in buckets.values()]
                axis.plot(range(len(ticks)), values, marker=".", label=name.removeprefix(f"{side}_"))
        axis.set(title=f"{result.title}: {SIDES[side]}", xlabel="tokens (captions)", ylabel="%", ylim=(0, 100))
        axis.set_xticks(range(len(ticks)), ticks, fontsize="small")
        axis.legend(fontsize="small")
    figure.suptitle(result.model["given"], fontsize="small")
    write_figure(path, figure)
    return True

"""The results of the quickstart as tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from llm2clip.utils.tables import RECALLS, print_table, recalls_in_percent

CAPTION_SETS = {"lemma_to_gloss": "lemma → gloss", "name_to_keywords": "name → keywords"}
TITLES = {
    "caption": "Caption retrieval, R@1 / 5 / 10 in %",
    "image": "Image retrieval on unseen concepts, R@1 / 5 / 10 in %",
    "transfer": "Trained with and without {}, text → image, R@1 / 5 / 10 in %",
}
# Percentage points of R@10 within which two arms count as equal; seeds of one arm differ by as much.
EQUAL = 2.0
ONE_RUN = "This is one run of each; the profile full has three."
CONCLUSIONS = {
    (True, True): "Here stage 1 buys both a better fit of the trained domains and transfer to another one.",
    (True, False): "Here stage 1 buys a better fit of the trained domains, and no transfer to another one.",
    (False, True): "Here stage 1 buys transfer to another domain, and no better fit of the trained ones.",
    (False, False): "Here stage 1 buys neither a better fit of the trained domains nor transfer to another one.",
}

Table = tuple[list[str], list[list[str]]]


def print_tables(results: dict[str, Any]) -> None:
    """Print the content of `results.json`, results with the number of queries and candidates."""
    console = Console()
    console.print()
    for title, table in all_tables(results):
        print_table(console, title, *table)
    for sentence in results["reading"]:
        console.print(sentence, highlight=False)
    settings, machine = results["settings"], results["machine"]
    # Its first sentence, up to the remark in brackets; results.json has the whole.
    console.print(f"protocol {results['protocol']['queries'].partition(' (')[0]}", style="dim", highlight=False)
    console.print(
        f"profile {settings['profile']}, seed {settings['seed']}; LLM {settings['llm']}; vision tower "
        f"{settings['vision_model']}; {machine['threads']} threads of {machine['processor']}",
        style="dim",
        highlight=False,
    )
    reused = ", ".join(results["reused_steps"])
    if reused:
        console.print(f"reused from an earlier run: {reused}", style="dim", highlight=False)
    folder = Path(results["model"]).parent
    console.print(
        f"\n{folder / 'report.html'}  curves, queries and pictures\n{folder / 'results.json'}  every number\n"
        f"{results['model']}  the model with {results['best_text_encoder']}: "
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        highlight=False,
        soft_wrap=True,
    )


def all_tables(results: dict[str, Any]) -> list[tuple[str, Table]]:
    """Return the titles of the tables, and their column titles and rows."""
    tables = [
        (TITLES["caption"], caption_table(results["caption_retrieval"])),
        (TITLES["image"], image_table(results["image_retrieval"], results["text_encoders"])),
    ]
    if results["transfer"]:
        held_out = results["settings"]["held_out_domain"]
        tables.append((TITLES["transfer"].format(held_out), transfer_table(results["transfer"], held_out)))
    return tables


def caption_table(rows: dict[str, Any]) -> Table:
    """Return the table of caption retrieval."""
    sizes = next(iter(rows.values()))
    names = [name for name in CAPTION_SETS if name in sizes]
    titles = [
        f"{CAPTION_SETS[name]}\n{sizes[name]['num_queries']} queries, {sizes[name]['num_targets']} targets"
        for name in names
    ]
    return ["text encoder", *titles], [
        [row, *(recalls_in_percent(sets[name]) for name in names)] for row, sets in rows.items()
    ]


def image_table(rows: dict[str, Any], arms: Sequence[str]) -> Table:
    """Return the table of image retrieval; the lines of one text encoder do not repeat its name."""
    return ["text encoder", "text → image", "image → text", "captions\n× images"], [
        [
            _label(row, arms),
            *(_recalls(metrics, way) for way in ("text_to_image_", "image_to_text_")),
            _size(metrics),
        ]
        for row, metrics in rows.items()
    ]


def transfer_table(rows: dict[str, Any], held_out: str) -> Table:
    """Return the table of both trainings, side by side."""
    first = next(iter(rows.values()))
    titles = [f"all domains\n{_size(first['in_domain'])}", f"without, tested on it\n{_size(first['transfer'])}"]
    return ["text encoder", *titles], [
        [row, *(_recalls(metrics[part], "text_to_image_") for part in ("in_domain", "transfer"))]
        for row, metrics in rows.items()
    ]


def reading(rows: dict[str, Any], base: str, tuned: str) -> list[str]:
    """Say in words what stage 1 changes, from the numbers of the transfer table.

    A conclusion needs several runs: two with the same seed, whose processors round differently, have differed by 7
    points of R@10.

    Args:
        rows: The lines of the table.
        base, tuned: The lines that are compared.
    """
    parts, better, several = [], [], "std" in rows[tuned]["in_domain"]
    for part, place in (("in_domain", "on the trained domains"), ("transfer", "on the domain it was trained without")):
        before, after = (100 * rows[row][part]["text_to_image_recall@10"] for row in (base, tuned))
        difference = after - before
        word = "better" if difference > EQUAL else "worse" if difference < -EQUAL else "about equal"
        parts.append(f"{after:.1f} after {before:.1f} {place}" + (f" ({word})" if several else ""))
        better.append(word == "better")
    end = CONCLUSIONS[better[0], better[1]] if several else ONE_RUN
    return [f"Stage 1 changes R@10, text → image, compared with {base}: {' and '.join(parts)}. {end}"]


def _label(row: str, arms: Sequence[str]) -> str:
    for arm in arms:
        row = row.replace(f"{arm} +", "  +").removesuffix(f", {arm}")
    return row


def _size(metrics: dict[str, Any]) -> str:
    return f"{metrics['num_texts']} × {metrics['num_images']}"


def _recalls(metrics: dict[str, Any], prefix: str) -> str:
    """Format recalls in percent, those of several seeds with their standard deviations."""
    if "std" not in metrics:
        return recalls_in_percent(metrics, prefix)
    keys = [prefix + recall for recall in RECALLS]
    return " / ".join(f"{100 * metrics[key]:.1f}±{100 * metrics['std'][key]:.1f}" for key in keys)

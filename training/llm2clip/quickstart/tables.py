"""The results of the quickstart as tables on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from llm2clip.utils.tables import print_table, recalls_in_percent

CAPTION_SETS = {"lemma_to_gloss": "lemma → gloss", "name_to_keywords": "name → keywords"}


def print_tables(results: dict[str, Any]) -> None:
    """Print the content of `results.json`, results with the number of queries and candidates."""
    console = Console()
    console.print()
    print_table(console, "Caption retrieval, R@1 / 5 / 10 in %", *caption_table(results["caption_retrieval"]))
    title = "Image retrieval on unseen concepts, R@1 / 5 / 10 in %"
    print_table(console, title, *image_table(results["image_retrieval"]))
    settings, machine = results["settings"], results["machine"]
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
        f"{results['model']}  the model: AutoModel.from_pretrained(folder, trust_remote_code=True)",
        highlight=False,
        soft_wrap=True,
    )


def caption_table(rows: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the column titles and the rows of the table of caption retrieval."""
    sizes = next(iter(rows.values()))
    names = [name for name in CAPTION_SETS if name in sizes]
    titles = [
        f"{CAPTION_SETS[name]}\n{sizes[name]['num_queries']} queries, {sizes[name]['num_targets']} targets"
        for name in names
    ]
    return ["text encoder", *titles], [
        [row, *(recalls_in_percent(sets[name]) for name in names)] for row, sets in rows.items()
    ]


def image_table(rows: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the column titles and the rows of the table of image retrieval."""
    directions = ("text_to_image_", "image_to_text_")
    return ["model", "text → image", "image → text", "captions\n× images"], [
        [
            row,
            *(recalls_in_percent(metrics, way) for way in directions),
            f"{metrics['num_texts']} × {metrics['num_images']}",
        ]
        for row, metrics in rows.items()
    ]

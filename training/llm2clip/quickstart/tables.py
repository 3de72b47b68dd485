"""The results of the quickstart as tables on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CAPTION_SETS = {"lemma_to_gloss": "lemma → gloss", "name_to_keywords": "name → keywords"}
RECALLS = ("recall@1", "recall@5", "recall@10")


def print_tables(results: dict[str, Any]) -> None:
    """Print the results of a run, each with the number of queries and candidates that it was measured on.

    Args:
        results: Content of `results.json`.
    """
    console = Console()
    console.print()
    console.print(_caption_table(results["caption_retrieval"]))
    console.print(_image_table(results["image_retrieval"]))
    settings = results["settings"]
    machine = results["machine"]
    console.print(
        f"profile {settings['profile']}, seed {settings['seed']}; LLM {settings['llm']}; vision tower "
        f"{settings['vision_model']}; {machine['threads']} threads of {machine['processor']}",
        style="dim",
        highlight=False,
    )
    reused = results["reused_steps"]
    if reused:
        console.print(f"reused from an earlier run: {', '.join(reused)}", style="dim", highlight=False)
    folder = Path(results["model"]).parent
    console.print(
        f"\n{folder / 'report.html'}  curves, queries and pictures\n{folder / 'results.json'}  every number\n"
        f"{results['model']}  the model: AutoModel.from_pretrained(folder, trust_remote_code=True)",
        highlight=False,
        soft_wrap=True,
    )


def _caption_table(rows: dict[str, Any]) -> Table:
    table = Table(title="Caption retrieval, R@1 / 5 / 10 in %", title_justify="left")
    table.add_column("text encoder")
    for name, title in CAPTION_SETS.items():
        counts = next(iter(rows.values())).get(name)
        if counts:
            table.add_column(
                f"{title}\n{counts['num_queries']} queries, {counts['num_targets']} targets", justify="right"
            )
    for row, sets in rows.items():
        table.add_row(row, *[percent(sets[name], "") for name in CAPTION_SETS if name in sets])
    return table


def _image_table(rows: dict[str, Any]) -> Table:
    table = Table(title="Image retrieval on unseen concepts, R@1 / 5 / 10 in %", title_justify="left")
    for column in ("model", "text → image", "image → text", "captions\n× images"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row, metrics in rows.items():
        table.add_row(
            row,
            percent(metrics, "text_to_image_"),
            percent(metrics, "image_to_text_"),
            f"{metrics['num_texts']} × {metrics['num_images']}",
        )
    return table


def percent(metrics: dict[str, Any], prefix: str) -> str:
    """Format the recalls of some metrics in percent, such as `12.3 / 45.6 / 78.9`."""
    return " / ".join(f"{100 * metrics[prefix + recall]:.1f}" for recall in RECALLS)

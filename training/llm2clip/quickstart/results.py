"""The results of the quickstart: the content of `results.json`, its tables and sentences."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llm2clip.command_line.tables import RECALLS, print_table
from llm2clip.quickstart.data import LANGUAGES, QUERY, SHOWN_LANGUAGES, QuickstartData

VERSIONS = ("torch", "transformers", "datasets", "peft", "tokenizers", "numpy")
AVERAGED = ("recall", "mean_rank", "median_rank")
PROTOCOL = {
    "queries": "distinct: equal captions are one query. Every image whose caption equals it, apart from case, is "
    "right, as in `llm2clip evaluate` of your own data. The strict rule of published benchmarks is `rows`.",
    "in_domain": "Every text encoder is aligned with the frozen vision tower on the same stored features, with equal "
    "settings; what is chosen is chosen on the validation set.",
    "languages": "The mean is over German, French, Spanish, Chinese, Japanese and Hindi. LLMs are aligned on captions "
    "alone; an embedding model also on their translations, at a tenth of the weight.",
}

CAPTION_SETS = {"lemma_to_gloss": "lemma → gloss", "name_to_keywords": "name → keywords"}

Table = tuple[list[str], list[list[str]]]


def protocol(data: QuickstartData) -> dict[str, str]:
    """Say in sentences how the numbers were measured, and how many test captions are known from training."""
    seen, total = data.seen_captions()
    verb = "is also one" if seen == 1 else "are also captions"
    return {**PROTOCOL, "seen": f"Of {total:,} test captions, {seen:,} {verb} of training images."}


def image_rows(tests: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the lines of the table of image retrieval, with the metrics of each.

    Args:
        tests: Of the title of each text encoder, the metrics of each kind of queries.
    """
    rows = {}
    for title, test in tests.items():
        rows[title] = test[QUERY]
        languages = [name for name in LANGUAGES.values() if name in test]
        rows |= {f"  {name}, {title}": test[name] for name in languages if name in SHOWN_LANGUAGES}
        if len(languages) > len(SHOWN_LANGUAGES):
            rows[f"  mean of {len(languages)} languages, {title}"] = _mean([test[name] for name in languages])
    return rows


def _in_percent(metrics: Mapping[str, Any], prefix: str = "") -> str:
    """Format the recalls at 1, 5 and 10, such as `12.3 / 45.6 / 78.9`."""
    return " / ".join(f"{100 * metrics[prefix + recall]:.1f}" for recall in RECALLS)


def _mean(sets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average the metrics of several sets of queries; counts are those of the first."""
    keys = [key for key in sets[0] if any(part in key for part in AVERAGED)]
    return {**sets[0], **{key: statistics.fmean(metrics[key] for metrics in sets) for key in keys}}


def machine() -> dict[str, Any]:
    """Describe the processor and the versions of the packages."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)", info.read_text(), re.MULTILINE) if info.is_file() else None
    return {
        "processor": name[1].strip() if name else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in VERSIONS},
    }


def print_tables(results: dict[str, Any]) -> None:
    """Print the content of `results.json`, results with the number of queries and candidates."""
    console = Console(highlight=False)
    console.print()
    for title, table in all_tables(results):
        print_table(console, title, *table)
    settings, machine = results["settings"], results["machine"]
    # Its first sentence, up to the remark in brackets; results.json has the whole.
    console.print(f"protocol {results['protocol']['queries'].partition(' (')[0]}", style="dim")
    console.print(
        f"profile {settings['profile']}, seed {settings['seed']}; LLM {settings['llm']}; vision tower "
        f"{settings['vision_model']}; {machine['threads']} threads of {machine['processor']}",
        style="dim",
    )
    if typed := results["typed_queries"]:
        console.print(
            f"typed queries of the model in {results['model']}: the first picture is right for {typed['first']} of "
            f"{typed['queries']}, one of the first {typed['shown']} for {typed['found']}"
        )
    folder = Path(results["model"]).parent
    console.print(
        f"\n{folder / 'report.html'}  queries and their pictures\n{folder / 'results.json'}  every number\n"
        f"{results['model']}  the model with {results['best_text_encoder']}: "
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        soft_wrap=True,
    )


def all_tables(results: dict[str, Any]) -> list[tuple[str, Table]]:
    """Return the titles of the tables, and their column titles and rows."""
    captions = results["caption_retrieval"]
    sizes = next(iter(captions.values()))
    sets = [name for name in CAPTION_SETS if name in sizes]
    columns = [
        f"{CAPTION_SETS[name]}\n{sizes[name]['num_queries']} queries, {sizes[name]['num_targets']} targets"
        for name in sets
    ]
    rows = [[row, *(_in_percent(metrics[name]) for name in sets)] for row, metrics in captions.items()]
    caption_table = ["text encoder", *columns], rows
    columns = ["text encoder", "text → image", "image → text", "captions\n× images"]
    rows = [
        [
            _label(row, results["text_encoders"]),
            *(_in_percent(metrics, way) for way in ("text_to_image_", "image_to_text_")),
            f"{metrics['num_texts']} × {metrics['num_images']}",
        ]
        for row, metrics in results["image_retrieval"].items()
    ]
    return [
        ("Caption retrieval, R@1 / 5 / 10 in %", caption_table),
        ("Image retrieval on unseen concepts, R@1 / 5 / 10 in %", (columns, rows)),
    ]


def _label(row: str, arms: Sequence[str]) -> str:
    """Shorten the title of a line, which does not repeat the name of its text encoder."""
    for arm in arms:
        row = row.removesuffix(f", {arm}")
    return row

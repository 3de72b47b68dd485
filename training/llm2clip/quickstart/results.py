"""The results of the quickstart: the content of `results.json`, its tables and sentences."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llm2clip.quickstart.config import Arm
from llm2clip.quickstart.data import LANGUAGES, QUERY, SHOWN_LANGUAGES, QuickstartData
from llm2clip.utils.tables import RECALLS, print_table, recalls_in_percent

VERSIONS = ("torch", "transformers", "datasets", "peft", "tokenizers", "numpy")
AVERAGED = ("recall", "mean_rank", "median_rank")
UNFROZEN = "+ {} trained"
# Of profiles that do it.
UNFROZEN_PROTOCOL = "The same model then trains vision layers, up to the best epoch on the validation set."
TRANSFER_PROTOCOL = (
    "Trained and validated without the rows of one domain, and tested on that domain's rows of the validation and "
    "test sets, which are never trained on. Stage 1 trains on pairs of texts of all training rows, among them names "
    "of other images of that domain."
)
SPREAD_PROTOCOL = "Values are means over the seeds, and `std` has the sample standard deviations."
PROTOCOL = {
    "queries": "distinct: equal captions are one query. Every image whose caption equals it, apart from case, is "
    "right, as in `llm2clip evaluate` of your own data. The strict rule of published benchmarks is `rows`.",
    "in_domain": "Every text encoder is aligned with the frozen vision tower on the same stored features, with equal "
    "settings; what is chosen is chosen on the validation set.",
    "languages": "The mean is over German, French, Spanish, Chinese, Japanese and Hindi; no image was trained with a "
    "caption in them.",
}

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


def protocol(data: QuickstartData, profile: dict[str, Any], transfer: bool) -> dict[str, str]:
    """Say in sentences how the numbers were measured, and how many test captions are known from training."""
    seen, total = data.seen_captions()
    verb = "is also one" if seen == 1 else "are also captions"
    return {
        **PROTOCOL,
        **({"unfrozen": UNFROZEN_PROTOCOL} if profile["unfrozen_seeds"] else {}),
        **({"transfer": TRANSFER_PROTOCOL} if transfer else {}),
        **({"spread": SPREAD_PROTOCOL} if profile["seeds"] > 1 else {}),
        "seen": f"Of {total:,} test captions, {seen:,} {verb} of training images.",
    }


def mean_metrics(sets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average the metrics of several sets of queries, or of several runs; counts are those of the first."""
    keys = [key for key in sets[0] if any(part in key for part in AVERAGED)]
    return {**sets[0], **{key: statistics.fmean(one[key] for one in sets) for key in keys}}


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average the metrics of runs that differ in their seed; of several, with standard deviations as `std`."""
    if len(runs) == 1:
        return dict(runs[0])
    keys = [key for key in runs[0] if any(part in key for part in AVERAGED)]
    spread = {key: statistics.stdev(run[key] for run in runs) for key in keys}
    return {**mean_metrics(runs), "runs": len(runs), "std": spread}


def runs_of(steps: dict[str, Any], kind: str, arm: Arm, part: str) -> list[dict[str, Any]]:
    """Return the results of a part of stage 2 with an arm, one for each seed."""
    names = [name for name in steps if re.fullmatch(rf"{kind}-{re.escape(arm.name)}(-\d+)?", name)]
    return [steps[name][part] for name in names if part in steps[name]]


def image_rows(steps: dict[str, Any], arms: Sequence[Arm], layers: str) -> dict[str, Any]:
    """Return the lines of the table of image retrieval, with the metrics of each.

    Args:
        layers: What the second part trains, in words.
    """
    rows = {}
    for arm in arms:
        for part, title in (("frozen", arm.title), ("unfrozen", f"{arm.title} {UNFROZEN.format(layers)}")):
            runs = runs_of(steps, "stage2", arm, part)
            if runs:
                rows[title] = summarize([run["test"][QUERY] for run in runs])
        last = last_runs(steps, arm)
        languages = [name for name in LANGUAGES.values() if name in last[0]["test"]]
        for name in languages:
            if name in SHOWN_LANGUAGES:
                rows[f"  {name}, {arm.title}"] = summarize([run["test"][name] for run in last])
        if len(languages) > len(SHOWN_LANGUAGES):
            means = [mean_metrics([run["test"][name] for name in languages]) for run in last]
            rows[f"  mean of {len(languages)} languages, {arm.title}"] = summarize(means)
    return rows


def transfer_rows(steps: dict[str, Any], arms: Sequence[Arm]) -> dict[str, Any]:
    """Return the metrics of each arm in-domain and on the held-out domain; empty without a held-out domain."""
    rows = {}
    for arm in arms:
        held_out = runs_of(steps, "transfer", arm, "frozen")
        if held_out:
            rows[arm.title] = {
                "in_domain": summarize([run["test"][QUERY] for run in runs_of(steps, "stage2", arm, "frozen")]),
                "transfer": summarize([run["test"][QUERY] for run in held_out]),
            }
    return rows


def last_runs(steps: dict[str, Any], arm: Arm) -> list[dict[str, Any]]:
    """Return the results of the last part of stage 2 with an arm, of the runs that have it."""
    return runs_of(steps, "stage2", arm, "unfrozen") or runs_of(steps, "stage2", arm, "frozen")


def best_arm(steps: dict[str, Any], arms: Sequence[Arm]) -> Arm:
    """Choose the candidate whose model (of the first seed) is best on the validation set after its last part."""
    candidates = [arm for arm in arms if arm.is_candidate]
    return max(candidates, key=lambda arm: last_runs(steps, arm)[0]["validation"])


def machine() -> dict[str, Any]:
    """Describe the processor and the versions of the packages."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)", info.read_text(), re.MULTILINE) if info.is_file() else None
    return {
        "processor": found[1].strip() if found else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in VERSIONS},
    }


def print_tables(results: dict[str, Any]) -> None:
    """Print the content of `results.json`, results with the number of queries and candidates."""
    console = Console(highlight=False)
    console.print()
    for title, table in all_tables(results):
        print_table(console, title, *table)
    for sentence in results["reading"]:
        console.print(sentence)
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
    if reused := ", ".join(results["reused_steps"]):
        console.print(f"reused from an earlier run: {reused}", style="dim")
    folder = Path(results["model"]).parent
    console.print(
        f"\n{folder / 'report.html'}  curves, queries and pictures\n{folder / 'results.json'}  every number\n"
        f"{results['model']}  the model with {results['best_text_encoder']}: "
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        soft_wrap=True,
    )


def all_tables(results: dict[str, Any]) -> list[tuple[str, Table]]:
    """Return the titles of the tables, and their column titles and rows."""
    captions, transfer = results["caption_retrieval"], results["transfer"]
    sizes = next(iter(captions.values()))
    sets = [name for name in CAPTION_SETS if name in sizes]
    columns = [
        f"{CAPTION_SETS[name]}\n{sizes[name]['num_queries']} queries, {sizes[name]['num_targets']} targets"
        for name in sets
    ]
    rows = [[row, *(recalls_in_percent(found[name]) for name in sets)] for row, found in captions.items()]
    tables = [(TITLES["caption"], (["text encoder", *columns], rows))]
    columns = ["text encoder", "text → image", "image → text", "captions\n× images"]
    rows = [
        [
            _label(row, results["text_encoders"]),
            *(_recalls(metrics, way) for way in ("text_to_image_", "image_to_text_")),
            _size(metrics),
        ]
        for row, metrics in results["image_retrieval"].items()
    ]
    tables.append((TITLES["image"], (columns, rows)))
    if transfer:
        first, parts = next(iter(transfer.values())), ("in_domain", "transfer")
        titles = ("all domains", "without, tested on it")
        columns = [f"{title}\n{_size(first[part])}" for title, part in zip(titles, parts, strict=True)]
        rows = [[row, *(_recalls(found[part], "text_to_image_") for part in parts)] for row, found in transfer.items()]
        title = TITLES["transfer"].format(results["settings"]["held_out_domain"])
        tables.append((title, (["text encoder", *columns], rows)))
    return tables


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
    """Shorten the title of a line, which does not repeat the name of its text encoder."""
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

"""The content of `results.json`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llm2clip.quickstart.arms import Arm
from llm2clip.quickstart.data import LANGUAGES, QUERY, QuickstartData

VERSIONS = ("torch", "transformers", "datasets", "peft", "tokenizers", "numpy")
AVERAGED = ("recall", "mean_rank", "median_rank")
UNFROZEN = "+ {} trained"
PROTOCOL = {
    "queries": "distinct: equal captions are one query, which is right for every image that has it (texts compare "
    "without regard to case), as in `llm2clip evaluate --data`. The strict rule of published benchmarks is `rows`.",
    "in_domain": "Every text encoder: projection and adapter are trained on stored features with frozen towers and "
    "equal settings, up to the epoch with the best R@10 (text to image) on the validation set.",
    "unfrozen": "In the profile full, the same model then trains vision layers, again up to the best epoch.",
    "transfer": "Trained and validated without the rows of one domain, and tested on that domain's rows of the "
    "validation and test sets, which are never trained on. Stage 1 trains on pairs of texts of all training rows, "
    "among them names of other images of that domain.",
    "languages": "The mean is over the languages of the table; no image was trained with a caption in them.",
    "spread": "With several seeds, values are means, and `std` has the sample standard deviations.",
}


def protocol(data: QuickstartData) -> dict[str, str]:
    """Say in sentences how the numbers were measured, and how many test captions are known from training."""
    seen, total = data.seen_captions()
    verb = "is also one" if seen == 1 else "are also captions"
    return {**PROTOCOL, "seen": f"Of {total:,} test captions, {seen:,} {verb} of training images."}


def summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average the metrics of runs that differ in their seed; of several, with standard deviations as `std`."""
    if len(runs) == 1:
        return dict(runs[0])
    keys = [key for key in runs[0] if any(part in key for part in AVERAGED)]
    means = {key: statistics.fmean(run[key] for run in runs) for key in keys}
    spread = {key: statistics.stdev(run[key] for run in runs) for key in keys}
    return {**runs[0], **means, "runs": len(runs), "std": spread}


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
        if arm.kind == "ready":
            rows |= {f"  {name}": summarize([run["test"][name] for run in last]) for name in languages}
        if languages:
            means = [mean_metrics([run["test"][name] for name in languages]) for run in last]
            rows[f"  mean of {len(languages)} languages, {arm.title}"] = summarize(means)
    return rows


def mean_metrics(sets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Average the metrics of several sets of queries; counts are those of the first."""
    keys = [key for key in sets[0] if any(part in key for part in AVERAGED)]
    return {**sets[0], **{key: statistics.fmean(one[key] for one in sets) for key in keys}}


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


def read_history(folder: Path) -> list[dict[str, float]]:
    """Read the values that the Trainer logged during a run."""
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def machine() -> dict[str, Any]:
    """Describe the processor and the versions of the packages."""
    return {
        "processor": _processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in VERSIONS},
    }


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()

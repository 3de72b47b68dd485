"""The steps of stage 2 in the quickstart: frozen towers for every text encoder, then vision layers if so set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import AutoProcessor

from llm2clip.data import CaptionSource
from llm2clip.evaluation import ImageTextRetrieval, retrieval_metrics
from llm2clip.quickstart.config import Arm
from llm2clip.quickstart.data import QUERY
from llm2clip.quickstart.ledger import Step
from llm2clip.quickstart.results import read_history
from llm2clip.quickstart.run_context import RunContext
from llm2clip.quickstart.text_steps import remove_checkpoints
from llm2clip.store import EmbeddingCache
from llm2clip.trainers import run_stage2
from llm2clip.trainers.freezing import first_part, open_features, warm_start_result
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.processes import process_state
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPModel

# The model at the end is the best by this on the validation set.
BEST_BY = "eval_validation_text_to_image_recall@10"
# What a measured model without a domain is remembered by.
RECORDS = ("settings.json", "trainer_state.json", "README.md", "training_curves.png")


@dataclass(frozen=True)
class Images:
    """What a run trains on, chooses by and is tested on."""

    train: CaptionSource
    validation: CaptionSource
    test: Mapping[str, CaptionSource]


def image_steps(run: RunContext) -> list[Step]:
    """List the steps that align the towers of a run, with each text encoder, and measure the results."""
    data, numbers = run.data, range(run.profile["seeds"])
    settings = {**data.settings(), "stage2": run.profile["stage2"]}
    features = partial(_features, run)
    steps = [Step("features", "Vision features of all images", settings, features, (f"embed-{run.arms[0].name}",))]
    settings = {**settings, "frozen": run.profile["frozen"]}
    for arm in run.arms:
        for number in numbers:
            both = arm.is_candidate and number < run.profile["unfrozen_seeds"]
            own = {**settings, "seed": run.config.seed + number}
            own |= {"unfrozen": run.profile["unfrozen"]} if both else {}
            name, title = step_name("stage2", arm, number), f"Stage 2: {arm.title}{_seed(own, number)}"
            work = partial(_align, run, arm, number, both)
            steps.append(Step(name, title, own, work, (f"embed-{arm.name}",), run.folder / name))
    if not run.profile["transfer"] or run.domains.missing():
        return steps
    own = {**data.settings(), "column": run.domains.column, "held_out": run.domains.held_out}
    write, folder = lambda resume: dict(run.domains.write()), run.domains.folder
    steps.append(Step("transfer-data", "Data without a domain", own, write, (), folder))
    for arm in run.arms:
        for number in numbers:
            own = {**settings, "seed": run.config.seed + number}
            name = step_name("transfer", arm, number)
            title = f"Without {run.domains.held_out}: {arm.title}{_seed(own, number)}"
            work = partial(_transfer, run, arm, number)
            steps.append(Step(name, title, own, work, (f"embed-{arm.name}", "transfer-data"), run.folder / name))
    return steps


def step_name(kind: str, arm: Arm, number: int) -> str:
    """Name a run of stage 2, its step and its folder; `number` counts the seeds."""
    return f"{kind}-{arm.name}" + (f"-{number + 1}" if number else "")


def _seed(settings: dict[str, Any], number: int) -> str:
    return f", seed {settings['seed']}" if number else ""


def _weighted(run: RunContext, source: CaptionSource) -> CaptionSource:
    weights = run.profile["stage2"].get("caption_weights")
    if weights is not None and len(weights) == len(source.caption_columns):
        source.caption_weights = weights
    return source


def _all_images(run: RunContext) -> Images:
    data = run.data
    train = _weighted(run, data.source(data.train, data.caption_columns))
    return Images(train, data.source(data.validation, [data.query_column]), {QUERY: data.test_source()})


def _config(run: RunContext, arm: Arm, number: int, folder: Path, images: Images, both: bool) -> Stage2Recipe:
    """Build the settings of a run; those of the part with frozen towers do not depend on `both`."""
    recipe = {**run.profile["stage2"], **(run.profile["unfrozen"] if both else run.profile["frozen"])}
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
        "report_to": "none",
    }
    recipe |= {"warm_start": run.profile["frozen"]} if both else {"freeze_vision": "all"}
    if both and recipe.get("freeze_vision_layers"):
        recipe.setdefault("frozen_states_dir", str(run.cache("vision_states")))
    return build_config(Stage2Recipe, recipe, f"stage2 of the profile {run.config.profile}")


def _features(run: RunContext, resume: bool) -> dict[str, Any]:
    """Store the features of all images, which every run reads."""
    config = _config(run, run.arms[0], 0, run.folder / "features", _all_images(run), both=False)
    model, processor = run_stage2.load_model(config)
    model.vision_model.to(process_state().device)
    splits = dict.fromkeys((run.data.train, run.data.validation, run.data.test))
    sources = [run.data.source(split, [run.data.query_column]) for split in splits]
    sets = [ImageTextRetrieval(source, processor.image_processor) for source in sources]
    features = open_features(config, model, processor.image_processor, [one.images for one in sets])
    return {"images": len(features), "width": features.width}


def _align(run: RunContext, arm: Arm, number: int, both: bool, resume: bool) -> dict[str, Any]:
    """Train on all domains and measure the test set after each part."""
    folder = run.folder / step_name("stage2", arm, number)
    config = _config(run, arm, number, folder, _all_images(run), both)
    metrics = run_stage2.run(config, resume=resume)
    queries = {name: run.data.test_source(column) for name, column in run.data.queries(arm.kind).items()}
    if not both:
        found = {"frozen": _measure(run, config, arm, queries, metrics[BEST_BY], stored=True)}
    else:
        first, before = cast(Stage2Recipe, first_part(config)), metrics[f"warm_start_{BEST_BY}"]
        found = {
            "frozen": _measure(run, first, arm, queries, before, stored=True),
            "unfrozen": _measure(run, config, arm, queries, metrics[BEST_BY], stored=False),
        }
        found["frozen"]["history"] = (warm_start_result(config) or {})["history"]
        remove_checkpoints(Path(first.output_dir))
    remove_checkpoints(folder)
    return found


def _transfer(run: RunContext, arm: Arm, number: int, resume: bool) -> dict[str, Any]:
    """Train without a domain and measure it; only the records of the model are kept."""
    domains, data = run.domains, run.data
    folder = run.folder / step_name("transfer", arm, number)
    images = Images(
        _weighted(run, domains.source("train", data.caption_columns)),
        domains.source("validation", [data.query_column]),
        {QUERY: domains.source("test", [data.query_column])},
    )
    config = _config(run, arm, number, folder, images, both=False)
    metrics = run_stage2.run(config, resume=resume)
    found = {"frozen": _measure(run, config, arm, images.test, metrics[BEST_BY], stored=True)}
    remove_checkpoints(folder)
    for file in folder.iterdir():
        if file.is_file() and file.name not in RECORDS:
            file.unlink()
    return found


def _measure(
    run: RunContext,
    config: Stage2Recipe,
    arm: Arm,
    test: Mapping[str, CaptionSource],
    validation: float,
    stored: bool,
) -> dict[str, Any]:
    """Measure a model on test sets, which have the same images, and read how it was trained.

    Args:
        validation: What it reached on the validation set.
        stored: Embed the images from their stored features.
    """
    folder = Path(str(config.output_dir))
    model: Any = LLM2CLIPModel.from_pretrained(folder, text_model=False)
    model.to(process_state().device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    sets = {name: ImageTextRetrieval(source, processor.image_processor) for name, source in test.items()}
    first, embed = next(iter(sets.values())), EmbeddingCache.open(run.cache(arm.name)).lookup
    first.features = open_features(config, model, processor.image_processor, [first.images]) if stored else None
    images, rows = first.embed_images(model, show_progress_bar=True)
    with torch.no_grad():
        found = {
            name: retrieval_metrics(images, one.embed_captions(model, embed), one.matches(rows))
            for name, one in sets.items()
        }
    return {"test": found, "validation": validation, "history": read_history(folder)}


class FinalModel(NamedTuple):
    """The model at the end, and the test images as it embeds them.

    Attributes:
        model, processor: The model with its text encoder, and its processor.
        retrieval: The test set.
        image_embeds, rows: Unit embeddings of the readable images, and their row numbers.
    """

    model: Any
    processor: Any
    retrieval: ImageTextRetrieval
    image_embeds: Tensor
    rows: list[int]


def open_final(run: RunContext, arm: Arm, folder: Path) -> FinalModel:
    """Open the model at the end; with frozen towers, its images come from their stored features."""
    model: Any = LLM2CLIPModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    retrieval = ImageTextRetrieval(run.data.test_source(), processor.image_processor)
    if not run.profile["unfrozen_seeds"]:
        config = _config(run, arm, 0, run.folder / step_name("stage2", arm, 0), _all_images(run), both=False)
        retrieval.features = open_features(config, model, processor.image_processor, [retrieval.images])
    return FinalModel(model, processor, retrieval, *retrieval.embed_images(model))

"""The steps of stage 2 in the quickstart: frozen towers, aligned for every text encoder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from llm2clip.command_line.processes import process_state
from llm2clip.command_line.settings import build_config
from llm2clip.data import CaptionSource
from llm2clip.encoders.image_features import ImageFeatures, open_features
from llm2clip.encoders.stored import StoredEncoder
from llm2clip.evaluation.data import RetrievalData
from llm2clip.evaluation.protocols.retrieval import image_text_metrics
from llm2clip.evaluation.session import Session
from llm2clip.files.atomic import read_json
from llm2clip.quickstart.config import Arm
from llm2clip.quickstart.ledger import Step
from llm2clip.quickstart.run_context import RunContext
from llm2clip.quickstart.text_steps import has_checkpoint, remove_checkpoints
from llm2clip.store import EmbeddingCache
from llm2clip.trainers import run_align, run_stage2
from llm2clip.trainers.align_recipe import AlignRecipe
from llm2clip.trainers.parts import plan_parts
from llm2clip.trainers.stage2_config import Stage2Recipe
from modeling_llm2clip import LLM2CLIPModel

# The model at the end is the best by this on the validation set.
BEST_BY = "eval_validation_text_to_image_recall@10"


def image_steps(run: RunContext) -> list[Step]:
    """List the steps that align the towers of a run, with each text encoder, and measure the results."""
    settings = {**run.data.settings(), "stage2": run.profile["stage2"]}
    after, work = (f"embed-{run.arms[0].name}",), partial(_features, run)
    steps = [Step("features", "Vision features of all images", settings, work, after)]
    settings = {**settings, "seed": run.config.seed}
    for arm in run.arms:
        name, title, after = step_name(arm), f"Stage 2: {arm.title}", (f"embed-{arm.name}",)
        steps.append(Step(name, title, settings, partial(_align, run, arm), after, run.folder / name))
    return steps


def step_name(arm: Arm) -> str:
    """Name stage 2 of a text encoder: its step and its folder."""
    return f"stage2-{arm.name}"


def stage2_config(run: RunContext, arm: Arm) -> Stage2Recipe:
    """Build the settings of stage 2 with a text encoder."""
    data = run.data
    train = data.source(data.train, data.caption_columns)
    train.caption_weights = run.profile["stage2"].get("caption_weights")
    fixed = {
        "vision_model_name_or_path": run.weights["vision_model"],
        "freeze_vision": "all",
        "text_model_name_or_path": run.tower(arm),
        "embedding_cache": str(run.cache(arm.name)),
        "feature_cache": str(run.cache("features")),
        "output_dir": str(run.folder / step_name(arm)),
        "sources": [asdict(train)],
        "eval_sources": {"validation": asdict(data.source(data.validation, [data.query_column]))},
        "seed": run.config.seed,
        "resume_anyway": run.config.resume_anyway,
    }
    recipe = run.settings("stage2", fixed)
    recipe.pop("caption_weights", None)
    return build_config(Stage2Recipe, recipe, f"stage2 of the profile {run.config.profile}")


def _features(run: RunContext, resume: bool) -> dict[str, Any]:
    """Store the features of all images, which every run reads."""
    data = run.data
    part = plan_parts(stage2_config(run, run.arms[0]))[0]
    model, processor = run_align.open_model(part) if isinstance(part, AlignRecipe) else run_stage2.open_model(part)
    sources = [
        data.source(split, [data.query_column]) for split in dict.fromkeys((data.train, data.validation, data.test))
    ]
    tables = [RetrievalData.from_source(source).images for source in sources]
    features = _open_features(run, model, processor, tables)
    return {"images": len(features), "width": features.width}


def _open_features(run: RunContext, model: Any, processor: Any, images: list[Any]) -> ImageFeatures:
    """Open the features of images, after computing those that are not stored yet."""
    dtype = run.settings("stage2", {}).get("feature_dtype", "float32")
    return open_features(model, processor.image_processor, images, run.cache("features"), dtype=dtype)


def _align(run: RunContext, arm: Arm, resume: bool) -> dict[str, Any]:
    """Train, and measure the test set with the queries of the text encoder."""
    folder = run.folder / step_name(arm)
    metrics = run_stage2.run(stage2_config(run, arm), resume=resume and has_checkpoint(folder))
    columns = run.data.queries(arm.kind)
    test = _measure(run, arm, folder, {name: run.data.test_source(column) for name, column in columns.items()})
    remove_checkpoints(folder)
    for part in folder.glob("part[0-9]*"):
        shutil.rmtree(part)
    history = read_json(folder / "trainer_state.json")["log_history"]
    return {"test": test, "validation": metrics[BEST_BY], "history": history}


def stored_encoder(run: RunContext, arm: Arm, model: Any, processor: Any, images: Any) -> StoredEncoder:
    """Let a model of a text encoder read its captions' embeddings, and the images' features, from the run's caches."""
    features = _open_features(run, model, processor, [images])
    return StoredEncoder(model, processor, EmbeddingCache.open(run.cache(arm.name)).lookup, features)


def _measure(run: RunContext, arm: Arm, folder: Path, test: Mapping[str, CaptionSource]) -> dict[str, Any]:
    """Measure a model on test sets, which have the same images."""
    model: Any = LLM2CLIPModel.from_pretrained(folder, text_model=False)
    model.to(process_state().device).eval()
    sets = {name: RetrievalData.from_source(source) for name, source in test.items()}
    processor = AutoProcessor.from_pretrained(folder)
    encoder = stored_encoder(run, arm, model, processor, next(iter(sets.values())).images)
    session = Session(encoder, show_progress_bar=False)
    return {name: image_text_metrics(session, retrieval) for name, retrieval in sets.items()}

"""The steps of the quickstart before stage 2: weights, text encoders, stage 1 and the embedding of all captions."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from llm2clip.command_line.processes import process_state
from llm2clip.command_line.settings import build_config
from llm2clip.encoders import OurEncoder
from llm2clip.encoders.embed import EmbedConfig, embed_into_cache
from llm2clip.evaluation.metrics import caption_retrieval_metrics
from llm2clip.files.atomic import read_json
from llm2clip.models.towers import open_text_tower, save_text_tower
from llm2clip.quickstart.config import Arm
from llm2clip.quickstart.ledger import Step
from llm2clip.quickstart.run_context import RunContext
from llm2clip.quickstart.weights import weights_folder
from llm2clip.store import EmbeddingCache
from llm2clip.trainers import run_stage1
from llm2clip.trainers.stage1_config import Stage1Recipe
from modeling_llm2clip import LLM2CLIPTextConfig
from modeling_llm2clip.compatibility_llm2clip import make_readable_by_version_4

# Captions that an interrupted run loses at most.
SHARD = 1024


def text_steps(run: RunContext) -> list[Step]:
    """List the steps that make the text encoders of a run and their embeddings of all captions."""
    config = run.config
    weights = {name: getattr(config, name) for name in ("llm", "vision_model", "embedding_model")}
    steps = [Step("weights", "Weights of the towers", weights, partial(_weights, run))]
    if run.is_plain:
        prompt, folder = {"prompt": run.prompt()}, run.folder / "raw"
        steps.append(Step("raw", "The LLM as a text encoder", prompt, partial(_raw, run), ("weights",), folder))
        title, folder = "The LLM with causal attention", run.folder / "raw-causal"
        steps.append(Step("raw-causal", title, {}, partial(_causal, run), ("raw",), folder))
        settings = {**run.profile["stage1"], **run.data.settings(), "seed": config.seed}
        title, folder = "Stage 1: caption contrastive fine-tuning", run.folder / "stage1"
        steps.append(Step("stage1", title, settings, partial(_stage1, run), ("raw",), folder))
    for arm in run.arms:
        settings = {**run.data.settings(), "kind": arm.kind, "dtype": _dtype(run, arm)}
        title, work = f"Embedding captions: {arm.title}", partial(_embed, run, arm)
        steps.append(Step(f"embed-{arm.name}", title, settings, work, (arm.made_by,), run.cache(arm.name)))
    return steps


def _weights(run: RunContext, resume: bool) -> dict[str, Any]:
    towers = ["llm", "vision_model"]
    if run.is_plain and any(arm.kind == "ready" for arm in run.arms):
        towers.append("embedding_model")
    return {name: getattr(run.config, name) or str(weights_folder(name, run.folder / "weights")) for name in towers}


def _raw(run: RunContext, resume: bool) -> dict[str, Any]:
    # A prompt of the profile replaces that which the original code gives an LLM by its name.
    model, tokenizer = open_text_tower(run.weights["llm"], dtype="float32", **run.prompt())
    save_text_tower(model, tokenizer, run.folder / "raw")
    return {"parameters": model.num_parameters()}


def _causal(run: RunContext, resume: bool) -> dict[str, Any]:
    """Make a folder of the same weights, which take no space twice, and another config."""
    raw, folder = run.folder / "raw", run.folder / "raw-causal"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(raw, folder, copy_function=_link, ignore=shutil.ignore_patterns("config.json"))
    fields = LLM2CLIPTextConfig.from_pretrained(raw).to_dict()
    LLM2CLIPTextConfig(**{**fields, "bidirectional": False, "fingerprint": None}).save_pretrained(folder)
    make_readable_by_version_4(folder)
    return {}


def _stage1(run: RunContext, resume: bool) -> dict[str, Any]:
    folder = run.folder / "stage1"
    fixed = {
        "model_name_or_path": str(run.folder / "raw"),
        "output_dir": str(folder),
        "sources": [asdict(source) for source in run.data.pair_sources()],
        "seed": run.config.seed,
        "resume_anyway": run.config.resume_anyway,
    }
    recipe = {key: value for key, value in run.settings("stage1", fixed).items() if key not in run.prompt()}
    config = build_config(Stage1Recipe, recipe, f"stage1 of the profile {run.config.profile}")
    metrics = run_stage1.run(config, resume=resume and has_checkpoint(folder))
    remove_checkpoints(folder)
    return {"metrics": metrics, "history": read_json(folder / "trainer_state.json")["log_history"]}


def _embed(run: RunContext, arm: Arm, resume: bool) -> dict[str, Any]:
    """Embed the texts of an arm, and measure the retrieval between captions."""
    data, tower, folder = run.data, run.tower(arm), str(run.cache(arm.name))
    model: Any
    model, tokenizer = open_text_tower(tower, dtype=_dtype(run, arm))
    model.to(process_state().device).eval()
    texts, encoder = data.texts(arm.kind), OurEncoder(model, tokenizer)
    manifest = embed_into_cache(texts, encoder, folder, tower, EmbedConfig(shard_size=SHARD))
    lookup = EmbeddingCache.open(folder).lookup
    return {
        "num_captions": manifest.rows,
        "num_truncated": manifest.counts["truncated"],
        "caption_retrieval": {
            name: caption_retrieval_metrics(lookup(pairs.queries), lookup(pairs.targets), pairs.qrels)
            for name, pairs in data.caption_sets.items()
        },
    }


def _dtype(run: RunContext, arm: Arm) -> str:
    """Return the precision in which a text encoder embeds; the small embedding model is fast in any."""
    return run.profile["embed_dtype"] if arm.kind != "ready" else "float32"


def has_checkpoint(folder: Path) -> bool:
    """Tell whether a run can be continued; what one without checkpoints has left is deleted."""
    if any(folder.glob("checkpoint-*")):
        return True
    shutil.rmtree(folder, ignore_errors=True)
    return False


def remove_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a finished run, which only an interrupted one needs."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)

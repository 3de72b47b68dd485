"""The steps of stage 2 in the quickstart: frozen towers for every text encoder, then vision layers if so set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor
from transformers import AutoProcessor

from llm2clip.data import CaptionSource
from llm2clip.encoders.image_features import ImageFeatures
from llm2clip.encoders.stored import StoredEncoder
from llm2clip.evaluation.data import RetrievalData
from llm2clip.evaluation.protocols.retrieval import image_text_metrics
from llm2clip.evaluation.session import Session
from llm2clip.quickstart.config import Arm
from llm2clip.quickstart.data import QUERY, QuickstartData
from llm2clip.quickstart.domains import write_without_domain
from llm2clip.quickstart.ledger import Step
from llm2clip.quickstart.run_context import RunContext
from llm2clip.quickstart.text_steps import remove_checkpoints
from llm2clip.store import EmbeddingCache
from llm2clip.trainers import run_stage2
from llm2clip.trainers.freezing import first_part, open_features, warm_start_result
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.files import read_json
from llm2clip.utils.processes import process_state
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPModel

# The model at the end is the best by this on the validation set.
BEST_BY = "eval_validation_text_to_image_recall@10"
# What a measured model without a domain is remembered by.
RECORDS = ("settings.json", "trainer_state.json", "README.md", "training_curves.png")


def image_steps(run: RunContext) -> list[Step]:
    """List the steps that align the towers of a run, with each text encoder, and measure the results."""
    config, data = run.config, run.data.settings()
    settings = {**data, "stage2": run.profile["stage2"]}
    after = (f"embed-{run.arms[0].name}",)
    steps = [Step("features", "Vision features of all images", settings, partial(_features, run), after)]
    settings = {**settings, "frozen": run.profile["frozen"]}
    steps += _runs(run, "stage2", "Stage 2", settings)
    if run.transfer_data is not None:
        data = {**data, "column": config.domain_column, "held_out": config.held_out_domain}
        work, folder = partial(_transfer_data, run), run.folder / "transfer-data"
        steps.append(Step("transfer-data", "Data without a domain", data, work, (), folder))
        steps += _runs(run, "transfer", f"Without {config.held_out_domain}", settings)
    return steps


def _runs(run: RunContext, kind: str, title: str, settings: dict[str, Any]) -> list[Step]:
    steps, after = [], ("transfer-data",) if kind == "transfer" else ()
    for arm in run.arms:
        for number in range(run.profile["seeds"]):
            both = kind == "stage2" and arm.is_candidate and number < run.profile["unfrozen_seeds"]
            own = {**settings, "seed": run.config.seed + number}
            own |= {"unfrozen": run.profile["unfrozen"]} if both else {}
            name, seed = step_name(kind, arm, number), f", seed {own['seed']}" if number else ""
            work, before = partial(_align, run, kind, arm, number, both), (f"embed-{arm.name}", *after)
            steps.append(Step(name, f"{title}: {arm.title}{seed}", own, work, before, run.folder / name))
    return steps


def _transfer_data(run: RunContext, resume: bool) -> dict[str, Any]:
    config, folder = run.config, run.folder / "transfer-data"
    return dict(write_without_domain(run.data, config.domain_column, config.held_out_domain, folder))


def step_name(kind: str, arm: Arm, number: int) -> str:
    """Name a run of stage 2, its step and its folder; `number` counts the seeds."""
    return f"{kind}-{arm.name}" + (f"-{number + 1}" if number else "")


def _config(run: RunContext, data: QuickstartData, arm: Arm, number: int, folder: Path, both: bool) -> Stage2Recipe:
    """Build the settings of a run; those of the part with frozen towers do not depend on `both`."""
    recipe = {**run.profile["stage2"], **(run.profile["unfrozen"] if both else run.profile["frozen"])}
    train, weights = data.source(data.train, data.caption_columns), recipe.pop("caption_weights", None)
    if weights is not None and len(weights) == len(train.caption_columns):
        train.caption_weights = weights
    recipe |= {
        "vision_model_name_or_path": run.weights["vision_model"],
        "text_model_name_or_path": run.tower(arm),
        "embedding_cache": str(run.cache(arm.name)),
        "feature_cache": str(run.cache("features")),
        "output_dir": str(folder),
        "sources": [asdict(train)],
        "eval_sources": {"validation": asdict(data.source(data.validation, [data.query_column]))},
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
    data = run.data
    config = _config(run, data, run.arms[0], 0, run.folder / "features", both=False)
    model, processor = run_stage2.load_model(config)
    model.vision_model.to(process_state().device)
    sources = [
        data.source(split, [data.query_column]) for split in dict.fromkeys((data.train, data.validation, data.test))
    ]
    tables = [RetrievalData.from_source(source).images for source in sources]
    features = open_features(config, model, processor.image_processor, tables)
    return {"images": len(features), "width": features.width}


def _align(run: RunContext, kind: str, arm: Arm, number: int, both: bool, resume: bool) -> dict[str, Any]:
    """Train, and measure the test set after each part; without a domain, only the records of the model are kept."""
    folder, data, columns = run.folder / step_name(kind, arm, number), run.data, run.data.queries(arm.kind)
    if kind == "transfer":
        assert run.transfer_data is not None
        data, columns = run.transfer_data, {QUERY: data.query_column}
    config = _config(run, data, arm, number, folder, both)
    metrics = run_stage2.run(config, resume=resume)
    test = {name: data.test_source(column) for name, column in columns.items()}
    if not both:
        found = {"frozen": _measure(run, config, arm, test, metrics[BEST_BY], stored=True)}
    else:
        first, before = cast(Stage2Recipe, first_part(config)), metrics[f"warm_start_{BEST_BY}"]
        found = {
            "frozen": _measure(run, first, arm, test, before, stored=True),
            "unfrozen": _measure(run, config, arm, test, metrics[BEST_BY], stored=False),
        }
        found["frozen"]["history"] = (warm_start_result(config) or {})["history"]
        remove_checkpoints(Path(first.output_dir))
    remove_checkpoints(folder)
    if kind == "transfer":
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
    sets = {name: RetrievalData.from_source(source) for name, source in test.items()}
    features: ImageFeatures | None = None
    if stored:
        features = open_features(config, model, processor.image_processor, [next(iter(sets.values())).images])
    encoder = StoredEncoder(model, processor, EmbeddingCache.open(run.cache(arm.name)).lookup, features)
    session = Session(encoder, show_progress_bar=False)
    found = {name: image_text_metrics(session, one) for name, one in sets.items()}
    history = read_json(folder / "trainer_state.json")["log_history"]
    return {"test": found, "validation": validation, "history": history}


class FinalModel(NamedTuple):
    """The model at the end, and the test images as it embeds them.

    Attributes:
        model, processor: The model with its text encoder, and its processor.
        encoder: The model, with the embeddings of captions that are stored.
        retrieval: The test set.
        image_embeds, rows: Unit embeddings of the readable images, and their row numbers.
    """

    model: Any
    processor: Any
    encoder: StoredEncoder
    retrieval: RetrievalData
    image_embeds: Tensor
    rows: list[int]


def open_final(run: RunContext, arm: Arm, folder: Path) -> FinalModel:
    """Open the model at the end; with frozen towers, its images come from their stored features."""
    model: Any = LLM2CLIPModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    retrieval, features = RetrievalData.from_source(run.data.test_source()), None
    if not run.profile["unfrozen_seeds"]:
        config = _config(run, run.data, arm, 0, run.folder / step_name("stage2", arm, 0), both=False)
        features = open_features(config, model, processor.image_processor, [retrieval.images])
    encoder = StoredEncoder(model, processor, EmbeddingCache.open(run.cache(arm.name)).lookup, features)
    embeds = Session(encoder, on_error="skip", show_progress_bar=False).embed_images(retrieval.images)
    rows = (~embeds.isnan().any(dim=1)).nonzero()[:, 0]
    return FinalModel(model, processor, encoder, retrieval, embeds[rows], rows.tolist())

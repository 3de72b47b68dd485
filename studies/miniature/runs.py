"""Train and measure the arms of the tables, each of which is a YAML file in `tables/`."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from transformers import AutoImageProcessor, AutoProcessor

from llm2clip import CaptionSource, EmbeddingCache, LLM2CLIPModel, load_encoder
from llm2clip.data.pairs import PairSource
from llm2clip.encoders import Encoder
from llm2clip.encoders.image_features import open_features
from llm2clip.encoders.stored import StoredEncoder
from llm2clip.evaluation.data import CaptionPairData, RetrievalData
from llm2clip.evaluation.metrics import caption_retrieval_metrics
from llm2clip.evaluation.protocols.retrieval import image_text_metrics
from llm2clip.evaluation.session import Session
from llm2clip.files.atomic import write_json
from llm2clip.hub.merge import merge_models
from llm2clip.quickstart.config import has_fast_bfloat16
from llm2clip.recipes import load_recipe
from studies.miniature import kept_index
from studies.miniature.material import DATA, DESCRIPTIONS, HERE, NEGATIVES, Material, slug
from studies.miniature.scenes import PAGE
from studies.miniature.start import START_SETTINGS, open_cache, save_start

TABLES, EXAMPLES = HERE / "tables", DATA.parent
# Nine patches a side, of which 3 x 3 are a token: one for each of the nine places.
NINE_TOKENS = 126
RETRIEVAL, CAPTIONS, QUESTIONS, KEPT_INDEX = "retrieval", "captions", "questions", "kept index"
# In the folder of the study, or of a model whose tower has trained: what towers make of pictures.
FEATURES = "features"
# What an arm does with the models of others; see `Run.parents`.
ROLES = ("continues", "keeps", "first", "second", "index")
# The settings that all arms of a command have.
BASES = {"stage2": "frozen.yaml", "align": "closed_form.yaml"}


@dataclass(frozen=True)
class Run:
    """An arm of a table with a seed.

    Attributes:
        encoders: Names of one or two text encoders; none for the ViT as it is.
        settings: What it has besides those of `frozen.yaml`, or with `command: align` of `closed_form.yaml`; None
            leaves one of these out. Of an arm that keeps an index: how many `pairs` or `texts` its map is fitted to.
        kind: `retrieval`: stage 2, measured on pictures; `captions`: retrieval between captions, without training;
            `questions`: the answers of a multimodal LLM, through the tower of stage 2 or the ViT as it is; `kept
            index`: a map of the text encoder to the image vectors of another arm.
        data: `concepts` or `scenes`.
        captions: The caption columns of its training, and how often each is drawn.
        tests: Sets that it is measured on: a split of `concepts`, `_LANGUAGE` for captions in that; of `scenes` a
            column of descriptions, or of hard negatives.
        rows: Which texts of its encoders are stored: a key of `Material.stored_texts`.
        pictures: The split that it trains on.
        validation: The split that chooses the epoch.
        parents: Other arms, by what is made of their model: it is continued (`continues`), its space is kept
            (`keeps`), two are merged (`first`, `second`), or its image vectors get other queries (`index`).
        share: Of the second of two that are merged.
        is_kept: Whether its model stays, for other arms.
    """

    table: str
    arm: str
    seed: int
    encoders: tuple[str, ...]
    settings: Mapping[str, Any]
    kind: str
    data: str
    captions: Mapping[str, float]
    tests: tuple[str, ...]
    rows: str
    pictures: str
    validation: str
    parents: Mapping[str, Run]
    share: float | None
    is_kept: bool

    @property
    def name(self) -> str:
        """Name of its files: equal for arms of several tables that are the same run."""
        fields: list[Any] = [self.encoders, {**self.settings}, self.kind, self.data, {**self.captions}, self.tests]
        others = {role: parent.name for role, parent in self.parents.items()}
        fields.append([self.pictures, self.validation, others, self.share])
        if self.kind == QUESTIONS:
            fields.append(load_recipe(HERE / "multimodal.yaml"))
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        return f"{slug(' '.join(self.encoders) or self.arm)}-{digest[:8]}-{self.seed}"


def read_table(name: str) -> dict[str, Any]:
    """Read a table's file."""
    table: dict[str, Any] = yaml.safe_load((TABLES / f"{name}.yaml").read_text(encoding="utf-8"))
    return table


def runs_of(name: str) -> list[Run]:
    """List the runs of a table: all arms with the first seed, then with the next."""
    table = read_table(name)
    return [run for seed in range(table.get("seeds", 1)) for run in _arms_of(name, table, seed).values()]


def _arms_of(name: str, table: Mapping[str, Any], seed: int) -> dict[str, Run]:
    """Build the runs of a seed; an arm stands below those whose model it takes."""
    data, arms = table.get("data", "concepts"), table["arms"]
    taken = {parent for fields in arms.values() for role, parent in fields.items() if role in ROLES}
    runs: dict[str, Run] = {}
    for arm, fields in arms.items():
        encoders = fields.get("encoders", arm)
        runs[arm] = Run(
            table=name,
            arm=arm,
            seed=seed,
            encoders=tuple([encoders] if isinstance(encoders, str) else encoders),
            settings=settings_of(fields.get("settings", [])),
            kind=KEPT_INDEX if "index" in fields else table.get("kind", RETRIEVAL),
            data=data,
            captions=fields.get("captions", table.get("captions", {"caption": 1, "keywords": 1})),
            tests=tests_of(table),
            rows=fields.get("rows", table.get("rows", data)),
            pictures=fields.get("pictures", "train"),
            validation=fields.get("validation", "validation"),
            parents={role: runs[fields[role]] for role in ROLES if role in fields},
            share=fields.get("share"),
            is_kept=arm in taken,
        )
    return runs


def settings_of(given: str | dict[str, Any] | list[Any]) -> dict[str, Any]:
    """Resolve settings: a name in `settings.yaml`, settings as they are, or a list of both; the last one counts."""
    if isinstance(given, list):
        return {key: value for entry in given for key, value in settings_of(entry).items()}
    return given if isinstance(given, dict) else load_recipe(HERE / "settings.yaml")[given]


def tests_of(table: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the arms of a table are measured on."""
    scenes = table.get("data") == "scenes"
    return tuple(table.get("tests", (*DESCRIPTIONS, *NEGATIVES) if scenes else ("test", "transfer")))


def execute(runs: Iterable[Run], folder: Path) -> None:
    """Train and measure the runs that have no result yet, one after the other."""
    todo = [run for run in {run.name: run for run in runs}.values() if not result_path(folder, run).is_file()]
    for number, run in enumerate(todo, 1):
        print(f"{number}/{len(todo)}  {run.name}", flush=True)
        print(f"{execute_one(run, folder):.0f} s", flush=True)


def result_path(folder: Path, run: Run) -> Path:
    return folder / "results" / f"{run.name}.json"


def execute_one(run: Run, folder: Path) -> float:
    """Train and measure a run, and write its result; returns seconds."""
    begin, material = time.monotonic(), Material(folder)
    path = result_path(folder, run)
    if path.is_file():  # of another study in this folder
        return 0.0
    caches = [] if run.kind == KEPT_INDEX else [material.rows(name, run.rows) for name in run.encoders]
    models = {role: _trained(parent, material) for role, parent in run.parents.items()}
    begin_cpu = time.process_time()
    if run.kind == CAPTIONS:
        result = _captions(caches[0])
    else:
        measure = {QUESTIONS: _questions, KEPT_INDEX: _kept_index}.get(run.kind, _stage2)
        result = measure(run, material, caches, models)
    result = {**result, "cpu_seconds": round(time.process_time() - begin_cpu, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return time.monotonic() - begin


def _captions(cache_folder: Path) -> dict[str, Any]:
    """Measure retrieval between texts about one thing."""
    lookup = EmbeddingCache.open(cache_folder).lookup
    measured: dict[str, Any] = {}
    sources = {
        "lemma_to_gloss": PairSource(
            str(DATA / "glosses"), split="test", anchor_column="lemmas", positive_column="gloss"
        ),
        "name_to_keywords": PairSource(
            str(DATA / "concepts"), split="test", caption_columns=["caption", "keywords"]
        ),
    }  # fmt: skip
    for name, source in sources.items():
        pairs = CaptionPairData.from_source(source)
        scores = caption_retrieval_metrics(lookup(pairs.queries), lookup(pairs.targets), pairs.qrels)
        measured |= {f"{name}/{key}": value for key, value in scores.items()}
    return measured


def _stage2(run: Run, material: Material, caches: list[Path], models: Mapping[str, Path]) -> dict[str, Any]:
    output = _trained(run, material, caches, models)
    state = output / "trainer_state.json"
    epoch = _best_epoch(json.loads(state.read_text(encoding="utf-8"))) if state.is_file() else None
    result = {"epoch": epoch, **_measure(run, material, output, caches)}
    if not run.is_kept:
        shutil.rmtree(output)
    return result


def _trained(
    run: Run, material: Material, caches: list[Path] | None = None, models: Mapping[str, Path] | None = None
) -> Path:
    """Return the folder of a run's model, which is trained or merged unless it is there."""
    caches = [material.rows(name, run.rows) for name in run.encoders] if caches is None else caches
    if models is None:
        models = {role: _trained(parent, material) for role, parent in run.parents.items()}

    def make(folder: Path) -> None:
        if run.share is not None:
            merge_models(models["first"], models["second"], folder, run.share)
            return
        command, recipe = recipe_of(run, material, caches, models)
        start = start_path(run, material)
        if recipe.get("model_name_or_path") == str(start):
            towers = {**towers_of(run, material, caches), "sources": recipe["sources"]}
            fields = {name: value for name, value in _settings(run).items() if name in START_SETTINGS}
            save_start(start, towers, fields, caches, material.folder / FEATURES, run.seed)
        material.command(command, run.name, {**recipe, "output_dir": str(folder)})
        shutil.rmtree(start, ignore_errors=True)

    return material.made(model_path(run, material), make)


def model_path(run: Run, material: Material) -> Path:
    return material.folder / "models" / run.name


def start_path(run: Run, material: Material) -> Path:
    return material.folder / "start" / run.name


def _questions(run: Run, material: Material, caches: list[Path], models: Mapping[str, Path]) -> dict[str, Any]:
    """Train a projector between a tower and the LLM, and measure the answers."""
    sys.path.append(str(EXAMPLES))  # where the examples find what they share
    from multimodal_llm import main

    output = material.folder / "multimodal" / run.name
    shutil.rmtree(output, ignore_errors=True)  # of a run that was killed
    options = {
        **load_recipe(HERE / "multimodal.yaml"),
        "model": _trained(run, material, caches, models) if run.encoders else material.vision_tower(NINE_TOKENS),
        "image-processor": material.vision_tower(NINE_TOKENS),
        "llm": material.weights("llm"),
        "train": material.data("questions/train"),
        "test": material.data("questions/test"),
        "output-dir": output,
        "seed": run.seed,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    main(words + ["--bf16"] * has_fast_bfloat16())
    scores: dict[str, Any] = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    shutil.rmtree(output)
    return scores


def _kept_index(run: Run, material: Material, caches: list[Path], models: Mapping[str, Path]) -> dict[str, Any]:
    """Fit other queries to the image vectors of a model, and measure them."""
    ((kind, count),) = run.settings.items()
    encoder = kept_index.query_encoder(material, models["index"], run.encoders[0], kind, count, run.seed)
    return _scores(
        encoder, {name: RetrievalData.from_source(source) for name, source in _tests(run, material).items()}
    )


def recipe_of(
    run: Run, material: Material, caches: list[Path], models: Mapping[str, Path]
) -> tuple[str, dict[str, Any]]:
    """Return the command of a run, `stage2` or `align`, and its recipe.

    Args:
        caches: The rows of its text encoders.
        models: The models of its parents.
    """
    settings, towers = _settings(run), towers_of(run, material, caches)
    command = settings.pop("command", "stage2")
    parts = settings.pop("parts", [])
    of, column = ("scenes/", "long_a") if run.data == "scenes" else ("", "caption")
    captions = {"caption_columns": [*run.captions], "caption_weights": [*run.captions.values()]}
    recipe: dict[str, Any] = {
        "output_dir": str(model_path(run, material)),
        "sources": [{"path": str(material.data(f"{of}{run.pictures}")), **captions}],
        "eval_sources": {
            "validation": {"path": str(material.data(f"{of}{run.validation}")), "caption_columns": [column]}
        },
        "seed": run.seed,
    }
    if "keeps" in models:
        kept = dict.fromkeys(("vision_model_name_or_path", "keep_space_of"), str(models["keeps"]))
        return command, {**recipe, **towers, **settings, **kept}
    first, stored = {"command": command, **next(iter(parts), {})}, {"embedding_cache": towers.pop("embedding_cache")}
    if first["command"] == "stage2":
        towers = {"model_name_or_path": str(models.get("continues", start_path(run, material)))}
        settings = {name: value for name, value in settings.items() if name not in START_SETTINGS}
    if "lora_rank" not in settings:  # with it, a part that trains the tower has no stored rows
        recipe |= stored
    stored["feature_cache"] = str(material.folder / FEATURES)
    if _is_frozen({"command": command, **settings}):
        recipe |= stored
    if parts:
        recipe["parts"] = [{**part, **(stored if _is_frozen(part) else {})} for part in parts]
    return command, {**recipe, **towers, **settings}


def towers_of(run: Run, material: Material, caches: list[Path]) -> dict[str, Any]:
    """Return the settings that name the towers of a new model, and the rows of its text encoders."""
    vision = material.weights("vit")
    if run.data == "scenes":
        vision = material.vision_tower(NINE_TOKENS if run.kind == QUESTIONS else PAGE)
    towers: dict[str, Any] = {"vision_model_name_or_path": str(vision)}
    if len(caches) > 1:
        return {**towers, "embedding_cache": [str(path) for path in caches]}
    return {
        **towers,
        "text_model_name_or_path": str(material.text_encoder(run.encoders[0])),
        "embedding_cache": str(caches[0]),
    }


def _settings(run: Run) -> dict[str, Any]:
    """Return all settings of a run, those of its start too."""
    settings = {**load_recipe(HERE / BASES[run.settings.get("command", "stage2")]), **run.settings}
    return {name: value for name, value in settings.items() if value is not None}


def _is_frozen(settings: Mapping[str, Any]) -> bool:
    return settings.get("freeze_vision") == "all" or settings.get("command") == "align"


def _best_epoch(state: dict[str, Any]) -> float | None:
    name = "eval_validation_text_to_image_recall@10"
    # Before the first step there is no checkpoint that could be the best.
    scores = [(entry[name], -entry["epoch"]) for entry in state["log_history"] if name in entry and entry["step"]]
    return -max(scores)[1] if scores else None


def _measure(run: Run, material: Material, folder: Path, caches: list[Path]) -> dict[str, Any]:
    model: Any = LLM2CLIPModel.from_pretrained(folder, text_model=False).eval()
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    processor = images if len(caches) > 1 else AutoProcessor.from_pretrained(folder)
    lookup = open_cache(caches).lookup
    sets = {name: RetrievalData.from_source(source) for name, source in _tests(run, material).items()}
    # So that a picture of several sets is computed once; those of a tower that has trained go with it.
    is_frozen = "freeze_vision_layers" not in run.settings
    store = (material.folder if is_frozen else folder) / FEATURES
    features = open_features(model, images, [data.images for data in sets.values()], store)
    encoder: Encoder = StoredEncoder(model, processor, lookup, features)
    if "lora_rank" in run.settings:  # the stored rows of texts are those of the LLM before
        encoder = load_encoder(str(folder))
    return _scores(encoder, sets)


def _scores(encoder: Encoder, sets: Mapping[str, RetrievalData]) -> dict[str, float]:
    session = Session(encoder, show_progress_bar=False)
    scores: dict[str, float] = {}
    for name, data in sets.items():
        if name in NEGATIVES:
            scores[name] = _accuracy(session, sets["long_a"], data)
        else:
            scores |= {f"{name}/{key}": value for key, value in image_text_metrics(session, data).items()}
    return scores


def _accuracy(session: Session, right: RetrievalData, wrong: RetrievalData) -> float:
    """Measure how often a picture is nearer to its description than to its hard negative (SugarCrepe)."""
    images = session.embed_images(right.images)
    scores = []
    for data in (right, wrong):
        embeds = session.embed_texts(data.texts)
        scores.append({image: float(images[image] @ embeds[text]) for text, image in data.pairs.tolist()})
    return mean(scores[0][image] > score for image, score in scores[1].items())


def _tests(run: Run, material: Material) -> dict[str, CaptionSource]:
    if run.data == "scenes":
        path = str(material.data("scenes/test"))
        return {name: CaptionSource(path, caption_columns=[name]) for name in run.tests}
    sources = {}
    for name in ("validation", *run.tests):
        split, _, language = name.partition("_")
        column = f"caption_{language}" if language else "caption"
        sources[name] = CaptionSource(str(material.data(split)), caption_columns=[column])
    return sources

"""The `llm2clip plan` command: memory, hours and disk of a run before it is started."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

from llm2clip.encoders.embed import EmbedConfig
from llm2clip.planning.costs import ENCODING_USE, PEAK, TOKENS_PER_CAPTION, TRAINING_USE, embedding_bytes, hours
from llm2clip.planning.measure import Step, measure
from llm2clip.planning.show import print_plan
from llm2clip.planning.strategies import STRATEGIES, memory
from llm2clip.recipes import field_places, find_recipe, load_recipe
from llm2clip.trainers.base_config import StageConfig
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.options import OptionParser, unknown_option
from llm2clip.utils.repos import names_of
from llm2clip.utils.settings import build_config, check_choices, setting

Stage = Literal["stage1", "stage2", "embed", "mntp"]
STAGES: dict[Stage, Any] = {"stage1": Stage1Recipe, "stage2": Stage2Recipe, "embed": EmbedConfig, "mntp": MNTPRecipe}
# Bytes of an optimizer per trained parameter of four bytes.
STATES = {
    **{"adamw_torch_fused": 8, "adamw_torch": 8, "sgd": 0},
    **{"adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2},
}
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
GIB = 2**30
MILLION = 1_000_000


@dataclass
class PlanConfig:
    """Settings of the plan; all other options are those of the recipe's stage, such as `--lora_rank 8`."""

    recipe: str = setting("", "YAML file of settings, or name of a packaged recipe, of a stage or embed.")
    stage: Stage | None = setting(
        None,
        "Stage of the recipe; unset: by the beginning of its file name, or the one stage that has all its fields.",
    )
    gpus: int = setting(8, "Number of GPUs.")
    gpu_memory: float = setting(80.0, "Memory of a GPU in GiB.")
    reserve: float = setting(0.1, "Share of that memory for the driver, communication and fragmentation.")
    gpu: str = setting("H100", "Card, A100 or H100, for its published peak: 312 or 989 TFLOP/s in 16 bits.")
    peak_tflops: float | None = setting(None, "Peak of another card in TFLOP/s.")
    training_use: float = setting(TRAINING_USE, "Share of the peak that training reaches.")
    encoding_use: float = setting(ENCODING_USE, "Share of the peak that embedding reaches.")
    rows: int | None = setting(
        None, "Rows of the training data: images, pairs or blocks; unset: hours and disk are those of a million rows."
    )
    tokens: int = setting(TOKENS_PER_CAPTION, "Mean tokens of a caption with its prompt, for the hours.")
    longest: int | None = setting(
        None, "Tokens of the longest captions of a batch, for the memory; unset: the maximum length of the text tower."
    )
    json: bool = setting(False, "Print JSON, in bytes and hours, instead of tables.")
    overrides: list[str] = setting([], "Options of the stage; they may also stand on the command line as they are.")

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("gpus", "gpu_memory", "training_use", "encoding_use", "tokens"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, but is {getattr(self, name)}.")
        if self.peak_tflops is None and self.gpu not in PEAK:
            raise ValueError(f"the peak of gpu {self.gpu} is not known, only of {', '.join(PEAK)}; give peak_tflops.")
        if not 0 <= self.reserve < 1:
            raise ValueError(f"reserve must be at least 0 and below 1, but is {self.reserve}.")


def run(config: PlanConfig) -> dict[str, Any]:
    """Print what a run takes, from the configs of its models alone: no weights and no data are read.

    Raises:
        ValueError: The stage of the recipe is unknown, a setting does not fit, or a model's config cannot be read.
    """
    if not config.recipe:
        raise ValueError("give the recipe of a stage: a YAML file, or the name of a packaged one.")
    path = find_recipe(config.recipe)
    fields = load_recipe(path)
    stage = config.stage or stage_of(path, fields)
    options, unknown = OptionParser(STAGES[stage]).read(config.overrides)
    if unknown:
        raise ValueError(unknown_option(unknown[0], [PlanConfig, STAGES[stage]]))
    places = {**field_places(path), **dict.fromkeys(options, "the command line")}
    plan = make_plan(config, stage, build_config(STAGES[stage], {**fields, **options}, str(path), places))
    if config.json:
        print(json.dumps(plan, indent=2))
    else:
        print_plan(plan)
    return {}


def stage_of(path: Path, fields: dict[str, Any]) -> Stage:
    """Find the stage of a recipe: by the beginning of its name, or by its fields."""
    for stage in STAGES:
        if path.stem.startswith(stage):
            return stage
    known = {stage: {field.name for field in dataclasses.fields(config)} for stage, config in STAGES.items()}
    fitting = [stage for stage, names in known.items() if names >= set(fields)]
    if len(fitting) != 1:
        which = f"{' and '.join(fitting)} have" if fitting else "no stage has"
        raise ValueError(f"{path}: {which} all of its fields; say which stage it is for: --stage {'|'.join(STAGES)}.")
    return fitting[0]


def make_plan(config: PlanConfig, stage: Stage, settings: StageConfig | EmbedConfig) -> dict[str, Any]:
    """Compute the plan of a stage: numbers by name, memory in bytes."""
    step = measure(settings, config.gpus, config.longest, config.tokens)
    peak = PEAK[config.gpu] if config.peak_tflops is None else config.peak_tflops * 1e12
    limit = config.gpu_memory * (1 - config.reserve) * GIB
    if isinstance(settings, EmbedConfig):
        strategies: Any = {"DDP": memory("DDP", step, config.gpus, 0, half=False, averaged=False)}
        of, disk = _captions(config, settings, step)
        batch, use, units = {}, config.encoding_use, of["captions"]
    else:
        half, averaged = settings.bf16 or settings.fp16, settings.ema_half_life is not None
        states = state_bytes(settings)
        # The others divide what one GPU has alone.
        names = STRATEGIES if config.gpus > 1 else STRATEGIES[:1]
        strategies = {name: memory(name, step, config.gpus, states, half, averaged) for name in names}
        batch = _batch(settings, config.gpus)
        of, disk = _steps(config, settings, step, batch["rows_per_step"])
        use, units = config.training_use, of["rows"]
    for name, needed in strategies.items():
        # GradCache refuses it.
        refused = step.in_chunks and name == "ZeRO-3"
        needed["fits"] = "refused" if refused else "yes" if needed["total"] <= limit else "no"
    models = ("model_name_or_path", "vision_model_name_or_path", "text_model_name_or_path")
    return {
        "stage": stage,
        "model": ", ".join(name for field in models for name in names_of(getattr(settings, field, None))),
        "gpus": config.gpus,
        "gpu_memory_gib": config.gpu_memory,
        "usable_bytes": limit,
        "parameters": {"trained": step.trained, "frozen": step.frozen},
        "batch": batch,
        "strategies": strategies,
        "of": of,
        "hours": hours(units * step.flops, use, config.gpus, peak),
        "flops_per_row": step.flops,
        "disk": disk,
    }


def state_bytes(settings: StageConfig) -> int:
    """Bytes of the optimizer per trained parameter of four bytes; ValueError if the optimizer is unknown."""
    optimizer = getattr(settings.optim, "value", settings.optim)
    if optimizer not in STATES:
        raise ValueError(f"the plan does not know the states of optim {optimizer}; it knows {', '.join(STATES)}.")
    return STATES[optimizer]


def _batch(settings: StageConfig, gpus: int) -> dict[str, Any]:
    rows, accumulated = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    return {
        "per_device": rows,
        "global": rows * gpus,
        "accumulation_steps": accumulated,
        "rows_per_step": rows * gpus * accumulated,
        "chunk": getattr(settings, "tower_chunk_size", None),
        "activation_checkpointing": bool(settings.activation_checkpointing),
    }


def _captions(config: PlanConfig, settings: EmbedConfig, step: Step) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return how much is embedded, of the data or of a million rows, and the bytes of the result."""
    rows = config.rows or MILLION
    columns = [len(source.get("caption_columns", ["caption"])) for source in settings.sources]
    captions = rows * max(columns, default=1)
    of = {"rows": rows, "captions": captions, "whole_run": config.rows is not None}
    return of, {"embeddings": embedding_bytes(captions, step.width, BYTES[settings.cache_dtype])}


def _steps(
    config: PlanConfig, settings: StageConfig, step: Step, rows_per_step: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return how long the training is, or a part of a million rows, and the bytes of checkpoints and result."""
    batch = settings.per_device_train_batch_size * config.gpus
    if config.rows is not None and config.rows < batch and settings.dataloader_drop_last:
        raise ValueError(
            f"{config.rows:,} rows are fewer than one batch of {batch:,} ({settings.per_device_train_batch_size:,} on "
            f"each of {config.gpus} GPUs). Use a smaller batch size."
        )
    whole = settings.max_steps > 0 or config.rows is not None
    steps = settings.max_steps
    if steps <= 0:
        epochs = 1.0 if config.rows is None else settings.num_train_epochs
        steps = max(1, int((config.rows or MILLION) * epochs / rows_per_step))
    trained, result = step.trained_bytes, step.trained_bytes + step.frozen_bytes
    average = 4 * step.trained if settings.ema_half_life is not None else 0
    weights = trained if getattr(settings, "lora_rank", 0) > 0 else result
    checkpoint = weights + average + trained / 4 * state_bytes(settings)
    kept: int | None = 0
    strategy = getattr(settings.save_strategy, "value", settings.save_strategy)
    if strategy != "no":
        made = None
        if strategy == "epoch" and config.rows is not None:
            made = ceil(steps * rows_per_step / config.rows)
        elif strategy == "steps" and whole and settings.save_steps >= 1:
            made = max(1, int(steps // settings.save_steps))
        limit = settings.save_total_limit
        kept = made if limit is None else min(limit, made or limit)
    disk = {
        "checkpoint": checkpoint,
        "checkpoints_kept": kept,
        "checkpoints": None if kept is None else kept * checkpoint,
        "result": trained if getattr(settings, "save_format", "merged") == "adapter" else result,
        "frozen_states": 2 * step.state_values * (config.rows or MILLION),
    }
    of: dict[str, Any] = {"rows": steps * rows_per_step, "steps": steps, "whole_run": whole}
    if getattr(settings, "warm_start", None):
        of["warm_start"] = True
    return of, disk

"""The `llm2clip plan` command: memory, hours and disk of a run before it is started."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm2clip.encoders.embed import EmbedConfig
from llm2clip.planning.costs import ENCODING_USE, PEAK, TOKENS_PER_CAPTION, TRAINING_USE, embedding_bytes, hours
from llm2clip.planning.measure import Lengths, Step, measure
from llm2clip.planning.show import print_plan
from llm2clip.planning.strategies import STRATEGIES, need
from llm2clip.recipes import field_places, find_recipe, load_recipe
from llm2clip.trainers.base_config import StageConfig
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.options import OptionParser, unknown_option
from llm2clip.utils.settings import build_config, check_choices, setting

Stage = Literal["stage1", "stage2", "embed", "mntp"]
STAGES: dict[Stage, Any] = {"stage1": Stage1Recipe, "stage2": Stage2Recipe, "embed": EmbedConfig, "mntp": MNTPRecipe}
# Bytes of an optimizer per trained parameter of four bytes.
STATES = {
    "adamw_torch_fused": 8,
    "adamw_torch": 8,
    "sgd": 0,
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
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
    gpu: Literal["A100", "H100"] = setting("H100", "Card, for its published peak: 312 or 989 TFLOP/s in 16 bits.")
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
    options = given_options(config.overrides, STAGES[stage])
    places = {**field_places(path), **dict.fromkeys(options, "the command line")}
    plan = make_plan(config, stage, build_config(STAGES[stage], {**fields, **options}, str(path), places))
    if config.json:
        print(json.dumps(plan, indent=2))
    else:
        print_plan(plan)
    return {}


def stage_of(path: Path, fields: Mapping[str, Any]) -> Stage:
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


def given_options(arguments: Sequence[str], config_class: Any) -> dict[str, Any]:
    """Read options of a stage from a command line."""
    values, unknown = OptionParser(config_class).read(arguments)
    if unknown:
        raise ValueError(unknown_option(unknown[0], [PlanConfig, config_class]))
    return values


def make_plan(config: PlanConfig, stage: Stage, settings: StageConfig | EmbedConfig) -> dict[str, Any]:
    """Compute the plan of a stage: numbers by name, memory in bytes."""
    step = measure(settings, config.gpus, Lengths(config.longest, config.tokens))
    half = averaged = False
    states, strategies_of_stage = 0, STRATEGIES[:1]
    if isinstance(settings, StageConfig):
        half, averaged = settings.bf16 or settings.fp16, settings.ema_half_life is not None
        states, strategies_of_stage = _state_bytes(settings), STRATEGIES
    limit = config.gpu_memory * (1 - config.reserve) * GIB
    needs = [need(strategy, step, config.gpus, states, half, averaged) for strategy in strategies_of_stage]
    strategies: dict[str, dict[str, Any]] = {}
    for found in needs:
        refused = step.stand_ins and found.strategy == "ZeRO-3"
        fits = "refused" if refused else "yes" if found.total <= limit else "no"
        strategies[found.strategy] = {**dataclasses.asdict(found), "total": found.total, "fits": fits}
    return {
        "stage": stage,
        "model": _names(settings),
        "gpus": config.gpus,
        "gpu_memory_gib": config.gpu_memory,
        "usable_bytes": limit,
        "parameters": {"trained": step.count(True), "frozen": step.count(False)},
        "batch": _batch(settings, config.gpus),
        "strategies": strategies,
        **_work(config, settings, step),
    }


def _state_bytes(settings: StageConfig) -> int:
    optimizer = getattr(settings.optim, "value", settings.optim)
    if optimizer not in STATES:
        raise ValueError(f"the plan does not know the states of optim {optimizer}; it knows {', '.join(STATES)}.")
    return STATES[optimizer]


def _names(settings: Any) -> str:
    fields = ("model_name_or_path", "vision_model_name_or_path", "text_model_name_or_path")
    return ", ".join(name for field in fields if (name := getattr(settings, field, None)))


def _batch(settings: StageConfig | EmbedConfig, gpus: int) -> dict[str, Any]:
    if isinstance(settings, EmbedConfig):
        return {}
    rows, accumulated = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    return {
        "per_device": rows,
        "global": rows * gpus,
        "accumulation_steps": accumulated,
        "rows_per_step": rows * gpus * accumulated,
        "chunk": getattr(settings, "tower_chunk_size", None),
        "activation_checkpointing": bool(settings.activation_checkpointing),
    }


def _work(config: PlanConfig, settings: StageConfig | EmbedConfig, step: Step) -> dict[str, Any]:
    """Hours and disk of the run, or of a million rows."""
    peak = PEAK[config.gpu] if config.peak_tflops is None else config.peak_tflops * 1e12
    rows = config.rows or MILLION
    if isinstance(settings, EmbedConfig):
        captions = rows * max(
            (len(source.get("caption_columns", ["caption"])) for source in settings.sources), default=1
        )
        flops, use = captions * step.flops, config.encoding_use
        disk = {"embeddings": embedding_bytes(captions, step.width, BYTES[settings.cache_dtype])}
        return {
            "of": {"rows": rows, "captions": captions, "whole_run": config.rows is not None},
            "hours": hours(flops, use, config.gpus, peak),
            "flops_per_row": step.flops,
            "disk": disk,
        }
    global_rows = settings.per_device_train_batch_size * config.gpus * settings.gradient_accumulation_steps
    whole = settings.max_steps > 0 or config.rows is not None
    steps = settings.max_steps if settings.max_steps > 0 else int(rows * settings.num_train_epochs / global_rows)
    if not whole:
        steps = max(1, round(MILLION / global_rows))
    seen = steps * global_rows
    return {
        "of": {"rows": seen, "steps": steps, "whole_run": whole},
        "hours": hours(seen * step.flops, config.training_use, config.gpus, peak),
        "flops_per_row": step.flops,
        "disk": _checkpoints(settings, step, steps if whole else None),
    }


def _checkpoints(settings: StageConfig, step: Step, steps: int | None) -> dict[str, Any]:
    """Bytes of a checkpoint, of all that are kept, and of the result."""
    own = step.bytes(True)
    adapter = getattr(settings, "lora_rank", 0) > 0
    whole = own + step.bytes(False)
    states = own / 4 * _state_bytes(settings) + (4 * step.count(True) if settings.ema_half_life is not None else 0)
    checkpoint = (own if adapter else whole) + states
    kept: int | None = 0
    if getattr(settings.save_strategy, "value", settings.save_strategy) != "no":
        made = None if steps is None or settings.save_steps < 1 else max(1, int(steps // settings.save_steps))
        limit = settings.save_total_limit
        kept = made if limit is None else min(limit, made or limit)
    return {
        "checkpoint": checkpoint,
        "checkpoints_kept": kept,
        "checkpoints": None if kept is None else kept * checkpoint,
        "result": own if getattr(settings, "save_format", "merged") == "adapter" else whole,
    }

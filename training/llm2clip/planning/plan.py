"""The `llm2clip plan` command: memory, hours and disk of a run before it is started."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from rich.console import Console
from torch import nn

from llm2clip.command_line.options import OptionParser, unknown_option
from llm2clip.command_line.settings import check_choices, setting
from llm2clip.command_line.tables import print_table
from llm2clip.encoders.embed import EmbedConfig
from llm2clip.planning.counts import count_memory, count_step, make_work
from llm2clip.recipes import build_settings, find_recipe
from llm2clip.trainers.align_recipe import AlignRecipe
from llm2clip.trainers.base_config import StageConfig
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.parts import plan_parts
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe

Stage = Literal["stage1", "stage2", "embed", "mntp"]
STAGES: dict[Stage, Any] = {"stage1": Stage1Recipe, "stage2": Stage2Recipe, "embed": EmbedConfig, "mntp": MNTPRecipe}
# Published: dense 16-bit FLOP/s of the GPU.
PEAK = {"A100": 312e12, "H100": 989e12}
# Assumed: share of the peak that encoding and training reach; scaling efficiency of several GPUs.
ENCODING_USE, TRAINING_USE, SCALING = 0.40, 0.35, 0.95
# Assumed: mean length of a caption, including the prompt.
TOKENS_PER_CAPTION = 60
# Bytes of an optimizer per trained parameter of four bytes.
STATES = {
    **{"adamw_torch_fused": 8, "adamw_torch": 8, "sgd": 0},
    **{"adamw_bnb_8bit": 2, "adamw_8bit": 2, "paged_adamw_8bit": 2},
}
# A stored embedding has this key beside its values.
KEY_BYTES, BYTES = 16, {"float32": 4, "float16": 2, "bfloat16": 2}
GIB, MILLION = 2**30, 1_000_000
NOT_MEASURED = (
    "not measured: counted from shapes, and confirmed on no GPU; activations are what a forward pass keeps for "
    "backward, and the loss"
)


@dataclass
class PlanConfig:
    """Settings of the plan; all other options are those of the recipe's stage, such as `--lora_rank 8`."""

    recipe: str = setting("", "YAML file of settings, or name of a packaged recipe, of a stage or embed.")
    stage: Stage | None = setting(None, "Stage of the recipe; unset: by the beginning of its file name.")
    gpus: int = setting(8, "Number of GPUs.")
    gpu_memory: float = setting(80.0, "Memory of a GPU in GiB.")
    reserve: float = setting(
        0.1, "Share of that memory for what is not counted: backward's own tensors, driver, fragmentation."
    )
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
    stage = config.stage or next((stage for stage in STAGES if path.stem.startswith(stage)), None)
    if stage is None:
        raise ValueError(f"the name of {path} does not begin with a stage; say it: --stage {'|'.join(STAGES)}.")
    options, unknown = OptionParser(STAGES[stage]).read(config.overrides)
    if unknown:
        raise ValueError(unknown_option(unknown[0], [PlanConfig, STAGES[stage]]))
    settings = build_settings(STAGES[stage], path, options)
    parts = plan_parts(settings, chained=False) if isinstance(settings, Stage2Recipe) else [settings]
    plans = [{"stage": stage, **make_plan(config, part)} for part in parts if not isinstance(part, AlignRecipe)]
    if config.json:
        print(json.dumps(plans[0] if len(plans) == 1 else {"stage": stage, "parts": plans}, indent=2))
        return {}
    for plan in plans:
        print_plan(plan)
    if aligned := len(parts) - len(plans):
        print(f"{aligned} part of it is an alignment in closed form: the vision tower runs once per image.")
    return {}


def make_plan(config: PlanConfig, settings: StageConfig | EmbedConfig) -> dict[str, Any]:
    """Compute what a run with these settings takes: numbers by name, memory and disk in bytes."""
    if isinstance(settings, EmbedConfig):
        states, use = 0, config.encoding_use
        columns = [len(source.get("caption_columns", [""])) for source in settings.sources]
        size: dict[str, Any] = {"captions": (config.rows or MILLION) * max(columns, default=1)}
    else:
        optimizer = str(getattr(settings.optim, "value", settings.optim))
        if optimizer not in STATES:
            raise ValueError(f"the plan does not know the states of optim {optimizer}; it knows {', '.join(STATES)}.")
        states, use = STATES[optimizer], config.training_use
        size = _steps(config, settings)
    units = size.get("captions") or size["rows"]
    work = make_work(settings, config.longest)
    activations, flops = count_step(settings, work, config.gpus, config.tokens)
    if isinstance(settings, EmbedConfig):
        disk: dict[str, Any] = {"embeddings": units * (BYTES[settings.cache_dtype] * work.width + KEY_BYTES)}
    else:
        disk = _disk(settings, work.model, states, size, config.rows or MILLION)
    memory: dict[str, Any] = count_memory(settings, work, activations, config.gpus, states)
    usable = config.gpu_memory * (1 - config.reserve) * GIB
    for needed in memory.values():
        needed["fits"] = needed["total"] <= usable
    peak = PEAK[config.gpu] if config.peak_tflops is None else config.peak_tflops * 1e12
    names = ("model_name_or_path", "vision_model_name_or_path", "text_model_name_or_path")
    tensors = [*work.model.parameters(), *work.model.buffers()]
    frozen, trained = (sum(x.numel() for x in tensors if x.requires_grad is grad) for grad in (False, True))
    return {
        "models": [str(model) for name in names if (model := getattr(settings, name, None))],
        "gpus": config.gpus,
        "usable_bytes": usable,
        "measured": False,
        "memory": memory,
        "parameters": {"trained": trained, "frozen": frozen},
        **size,
        "whole_run": config.rows is not None or getattr(settings, "max_steps", 0) > 0,
        "hours": hours(units * flops, use, config.gpus, peak),
        "flops_per_row": flops,
        "disk": disk,
    }


def hours(flops: float, use: float, gpus: int, peak: float) -> float:
    """Convert floating-point operations to hours, at a share `use` of the peak of a GPU in FLOP/s."""
    return flops / (peak * use * gpus * (SCALING if gpus > 1 else 1)) / 3600


def _steps(config: PlanConfig, settings: StageConfig) -> dict[str, int]:
    """Return the batch, and how long the training is, or a part of a million rows."""
    batch = settings.per_device_train_batch_size * config.gpus
    if config.rows is not None and config.rows < batch and settings.dataloader_drop_last:
        raise ValueError(
            f"{config.rows:,} rows are fewer than one batch of {batch:,} ({settings.per_device_train_batch_size:,} on "
            f"each of {config.gpus} GPUs). Use a smaller batch size."
        )
    step, steps = batch * settings.gradient_accumulation_steps, settings.max_steps
    if steps <= 0:
        epochs = 1.0 if config.rows is None else settings.num_train_epochs
        steps = max(1, int((config.rows or MILLION) * epochs / step))
    return {"batch": batch, "rows_per_step": step, "rows": steps * step, "steps": steps}


def _disk(settings: StageConfig, model: nn.Module, states: int, size: dict[str, int], rows: int) -> dict[str, Any]:
    """Return the bytes of a checkpoint, how many are kept, and the bytes of the result."""
    tensors = [*model.parameters(), *model.buffers()]
    weights, trained = sum(x.nbytes for x in tensors), sum(x.nbytes for x in tensors if x.requires_grad)
    strategy, every = str(getattr(settings.save_strategy, "value", settings.save_strategy)), settings.save_steps
    by_steps = size["steps"] // every if every >= 1 else 1 // every
    limit = settings.save_total_limit
    made = {"no": 0, "epoch": ceil(size["rows"] / rows), "steps": max(1, int(by_steps))}.get(strategy, limit or 1)
    return {
        "checkpoint": (trained if getattr(settings, "lora_rank", 0) else weights) + trained / 4 * states,
        "checkpoints_kept": min(made, limit or made),
        "result": trained if getattr(settings, "save_format", "merged") == "adapter" else weights,
    }


def print_plan(plan: dict[str, Any]) -> None:
    """Print a plan: the memory of a GPU with DDP and FSDP, then parameters, batch, hours and disk."""
    console = Console(markup=False, emoji=False, highlight=False)
    table = [
        [name, *(f"{size / GIB:,.1f}" for size in sizes), "yes" if fits else "no"]
        for name, (*sizes, fits) in ((name, needed.values()) for name, needed in plan["memory"].items())
    ]
    gpus = f"each of {plan['gpus']} GPUs" if plan["gpus"] > 1 else "the GPU"
    columns, usable = ("GiB", *next(iter(plan["memory"].values()))), plan["usable_bytes"] / GIB
    title = f"{plan['stage']}: memory of {gpus}, {usable:,.0f} GiB usable"
    print_table(console, title, columns, table, (0, len(columns) - 1))
    trained, frozen = (plan["parameters"][name] / 1e6 for name in ("trained", "frozen"))
    batch = f"; {plan['batch']:,} rows in the loss, {plan['rows_per_step']:,} a step" if "batch" in plan else ""
    what = f"{plan['steps']:,} steps of {plan['rows']:,} rows" if batch else f"{plan['captions']:,} captions"
    part = "" if plan["whole_run"] else " (a part of the run: --rows N gives the whole)"
    time, disk = plan["hours"], plan["disk"]
    time = f"hours: {time:,.1f}" if time >= 0.1 else f"minutes: {60 * time:,.1f}"
    if batch:
        kept, size = disk["checkpoints_kept"], disk["checkpoint"]
        files = f"checkpoint {_size(size)}, {kept} kept: {_size(kept * size)}; result {_size(disk['result'])}"
    else:
        files = f"embeddings {_size(disk['embeddings'])}"
    for line in (
        NOT_MEASURED,
        f"models: {', '.join(plan['models'])}",
        f"parameters: {trained:,.1f}M trained, {frozen:,.1f}M frozen{batch}",
        f"{time} for {what}{part}; {plan['flops_per_row'] / 1e9:,.0f} GFLOP each",
        f"disk: {files}",
    ):
        console.print(line, soft_wrap=True)


def _size(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 or not size else f"{size / 1e6:,.1f} MB"

"""The plan of a run as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from llm2clip.utils.tables import print_table

GIB, GB, MB = 2**30, 1e9, 1e6
COLUMNS = ("GiB", "weights", "grads", "optim", "buffers", "activ", "total", "fits")
PARTS = ("weights", "gradients", "states", "buffers", "activations", "total")


def print_plan(plan: dict[str, Any]) -> None:
    """Print a plan: the memory of a GPU for each strategy, then parameters, batch, hours and disk."""
    console = Console(markup=False, emoji=False, highlight=False)
    strategies = plan["strategies"]
    rows = [
        [name, *(f"{needed[part] / GIB:,.1f}" for part in PARTS), needed["fits"]]
        for name, needed in strategies.items()
    ]
    usable, memory = plan["usable_bytes"] / GIB, plan["gpu_memory_gib"]
    gpus = f"each of {plan['gpus']} GPUs" if plan["gpus"] > 1 else "the GPU"
    title = f"{plan['stage']}: memory of {gpus}, {usable:,.0f} of {memory:,.0f} GiB usable"
    print_table(console, title, COLUMNS, rows, text_columns=(0, len(COLUMNS) - 1))
    lines = [f"models: {plan['model']}"]
    if any(needed["fits"] == "refused" for needed in strategies.values()):
        lines.insert(0, "refused: tower_chunk_size does not work with ZeRO-3")
    trained, frozen = plan["parameters"]["trained"], plan["parameters"]["frozen"]
    lines.append(f"parameters: {trained / 1e6:,.1f}M trained, {frozen / 1e6:,.1f}M frozen")
    batch, of, disk = plan["batch"], plan["of"], plan["disk"]
    if batch:
        accumulated = batch["accumulation_steps"]
        chunk = f"towers in chunks of {batch['chunk']}" if batch["chunk"] else "towers on the whole batch at once"
        recomputed = "recomputed" if batch["activation_checkpointing"] else "kept"
        several = f", {accumulated} of them per step" if accumulated > 1 else ""
        sizes = f"{batch['per_device']:,} per GPU, {batch['global']:,} in the loss"
        lines.append(f"batch: {sizes}{several}; {chunk}, activations {recomputed}")
    what = f"{of['captions']:,} captions" if "captions" in of else f"{of['steps']:,} steps of {of['rows']:,} rows"
    part = "" if of["whole_run"] else " (a part of the run: --rows N gives the whole)"
    lines.append(f"{_duration(plan['hours'])} for {what}{part}; {plan['flops_per_row'] / 1e9:,.0f} GFLOP each")
    if of.get("warm_start"):
        lines.append("warm start: a first part with frozen towers comes before it, which is not counted")
    if "embeddings" in disk:
        lines.append(f"disk: embeddings {_size(disk['embeddings'])}")
    else:
        count, total = disk["checkpoints_kept"], disk["checkpoints"]
        kept = "" if total is None else f", {count} kept: {_size(total)}"
        states = f"; frozen states {_size(disk['frozen_states'])}" if disk["frozen_states"] else ""
        lines.append(f"disk: checkpoint {_size(disk['checkpoint'])}{kept}; result {_size(disk['result'])}{states}")
    for line in lines:
        console.print(line, soft_wrap=True)


def _duration(hours: float) -> str:
    if hours >= 0.1:
        return f"hours: {hours:,.1f}"
    return f"minutes: {60 * hours:,.1f}" if hours >= 0.1 / 60 else "minutes: below 0.1"


def _size(size: float) -> str:
    return f"{size / GB:,.1f} GB" if size >= GB / 10 or not size else f"{size / MB:,.1f} MB"

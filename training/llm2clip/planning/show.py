"""The plan of a run as tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from llm2clip.utils.tables import print_table

GIB, GB = 2**30, 1e9
COLUMNS = ("GiB", "weights", "grads", "optim", "buffers", "activ", "total", "fits")
PARTS = ("weights", "gradients", "states", "buffers", "activations", "total")


def print_plan(plan: dict[str, Any]) -> None:
    """Print a plan: the memory of a GPU for each strategy, then parameters, batch, hours and disk."""
    console = Console(markup=False, emoji=False, highlight=False)
    rows = [
        [name, *(f"{found[part] / GIB:,.1f}" for part in PARTS), found["fits"]]
        for name, found in plan["strategies"].items()
    ]
    usable, memory = plan["usable_bytes"] / GIB, plan["gpu_memory_gib"]
    title = f"{plan['stage']}: memory of each of {plan['gpus']} GPUs, {usable:,.0f} of {memory:,.0f} GiB usable"
    print_table(console, title, COLUMNS, rows, text_columns=(0, len(COLUMNS) - 1))
    if any(found["fits"] == "refused" for found in plan["strategies"].values()):
        console.print("refused: tower_chunk_size does not work with ZeRO-3")
    for line in [f"models: {plan['model']}", *_lines(plan)]:
        console.print(line, soft_wrap=True)


def _lines(plan: dict[str, Any]) -> list[str]:
    trained, frozen = plan["parameters"]["trained"], plan["parameters"]["frozen"]
    lines = [f"parameters: {trained / 1e6:,.1f}M trained, {frozen / 1e6:,.1f}M frozen"]
    batch = plan["batch"]
    if batch:
        accumulated = batch["accumulation_steps"]
        chunk = f"towers in chunks of {batch['chunk']}" if batch["chunk"] else "towers on the whole batch at once"
        recomputed = "recomputed" if batch["activation_checkpointing"] else "kept"
        lines.append(
            f"batch: {batch['per_device']:,} per GPU, {batch['global']:,} in the loss"
            f"{f', {accumulated} of them per step' if accumulated > 1 else ''}; {chunk}, activations {recomputed}"
        )
    of = plan["of"]
    what = f"{of['captions']:,} captions" if "captions" in of else f"{of['steps']:,} steps of {of['rows']:,} rows"
    part = "" if of["whole_run"] else " (a part of the run: --rows N gives the whole)"
    lines.append(f"hours: {plan['hours']:,.1f} for {what}{part}; {plan['flops_per_row'] / 1e9:,.0f} GFLOP each")
    lines.append(f"disk: {_disk(plan['disk'])}")
    return lines


def _disk(disk: dict[str, Any]) -> str:
    if "embeddings" in disk:
        return f"embeddings {disk['embeddings'] / GB:,.1f} GB"
    kept = (
        "" if disk["checkpoints"] is None else f", {disk['checkpoints_kept']} kept: {disk['checkpoints'] / GB:,.1f} GB"
    )
    return f"checkpoint {disk['checkpoint'] / GB:,.1f} GB{kept}; result {disk['result'] / GB:,.1f} GB"

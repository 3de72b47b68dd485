"""R13: the overhead of a training step of stage 2."""

from __future__ import annotations

from typing import Any

from benchmarks.row import Contest, Row
from benchmarks.stage2_inputs import step_contest, write_inputs

# A ViT-S/16 at 112 pixels.
VISION = {"hidden": 384, "layers": 12, "patch": 16, "size": 112}
BATCH, STEPS = 32, 5
# More than the steps consume: the worker prefetches until the end.
PICTURES = BATCH * (STEPS + 4)


def _fields() -> dict[str, Any]:
    return {
        **write_inputs(PICTURES, words=12, hidden=256, vision=VISION),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "projection_dim": 512,
    }


def contests(device: str) -> list[Contest]:
    note = (
        f"Of {STEPS} steps. Ours reads JPEGs from parquet, decodes, crops and collates in one worker process, gathers "
        "the cached embeddings, and logs after every step; *wall* is what a user with two cores waits, *cpu* is the "
        "main process alone."
    )
    return [step_contest(f"ViT-S/16 at 112 px, batch {BATCH}", _fields, note, 1.08)]


ROW = Row("R13", "a step of stage 2 with cached embeddings, all included", contests)

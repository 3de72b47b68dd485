"""R18: the overhead of a training step of stage 2 with both towers frozen."""

from __future__ import annotations

from typing import Any

from benchmarks.row import Contest, Row
from benchmarks.stage2_inputs import step_contest, write_inputs

# Features of 768 values, as those of a ViT-S; its depth does not matter, since the features are stored before.
VISION = {"hidden": 384, "layers": 1, "patch": 16, "size": 112}
PICTURES, BATCH, STEPS, LOGGING_STEPS = 1024, 512, 40, 10


def _fields() -> dict[str, Any]:
    return {
        **write_inputs(PICTURES, words=6, hidden=512, vision=VISION),
        "freeze_vision": "all",
        "vision_pooling": "cls_mean",
        "standardize_features": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "dataloader_num_workers": 0,
        "adapter_num_layers": 1,
        "projection_dim": 256,
        "logging_steps": LOGGING_STEPS,
    }


def contests(device: str) -> list[Contest]:
    note = (
        f"Of {STEPS} steps. Ours reads stored features and caption embeddings, draws captions, and logs every tenth "
        "step."
    )
    return [step_contest(f"features of 768, captions of 512, batch {BATCH}", _fields, note, 1.1)]


ROW = Row("R18", "a step of stage 2 with both towers frozen, all included", contests)

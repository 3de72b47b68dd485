"""R5: the sigmoid loss of SigLIP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.row import Contest, Contestant, Goal, Row
from benchmarks.rows.r04_info_nce import against

# Between the scale at the start of training (10) and that at the end of SigLIP's (about 118).
SCALE, BIAS = 50.0, -10.0


def _ours() -> Callable:
    from llm2clip.losses import sigmoid_loss

    return sigmoid_loss


def _open_clip() -> Callable:
    from open_clip.loss import SigLipLoss

    return SigLipLoss()


def contests(device: str) -> list[Contest]:
    batch = 8192 if device == "cpu" else 32768
    peer = "open_clip SigLipLoss"
    sized = {"batch": batch, "device": device, "noise": 4, "scale": SCALE, "bias": BIAS}
    contestants = {
        "ours": Contestant(partial(against, _ours, **sized)),
        peer: Contestant(partial(against, _open_clip, **sized)),
    }
    goals = (Goal(peer, "cpu", 0.6), Goal(peer, "memory", 0.2))
    names = ("image_gradient", "text_gradient", "scale_gradient", "bias_gradient")
    tolerance = {"loss": 1e-5, **dict.fromkeys(names, 1e-4)}
    return [Contest(f"batch {batch:,}", contestants, goals, tolerance)]


ROW = Row("R5", "sigmoid loss forward and backward, width 512", contests, ("cpu", "cuda"))

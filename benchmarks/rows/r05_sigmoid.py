"""R5: the sigmoid loss of SigLIP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.row import Contest, Contestant, Goal, Row
from benchmarks.rows.r04_info_nce import against

# Between the scale at the start of training (10) and that at the end of SigLIP's (about 118).
SCALE, BIAS = 50.0, -10.0
CHUNK = 1024


def _ours() -> Callable:
    from llm2clip.losses import sigmoid_loss

    return sigmoid_loss


def _open_clip() -> Callable:
    from open_clip.loss import SigLipLoss

    return SigLipLoss()


def _open_clip_in_chunks() -> Callable:
    """open_clip's loss in chunks of images, with autograd.

    Releases of open_clip have no setting for this yet. That of its development version stores the logits of every
    chunk for the backward pass too, and nothing else of this size.
    """
    import torch
    from open_clip.loss import SigLipLoss

    logits_of = SigLipLoss().get_logits

    def loss_of(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        loss = torch.zeros((), device=images.device)
        for start in range(0, len(images), CHUNK):
            logits = logits_of(images[start : start + CHUNK], texts, scale, bias)
            # -log sigmoid(-x) of all pairs; for matching pairs, -log sigmoid(x) is that minus x.
            loss = loss + torch.nn.functional.softplus(logits).sum() - logits.diagonal(start).sum()
        return loss / len(images)

    return loss_of


def contests(device: str) -> list[Contest]:
    batch = 8192 if device == "cpu" else 32768
    plain, chunked = "open_clip SigLipLoss", f"open_clip SigLipLoss in chunks of {CHUNK}"
    sized = {"batch": batch, "device": device, "noise": 4, "scale": SCALE, "bias": BIAS}
    contestants = {
        "ours": Contestant(partial(against, _ours, **sized)),
        plain: Contestant(partial(against, _open_clip, **sized)),
        chunked: Contestant(partial(against, _open_clip_in_chunks, **sized)),
    }
    goals = (Goal(plain, "cpu", 0.6), Goal(chunked, "memory", 0.4), Goal(chunked, "cpu", 1.0))
    names = ("image_gradient", "text_gradient", "scale_gradient", "bias_gradient")
    tolerance = {"loss": 1e-5, **dict.fromkeys(names, 1e-4)}
    return [Contest(f"batch {batch:,}", contestants, goals, tolerance)]


ROW = Row("R5", "sigmoid loss forward and backward, width 512", contests, ("cpu", "cuda"))

"""R4: the contrastive loss, whose memory grows with the square of the batch size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.row import Contest, Contestant, Goal, Outcome, Row, Work

WIDTH = 512
# The logit scale at the end of training, which is clamped to 100.
SCALE = 100.0
INF_CL = (
    "Inf-CL (arXiv 2410.17243), whose tiles are Triton kernels, publishes batches of 4M and 12M for a ViT-L/14 on 8 "
    "and 32 A800 of 80 GB."
)


def against(make_loss: Callable[[], Callable], batch: int, device: str, noise: float, **scalars: float) -> Work:
    """Prepare the loss and the gradients of both sides and of the scalars, with pairs of similar unit vectors."""
    import torch

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, WIDTH, generator=generator)
    texts = images + noise * torch.randn(batch, WIDTH, generator=generator)
    inputs = [torch.nn.functional.normalize(rows, dim=-1).to(device).requires_grad_() for rows in (images, texts)]
    inputs += [torch.tensor(value, device=device, requires_grad=True) for value in scalars.values()]
    loss_of = make_loss()

    def work() -> Outcome:
        loss = loss_of(*inputs)
        names = (f"{name}_gradient" for name in ("image", "text", *scalars))
        return Outcome({"loss": loss, **dict(zip(names, torch.autograd.grad(loss, inputs), strict=True))})

    return work


def _ours() -> Callable:
    from llm2clip.losses import clip_loss

    return clip_loss


def _open_clip() -> Callable:
    from open_clip.loss import ClipLoss

    return ClipLoss(cache_labels=True)


def _transformers() -> Callable:
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss

    return lambda images, texts, scale: image_text_contrastive_loss(texts @ images.T * scale)


def contests(device: str) -> list[Contest]:
    contests_of_row = []
    sizes = {8192: 0.18, 16384: 0.10} if device == "cpu" else {32768: 0.10}
    for batch, memory in sizes.items():
        sized = {"batch": batch, "device": device, "noise": 8, "scale": SCALE}
        contestants = {
            "ours": Contestant(partial(against, _ours, **sized)),
            "open_clip ClipLoss": Contestant(partial(against, _open_clip, **sized)),
            "transformers CLIP": Contestant(partial(against, _transformers, **sized)),
        }
        goals = [Goal("open_clip ClipLoss", "memory", memory), Goal("transformers CLIP", "memory", memory)]
        if batch == min(sizes):
            goals = [Goal("open_clip ClipLoss", "cpu", 0.55), Goal("transformers CLIP", "cpu", 1.0), *goals]
        tolerance = {"loss": 1e-5, **dict.fromkeys(("image_gradient", "text_gradient", "scale_gradient"), 1e-4)}
        rounds = 5 if batch < 10_000 else 3
        note = "" if device == "cpu" else INF_CL
        contests_of_row.append(Contest(f"batch {batch:,}", contestants, tuple(goals), tolerance, rounds, note=note))
    return contests_of_row


ROW = Row("R4", "InfoNCE forward and backward, width 512", contests, ("cpu", "cuda"))

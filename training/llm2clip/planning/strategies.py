"""Memory of one GPU under each way of dividing a model over GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llm2clip.planning.measure import Step

Strategy = Literal["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"]
STRATEGIES: tuple[Strategy, ...] = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")
FLOAT = 4
# DeepSpeed's optimizer keeps float32 weights beside the two moments of Adam.
MASTER = 4
# DeepSpeed's default size of the buffers in which gradients are reduced, in elements.
BUCKET = 500_000_000
# What FSDP holds gathered: the block at work and the next one.
GATHERED_BLOCKS = 2


@dataclass(frozen=True)
class Need:
    """Bytes on one GPU.

    Attributes:
        states: Optimizer states, and the average of the weights, if any.
        buffers: Copies for communication and chunked gradients, gathered weights.
    """

    strategy: Strategy
    weights: float
    gradients: float
    states: float
    buffers: float
    activations: float

    @property
    def total(self) -> float:
        """All of it together."""
        return self.weights + self.gradients + self.states + self.buffers + self.activations


def need(strategy: Strategy, step: Step, gpus: int, state_bytes: int, half: bool, averaged: bool) -> Need:
    """Compute the memory of one GPU.

    Args:
        state_bytes: Bytes of the optimizer per trained parameter of four bytes.
        half: The run uses bf16 or fp16.
        averaged: The run averages its weights (EMA).
    """
    count = step.count(trained=True)
    own, frozen = step.bytes(trained=True), step.bytes(trained=False)
    average = FLOAT * count if averaged else 0
    # Chunks of a batch sum their gradients beside those of the parameters, on every GPU in full.
    stand_ins = own if step.stand_ins else 0
    if strategy == "DDP":
        # DDP reduces gradients in buckets, which together are as large as the gradients.
        buckets = own if gpus > 1 else 0
        states = own / FLOAT * state_bytes + average
        return Need(strategy, own + frozen, own, states, buckets + stand_ins, step.activations)
    activations = step.activations - step.casts
    if strategy == "FSDP2":
        # Accelerate trains float32 weights under mixed precision, and gathers 16-bit copies of them.
        own = max(own, FLOAT * count) if half else own
        share = 0.5 if half else 1.0
        blocks = GATHERED_BLOCKS * step.largest_block + step.outside
        gathered = blocks * (share if own > frozen else 1.0) + FLOAT * step.largest_trained_block
        states = own / FLOAT * state_bytes + average
        parts = (own + frozen) / gpus, own / gpus, states / gpus
        return Need(strategy, *parts, gathered + (FLOAT * count if stand_ins else 0), activations)
    # DeepSpeed computes in 16 bits throughout and keeps float32 weights in its optimizer.
    size = 2 if half else FLOAT
    weights = float(size * count + (min(frozen, size * step.count(trained=False)) if half else frozen))
    gradients, states = float(size * count), (MASTER + state_bytes) * count / gpus
    buffers = float(size * min(BUCKET, count)) + (size * count if step.stand_ins else 0)
    if strategy != "ZeRO-1":
        gradients /= gpus
    if strategy == "ZeRO-3":
        weights /= gpus
        buffers += (GATHERED_BLOCKS * step.largest_block + step.outside) * (size / FLOAT if own > frozen else 1.0)
    return Need(strategy, weights, gradients, states, buffers, activations)

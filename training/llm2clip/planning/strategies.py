"""Memory of one GPU under each way of dividing a model over GPUs."""

from __future__ import annotations

from typing import Literal

from llm2clip.planning.measure import FLOAT, Step

Strategy = Literal["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"]
STRATEGIES: tuple[Strategy, ...] = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")
# DeepSpeed's optimizer keeps float32 weights beside the two moments of Adam.
MASTER = 4
# DeepSpeed's default size of the buffers in which gradients are reduced, in elements.
BUCKET = 500_000_000
# What FSDP holds gathered: the block at work and the next one.
GATHERED_BLOCKS = 2


def memory(
    strategy: Strategy, step: Step, gpus: int, state_bytes: int, half: bool, averaged: bool
) -> dict[str, float]:
    """Compute the bytes on one GPU by part, and their sum as `total`.

    `states` are those of the optimizer, and the average of the weights, if any; `buffers` are copies for
    communication, gradients of chunks, and gathered weights.

    Args:
        state_bytes: Bytes of the optimizer per trained parameter of four bytes.
        half: The run uses bf16 or fp16.
        averaged: The run averages its weights (EMA).
    """
    count, trained, frozen = step.trained, step.trained_bytes, step.frozen_bytes
    average = FLOAT * count if averaged else 0
    weights: float
    gradients: float
    buffers: float
    activations = step.activations if strategy == "DDP" else step.activations - step.casts
    # Of float32 weights, 16-bit copies are gathered.
    gathered = (GATHERED_BLOCKS * step.largest_block + step.outside) * (0.5 if half and trained > frozen else 1.0)
    # Chunks of a batch sum their gradients beside those of the parameters, on every GPU in full.
    if strategy == "DDP":
        # DDP reduces gradients in buckets, which together are as large as the gradients.
        weights, gradients, states = trained + frozen, trained, trained / FLOAT * state_bytes + average
        buffers = trained * ((gpus > 1) + step.in_chunks)
    elif strategy == "FSDP2":
        # Accelerate trains float32 weights under mixed precision.
        trained = max(trained, FLOAT * count) if half else trained
        states = trained / FLOAT * state_bytes + average
        weights, gradients, states = (trained + frozen) / gpus, trained / gpus, states / gpus
        buffers = gathered + FLOAT * (step.largest_trained_block + count * step.in_chunks)
    else:
        # DeepSpeed computes in 16 bits throughout and keeps float32 weights in its optimizer.
        size = 2 if half else FLOAT
        weights = size * count + (min(frozen, size * step.frozen) if half else frozen)
        gradients, states = size * count, (MASTER + state_bytes) * count / gpus
        buffers = size * (min(BUCKET, count) + count * step.in_chunks)
        if strategy != "ZeRO-1":
            gradients /= gpus
        if strategy == "ZeRO-3":
            weights /= gpus
            buffers += gathered
    parts = {"weights": weights, "gradients": gradients, "states": states, "buffers": buffers}
    return {**parts, "activations": activations, "total": sum(parts.values()) + activations}

"""This process among those of its launcher."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState


def process_state(timeout: timedelta | None = None) -> PartialState:
    """This process among those of its launcher, with its device, also on a machine that has only CPUs.

    Args:
        timeout: How long processes wait for each other; None for torch's default. Counts where this is what joins
            them first.
    """
    # accelerate joins torchrun's processes on the CPU only when told that the CPU is meant
    options = {} if timeout is None else {"timeout": timeout}
    return PartialState(cpu=not torch.accelerator.is_available(), **options)


def leave_processes() -> None:
    """Part from the other processes, when the work is done: torch's threads may abort one that ends without."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

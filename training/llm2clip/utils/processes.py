"""The processes of a distributed run."""

from __future__ import annotations

import gc
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState


def process_state(timeout: timedelta | None = None) -> PartialState:
    """Return the rank, world size and device of this process, joining the process group if a launcher started it.

    Args:
        timeout: How long a collective operation may wait for other processes, if this call creates the process group.
    """
    # Without cpu=True, accelerate does not create a process group on machines that have no accelerator.
    options = {} if timeout is None else {"timeout": timeout}
    return PartialState(cpu=not torch.accelerator.is_available(), **options)


def leave_process_group() -> None:
    """Destroy the process group at the end of a run; otherwise threads of torch may abort the process at exit."""
    if dist.is_available() and dist.is_initialized():
        # A trainer and its callbacks are a reference cycle; the DDP wrapper in it must be freed before the group.
        gc.collect()
        dist.destroy_process_group()


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

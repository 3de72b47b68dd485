"""The processes of a distributed run."""

from __future__ import annotations

import gc
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

T = TypeVar("T")


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


def worker_count(num_workers: int | None) -> int:
    """Return the number of worker processes that a setting asks for; None is one per core, at most 8."""
    return min(8, torch.get_num_threads()) if num_workers is None else num_workers


def world_size() -> int:
    """Return the number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Add up a tensor over the processes; each gets the sum, on the device of its own tensor."""
    if world_size() == 1:
        return values
    total = values.to(process_state().device)  # that of the process group
    dist.all_reduce(total)
    return total.to(values.device)


def gather_results(compute: Callable[[], T]) -> list[T]:
    """Call a function in all processes; each returns the results of all, or raises the error of one.

    The work may take longer in one process than a collective operation may wait, up to a week.
    """
    if world_size() == 1:
        return [compute()]
    # gloo, whose waiting does not stop other work on a GPU, and whose results need not fit into its memory.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    outcome: tuple[T | None, Exception | None]
    try:
        outcome = compute(), None
    except Exception as error:  # otherwise the others would wait for the result
        outcome = None, error
    outcomes: list[Any] = [None] * world_size()
    dist.all_gather_object(outcomes, outcome, group=group)
    dist.destroy_process_group(group)
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


def on_main_process(compute: Callable[[], T]) -> T:
    """Call a function in the main process only; every process returns its result, or raises its error."""
    is_main = process_state().is_main_process
    return cast(T, gather_results(lambda: compute() if is_main else None)[0])

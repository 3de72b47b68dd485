"""Resuming on another number of processes: the batch of all processes together stays what it was."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from llm2clip.trainers.base_config import StageConfig

logger = logging.getLogger(__name__)

PROCESSES, BATCH_SIZE = "number of processes", "per_device_train_batch_size"
# Settings that may differ where other processes go on: those that follow from their number, and from the memory that a
# larger batch on each needs.
FOLLOWING = {PROCESSES, BATCH_SIZE, "tower_chunk_size"}


def keep_global_batch(args: StageConfig, old: Mapping[str, Any]) -> bool:
    """Give each process its share of the batch of a run that other processes began, and log what changes.

    The losses compare the rows of one batch, so that it is not made of several accumulated ones instead.

    Args:
        args: The present settings, whose `per_device_train_batch_size` is set.
        old: The settings that the run was started with.

    Returns:
        Whether the run goes on with the same batch on another number of processes.

    Raises:
        ValueError: The processes cannot share the batch.
    """
    before, now = old.get(PROCESSES), args.world_size
    if before is None or before == now:
        return False
    rows = before * old[BATCH_SIZE]
    if args.per_device_train_batch_size * now == rows:
        return True
    if args.per_device_train_batch_size != old[BATCH_SIZE]:
        return False
    if rows % now:
        possible = [str(number) for number in range(1, 2 * max(before, now) + 1) if rows % number == 0]
        raise ValueError(
            f"{now} processes cannot share batches of {rows} rows ({before} processes with {old[BATCH_SIZE]}), with "
            f"which the run was started; resume on {', '.join(possible)} processes."
        )
    args.per_device_train_batch_size = rows // now
    message = "%d processes with %d rows each until now, %d with %d from here: a batch has %d rows, as before."
    logger.info(message, before, old[BATCH_SIZE], now, args.per_device_train_batch_size, rows)
    return True

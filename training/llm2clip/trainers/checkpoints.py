"""The newest complete checkpoint of a run, and where a run starts from."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2clip.trainers.base_config import StageConfig

logger = logging.getLogger(__name__)

# The Trainer writes it last: a checkpoint without it is incomplete.
CHECKPOINT_MARK = "trainer_state.json"
RESULT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Find the newest complete checkpoint of a run, ignoring one that a killed process left half-written."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = {path.name.removeprefix(prefix): path for path in Path(output_dir).glob(f"{prefix}*")}
    for step in sorted(filter(str.isdecimal, found), key=int, reverse=True):
        if (found[step] / CHECKPOINT_MARK).is_file():
            return found[step]
        logger.warning("%s is incomplete (no %s) and is ignored.", found[step], CHECKPOINT_MARK)
    return None


def resume_point(args: StageConfig, resume: bool) -> str | None:
    """Decide which checkpoint a run starts from.

    Args:
        args: The settings of the run.
        resume: Resume from the newest checkpoint, if there is one.

    Raises:
        FileExistsError: The folder contains a run and `resume` is off.
    """
    if args.resume_from_checkpoint:
        return args.resume_from_checkpoint
    found = last_checkpoint(args.output_dir)
    if resume:
        if found is None:
            logger.info("no checkpoint to resume from in %s: starting from the beginning.", args.output_dir)
        return None if found is None else str(found)
    results = [name for name in RESULT_FILES if Path(args.output_dir, name).exists()]
    if found is not None or results:
        raise FileExistsError(
            f"{args.output_dir} already contains a run ({found.name if found else results[0]}); add --resume to "
            "continue it, or choose another output_dir."
        )
    return None

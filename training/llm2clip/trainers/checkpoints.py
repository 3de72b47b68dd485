"""The newest whole checkpoint of a run, and where a run starts from."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2clip.trainers.base_config import StageConfig
from llm2clip.trainers.run_settings import check_settings, write_settings
from llm2clip.utils.manifests import FOLDER_MANIFEST, damage, write_manifest

logger = logging.getLogger(__name__)

RESULT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def _by_step(output_dir: str | Path) -> dict[int, Path]:
    """Find the checkpoints of a run, whole or not, from the newest to the oldest step."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = {path.name.removeprefix(prefix): path for path in Path(output_dir).glob(f"{prefix}*")}
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int, reverse=True)}


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """Find the newest whole checkpoint of a run; a damaged or half-written one is passed over with a warning."""
    for checkpoint in _by_step(output_dir).values():
        if (fault := damage(checkpoint)) is None:
            return checkpoint
        logger.warning("%s is incomplete or damaged (%s) and is passed over.", checkpoint, fault)
    return None


def begin_checkpoint(checkpoint: Path) -> None:
    """Mark a checkpoint as incomplete while its files are written, perhaps over those of a damaged one."""
    (checkpoint / FOLDER_MANIFEST).unlink(missing_ok=True)


def finish_checkpoint(checkpoint: Path, limit: int | None, best: str | None) -> None:
    """Mark a checkpoint as whole, and then delete the oldest whole ones.

    Args:
        limit: Number of whole checkpoints to keep; None or 0 keeps all.
        best: A checkpoint that is kept in any case.
    """
    write_manifest(checkpoint, "training")
    if not limit or limit < 0:
        return
    manifests = [path / FOLDER_MANIFEST for path in _by_step(checkpoint.parent).values()]
    # By time and not by step: a run that started again from an earlier checkpoint keeps its own.
    written = sorted((path for path in manifests if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    kept = {checkpoint.name, Path(best).name if best else checkpoint.name}
    others = [path.parent for path in written if path.parent.name not in kept]
    for old in others[: max(0, len(others) + len(kept) - limit)]:
        shutil.rmtree(old, ignore_errors=True)


def resume_point(args: StageConfig, resume: bool) -> str | None:
    """Decide which checkpoint a run starts from, compare the settings with those of that run, and store them.

    Args:
        args: The settings of the run.
        resume: Resume from the newest whole checkpoint, if there is one.

    Raises:
        FileExistsError: The folder contains a run and `resume` is off.
        ValueError: The checkpoint that `resume_from_checkpoint` names is damaged, or the settings differ; see
            [`check_settings`].
    """
    checkpoint = _checkpoint(args, resume)
    if checkpoint is not None:
        check_settings(args, Path(checkpoint).parent)
    write_settings(args)
    return checkpoint


def _checkpoint(args: StageConfig, resume: bool) -> str | None:
    named = args.resume_from_checkpoint
    if named:
        # A checkpoint that another Trainer wrote has no manifest.
        if (Path(named) / FOLDER_MANIFEST).exists() and (fault := damage(Path(named))) is not None:
            raise ValueError(f"{named} is damaged ({fault}); name another checkpoint, or --resume to find one.")
        return named
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

"""The whole checkpoints of a run, and the one that a run starts from."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2clip.hub.sentence_transformers import NORMALIZE_FOLDER
from llm2clip.hub.upload_files import model_files
from llm2clip.trainers.base_config import StageConfig
from llm2clip.utils.manifests import FOLDER_MANIFEST, damage, write_manifest
from llm2clip.utils.processes import on_main_process

logger = logging.getLogger(__name__)

COMMAND = "training"
SETTINGS = "settings.json"
RESULT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def _by_step(output_dir: str | Path) -> dict[int, Path]:
    """Find the checkpoints of a run, whole or not, from the newest to the oldest step."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = {path.name.removeprefix(prefix): path for path in Path(output_dir).glob(f"{prefix}*")}
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int, reverse=True)}


def last_checkpoint(output_dir: str | Path, contents: bool = True) -> Path | None:
    """Find the newest whole checkpoint of a run; a damaged or half-written one is skipped with a warning.

    Args:
        contents: Compare checksums, which the main process does for all; otherwise only sizes.
    """
    if contents:
        return on_main_process(partial(_last_whole, output_dir, _changes))
    return _last_whole(output_dir, damage)


def _last_whole(output_dir: str | Path, fault_of: Callable[[Path], str | None]) -> Path | None:
    for checkpoint in _by_step(output_dir).values():
        if (fault := fault_of(checkpoint)) is None:
            return checkpoint
        logger.warning("Skipping %s: incomplete or damaged (%s).", checkpoint, fault)
    return None


def _changes(checkpoint: Path) -> str | None:
    """Return what differs between a checkpoint and its manifest, in words, or None if it is whole."""
    if (fault := damage(checkpoint)) is not None:
        return fault
    found = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return _changed_content(checkpoint, tuple((path, *_state(path)) for path in found))


def _state(path: Path) -> tuple[int, int, int]:
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns


# The command of a stage reads a checkpoint, and so does its trainer, minutes later.
@lru_cache(maxsize=4)
def _changed_content(checkpoint: Path, files: tuple[tuple[Path, int, int, int], ...]) -> str | None:
    return damage(checkpoint, contents=True)


def begin_checkpoint(checkpoint: Path) -> None:
    """Mark a checkpoint as incomplete while its files are written, perhaps over those of a damaged one."""
    (checkpoint / FOLDER_MANIFEST).unlink(missing_ok=True)


def finish_checkpoint(checkpoint: Path, limit: int | None, best: str | None) -> None:
    """Mark a checkpoint as whole, and then delete the oldest whole ones.

    Args:
        limit: Number of whole checkpoints to keep; None or 0 keeps all.
        best: A checkpoint that is kept in any case.
    """
    write_manifest(checkpoint, COMMAND)
    if not limit or limit < 0:
        return
    manifests = [path / FOLDER_MANIFEST for path in _by_step(checkpoint.parent).values()]
    # By time and not by step: a run that started again from an earlier checkpoint keeps its own.
    written = sorted((path for path in manifests if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    kept = {checkpoint.name, Path(best).name if best else checkpoint.name}
    others = [path.parent for path in written if path.parent.name not in kept]
    for old in others[: max(0, len(others) + len(kept) - limit)]:
        shutil.rmtree(old, ignore_errors=True)


def unlist_result(args: StageConfig) -> None:
    """Delete the list of an earlier result, which the run replaces."""
    if args.should_save:
        Path(args.output_dir, FOLDER_MANIFEST).unlink(missing_ok=True)


def list_result(args: StageConfig) -> None:
    """List the saved model of a finished run with checksums, which `llm2clip build` and `push` compare."""
    if args.should_save:
        folder = Path(args.output_dir)
        names = [name for name in model_files(folder).uploaded if Path(name).parts[0] in (name, NORMALIZE_FOLDER)]
        state = [name for name in (TRAINER_STATE_NAME, SETTINGS) if (folder / name).is_file()]
        write_manifest(folder, COMMAND, [*names, *state])


def resume_point(args: StageConfig, resume: bool) -> str | None:
    """Choose the checkpoint from which the command of a stage starts, or None for the beginning.

    Args:
        args: The settings of the run.
        resume: Resume from the newest whole checkpoint, if there is one.

    Raises:
        FileExistsError: The folder contains a run and `resume` is off.
    """
    if args.resume_from_checkpoint:
        return args.resume_from_checkpoint
    found = last_checkpoint(args.output_dir, contents=resume)
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


def named_checkpoint(args: StageConfig, resume_from_checkpoint: str | bool | None) -> str | None:
    """Choose the checkpoint that the argument of `Trainer.train` names, where True is the newest whole one.

    Raises:
        ValueError: There is no whole checkpoint.
    """
    if resume_from_checkpoint is not True:
        return resume_from_checkpoint or None
    found = last_checkpoint(args.output_dir)
    if found is None:
        raise ValueError(f"there is no whole checkpoint to resume from in {args.output_dir}.")
    return str(found)


def refuse_damaged(checkpoint: str) -> None:
    """Raise a `ValueError` if a checkpoint is damaged. One that another Trainer wrote has no manifest."""

    def fault_of(folder: Path) -> str | None:
        return _changes(folder) if (folder / FOLDER_MANIFEST).exists() else None

    if (fault := on_main_process(partial(fault_of, Path(checkpoint)))) is not None:
        raise ValueError(f"{checkpoint} is damaged ({fault}); name another checkpoint, or --resume to find one.")

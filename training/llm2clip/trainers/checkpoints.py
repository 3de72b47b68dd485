"""Checkpoints and results of a run: when one is whole, which is the newest, and which are deleted.

What is written last lists the files of a folder, with checksums: it is then whole.
"""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2clip.command_line.processes import on_main_process
from llm2clip.files.manifests import FOLDER_MANIFEST, damage, write_manifest
from llm2clip.hub.upload_files import model_files
from llm2clip.trainers.base_config import StageConfig
from modeling_llm2clip.modeling_llm2clip_utils import TEXT_MODEL

logger = logging.getLogger(__name__)

COMMAND = "training"
SETTINGS = "settings.json"
# Folders of sentence-transformers' modules in the folder of a model.
MODULE_FOLDERS = "[0-9]_*"


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


def last_checkpoint(output_dir: str | Path, contents: bool = True) -> Path | None:
    """Find the newest whole checkpoint of a run; a damaged or half-written one is skipped with a warning.

    Args:
        contents: Compare checksums, which the main process does for all; otherwise only sizes.
    """
    return on_main_process(partial(_last_whole, output_dir, True)) if contents else _last_whole(output_dir, False)


def _last_whole(output_dir: str | Path, contents: bool) -> Path | None:
    for checkpoint in _by_step(output_dir).values():
        if (fault := damage(checkpoint, contents=contents)) is None:
            return checkpoint
        logger.warning("Skipping %s: incomplete or damaged (%s).", checkpoint, fault)
    return None


def _by_step(output_dir: str | Path) -> dict[int, Path]:
    """Find the checkpoints of a run, whole or not, from the newest to the oldest step."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    by_step = {path.name.removeprefix(prefix): path for path in Path(output_dir).glob(f"{prefix}*")}
    return {int(step): by_step[step] for step in sorted(filter(str.isdecimal, by_step), key=int, reverse=True)}


def unregister_result(args: StageConfig) -> None:
    """Delete the list of an earlier result, which the run replaces."""
    if args.should_save:
        Path(args.output_dir, FOLDER_MANIFEST).unlink(missing_ok=True)


def register_result(args: StageConfig) -> None:
    """List the saved model of a finished run with checksums, which `llm2clip build` and `push` compare."""
    if args.should_save:
        register_model(Path(args.output_dir))


def register_model(folder: Path) -> None:
    """List a saved model with checksums; called in the main process."""
    names = [
        name
        for name in model_files(folder).uploaded
        if Path(name).parent in (Path(), Path(TEXT_MODEL)) or Path(name).parent.match(MODULE_FOLDERS)
    ]
    state = [name for name in (TRAINER_STATE_NAME, SETTINGS) if (folder / name).is_file()]
    write_manifest(folder, COMMAND, [*names, *state])


def is_whole(folder: Path) -> bool:
    """Tell whether a folder has a finished and undamaged result."""
    return (folder / FOLDER_MANIFEST).is_file() and damage(folder, contents=True) is None

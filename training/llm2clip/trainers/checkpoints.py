"""The whole checkpoints of a run, and the one that a run starts from."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2clip.hub.upload_files import model_files
from llm2clip.trainers.base_config import StageConfig
from llm2clip.utils.manifests import FOLDER_MANIFEST, damage, write_manifest
from llm2clip.utils.processes import on_main_process
from modeling_llm2clip.modeling_llm2clip_utils import TEXT_MODEL

logger = logging.getLogger(__name__)

COMMAND = "training"
SETTINGS = "settings.json"
# Of sentence-transformers, in the folder of a model.
MODULE_FOLDERS = "[0-9]_*"
RESULT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")


def _by_step(output_dir: str | Path) -> dict[int, Path]:
    """Find the checkpoints of a run, whole or not, from the newest to the oldest step."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    by_step = {path.name.removeprefix(prefix): path for path in Path(output_dir).glob(f"{prefix}*")}
    return {int(step): by_step[step] for step in sorted(filter(str.isdecimal, by_step), key=int, reverse=True)}


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


def choose_checkpoint(args: StageConfig, resume: str | bool | None, is_command: bool) -> Path | None:
    """Choose the checkpoint from which a run starts, or None for the beginning.

    Args:
        resume: The folder of a checkpoint, or True for the newest whole one in `output_dir`.
        is_command: The run is that of a command, which refuses the folder of another run, and with True begins if
            there is no checkpoint yet; `Trainer.train` does neither.

    Raises:
        FileExistsError: A command without `resume` is to write into the folder of a run, or one with it into that of
            a finished run without a whole checkpoint.
        ValueError: The checkpoint is damaged or has no state of the optimizer, or there is none.
    """
    if isinstance(resume, str | Path):
        # One that another Trainer wrote has no manifest.
        checkpoint = Path(resume)
        if not checkpoint.is_dir():
            raise ValueError(f"there is no checkpoint {resume}.")
        find = partial(damage, checkpoint, contents=True)
        fault = on_main_process(find) if (checkpoint / FOLDER_MANIFEST).exists() else None
        if fault is not None:
            raise ValueError(f"{resume} is damaged ({fault}); name another checkpoint, or --resume to find one.")
        return _with_optimizer(checkpoint)
    if not resume:
        if is_command:
            _refuse_run(args)
        return None
    newest = last_checkpoint(args.output_dir)
    if newest is None and not is_command:
        raise ValueError(f"there is no whole checkpoint to resume from in {args.output_dir}.")
    if newest is not None:
        return _with_optimizer(newest)
    _refuse_finished(args)
    logger.info("no checkpoint to resume from in %s: starting from the beginning.", args.output_dir)
    return None


def _with_optimizer(checkpoint: Path) -> Path:
    if not any(checkpoint.glob("optimizer*")):
        raise ValueError(
            f"{checkpoint} has the model alone, as save_only_model saves it: optimizer and schedule would begin anew. "
            "Name a checkpoint that has their states, or start a new run from this model in another output_dir."
        )
    return checkpoint


def _refuse_finished(args: StageConfig) -> None:
    if Path(args.output_dir, FOLDER_MANIFEST).exists():
        raise FileExistsError(
            f"{args.output_dir} contains a finished run without a whole checkpoint: there is nothing to continue. "
            "Choose another output_dir, or delete this one to train again."
        )


def _refuse_run(args: StageConfig) -> None:
    newest = last_checkpoint(args.output_dir, contents=False)
    results = [name for name in RESULT_FILES if Path(args.output_dir, name).exists()]
    if newest is None:
        _refuse_finished(args)
    if newest is not None or results:
        raise FileExistsError(
            f"{args.output_dir} already contains a run ({newest.name if newest else results[0]}); add --resume to "
            f"{'continue it' if newest else 'begin it again'}, or choose another output_dir."
        )


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


def unregister_result(args: StageConfig) -> None:
    """Delete the list of an earlier result, which the run replaces."""
    if args.should_save:
        Path(args.output_dir, FOLDER_MANIFEST).unlink(missing_ok=True)


def list_result(args: StageConfig) -> None:
    """List the saved model of a finished run with checksums, which `llm2clip build` and `push` compare."""
    if args.should_save:
        list_model(Path(args.output_dir))


def list_model(folder: Path) -> None:
    """List a saved model with checksums; called in the main process."""
    names = [
        name
        for name in model_files(folder).uploaded
        if Path(name).parent in (Path(), Path(TEXT_MODEL)) or Path(name).parent.match(MODULE_FOLDERS)
    ]
    state = [name for name in (TRAINER_STATE_NAME, SETTINGS) if (folder / name).is_file()]
    write_manifest(folder, COMMAND, [*names, *state])


def is_whole(folder: Path) -> bool:
    """Whether a folder has a finished and undamaged result."""
    return (folder / FOLDER_MANIFEST).is_file() and damage(folder, contents=True) is None

"""The run around a training: its folder, which no other run uses meanwhile, settings, inputs, and where it starts."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2clip.command_line.processes import on_main_process
from llm2clip.command_line.settings import require
from llm2clip.files.atomic import read_json, remove_unfinished, write_json
from llm2clip.files.locks import run_lock
from llm2clip.files.manifests import FOLDER_MANIFEST, damage
from llm2clip.trainers.base_config import StageConfig, affects_numbers
from llm2clip.trainers.checkpoints import MODULE_FOLDERS, SETTINGS, last_checkpoint, register_result, unregister_result
from llm2clip.trainers.joint_recipe import TOWERS
from llm2clip.trainers.run_state import INPUTS, read_run_state
from llm2clip.trainers.sharding import require_sharding

logger = logging.getLogger(__name__)

RESULT_FILES = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
PROCESSES, BATCH_SIZE = "number of processes", "per_device_train_batch_size"
# What a checkpoint's state of the optimizer belongs to.
OPTIMIZER_KIND = {"optim", "optim_args", "optim_target_modules"}
MAX_LENGTH = 200
HOW_TO_RESUME_ANYWAY = "add --resume-anyway (in Python, resume_anyway=True)"


class RunContext:
    """Within `with RunContext(args, resume) as run`, a run has `args.output_dir` to itself.

    Args:
        args: The settings of the run. On another number of processes than before, the batch of each becomes its share
            of the batch of the run.
        resume: The folder of a checkpoint, or True for the newest whole one in `output_dir`.
        is_command: The run is that of a command: it is refused in the folder of another run, begins with `resume=True`
            if there is no checkpoint yet, and stores its settings in its folder.
        elastic: Whether the data can be read by another number of processes.

    Attributes:
        checkpoint: Where the run starts; None at the beginning.
        settings: The settings of the run as JSON.
        changed: Names of the settings that differ from those of the run that is continued.
        inputs: What the run reads, by name in words; see [`compare_inputs`].
        is_open: Whether the run has begun and not ended.

    Raises:
        ValueError: On entering: another run uses the folder; the checkpoint is damaged, has no state of the optimizer,
            or there is none; settings differ that change the trained numbers (unless `resume_anyway`); or the run
            would not be sharded as it asks.
        FileExistsError: On entering: the folder contains another run.
    """

    def __init__(
        self, args: StageConfig, resume: str | bool | None = None, is_command: bool = False, elastic: bool = True
    ) -> None:
        self.args, self.resume, self.is_command, self.elastic = args, resume, is_command, elastic
        self.checkpoint: Path | None = None
        self.is_open = False
        self.changed: set[str] = set()
        self.settings: dict[str, Any] = {}
        self.inputs: dict[str, Any] = {}
        # Settings that a run keeps on another number of processes.
        self._kept: dict[str, Any] = {}
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> RunContext:
        args, folder = self.args, Path(self.args.output_dir)
        require_sharding(args)
        with contextlib.ExitStack() as stack:
            stack.enter_context(run_lock(args.output_dir))
            if args.should_save:
                for written in (folder, *folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), *folder.glob(MODULE_FOLDERS)):
                    remove_unfinished(written)
            self.checkpoint = self._choose_checkpoint()
            if self.checkpoint is not None:
                self.compare_settings(self.checkpoint)
            self.settings = {**_as_json(args), **self._kept}
            if self.is_command and args.should_save:
                self._store_settings(folder / SETTINGS)
            self._lock = stack.pop_all()
        self.is_open = True
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and self.is_command:
            register_result(self.args)
        self.is_open = False
        self._lock.close()

    def at_end(self, function: Callable[[], None]) -> None:
        """Call a function when the run ends, also with an error."""
        self._lock.callback(function)

    def _store_settings(self, path: Path) -> None:
        with contextlib.suppress(OSError, ValueError):
            if read_json(path) == self.settings:
                return
        unregister_result(self.args)  # the list of a finished run has the checksum of its settings
        write_json(path, self.settings)

    def _choose_checkpoint(self) -> Path | None:
        if isinstance(self.resume, str | Path):
            checkpoint = Path(self.resume)
            if not checkpoint.is_dir():
                raise ValueError(f"there is no checkpoint {checkpoint}.")
            # One that another Trainer wrote has no manifest.
            find = partial(damage, checkpoint, contents=True)
            fault = on_main_process(find) if (checkpoint / FOLDER_MANIFEST).exists() else None
            if fault is not None:
                raise ValueError(
                    f"{checkpoint} is damaged ({fault}); name another checkpoint, or --resume to find one."
                )
            return _with_optimizer(checkpoint)
        folder = self.args.output_dir
        if not self.resume:
            if self.is_command:
                _require_no_run(Path(folder))
            return None
        if (newest := last_checkpoint(folder)) is not None:
            return _with_optimizer(newest)
        if not self.is_command:
            raise ValueError(f"there is no whole checkpoint to resume from in {folder}.")
        _require_unfinished(Path(folder))
        logger.info("no checkpoint to resume from in %s: starting from the beginning.", folder)
        return None

    def compare_settings(self, folder: Path) -> None:
        """Compare the settings with those that are stored in a folder, and print what differs.

        Raises:
            ValueError: A setting differs that changes the trained numbers, and `resume_anyway` is off; or the
                processes cannot share the batch of the run.
        """
        path = folder / SETTINGS
        if not path.is_file():
            logger.warning("%s is missing: the settings of the resumed run cannot be compared with these.", path)
            return
        old = read_json(path)
        continued = self.elastic and keep_global_batch(self.args, old)
        new = _as_json(self.args)
        # Another version of transformers may have other settings.
        self.changed = {name for name in new if name in old and old[name] != new[name]}
        lines = {name: f"{name}: {_short(old[name])} -> {_short(new[name])}" for name in sorted(self.changed)}
        for line in lines.values():
            logger.info("changed since the run was started: %s", line)
        free = {field.name for field in fields(self.args) if not affects_numbers(field)}
        if not self.elastic:  # it decides which worker yields which row
            free.discard("dataloader_num_workers")
        if continued:  # what follows from the number of processes, and from the memory that a larger batch needs
            free |= {PROCESSES, BATCH_SIZE, "tower_chunk_size"}
        breaking = [line for name, line in lines.items() if name not in free]
        if breaking and not self.args.resume_anyway:
            raise ValueError(
                f"the run of {folder} was started with other settings ({'; '.join(breaking)}), so that it would not "
                f"end as an uninterrupted one; resume with its settings, or {HOW_TO_RESUME_ANYWAY}."
            )
        if fixed := [lines[name] for name in lines if name in OPTIMIZER_KIND]:
            raise ValueError(f"a resumed run goes on with the optimizer of {folder} ({'; '.join(fixed)}); leave it.")
        self._kept = {name: old[name] for name in (PROCESSES, BATCH_SIZE)} if continued else {}

    def compare_inputs(self, read: Callable[[], Mapping[str, Any]]) -> None:
        """Compare what the run reads with what it read before; called in all processes.

        Args:
            read: Returns it by name in words; called in the main process.

        Raises:
            ValueError: Something differs, and `resume_anyway` is off.
        """
        self.inputs = on_main_process(lambda: self._compared(dict(read())))

    def _compared(self, now: dict[str, Any]) -> dict[str, Any]:
        if self.checkpoint is None:
            return now
        old = read_run_state(self.checkpoint).get(INPUTS)
        if old is None:
            logger.warning(
                "%s does not say what data it was trained on, so that these are not compared.", self.checkpoint
            )
            return now
        lines = [f"{name}: {old[name]} -> {now[name]}" for name in now if name in old and old[name] != now[name]]
        for line in lines:
            logger.info("changed since the run was started: %s", line)
        if lines and not self.args.resume_anyway:
            raise ValueError(
                f"the run of {self.checkpoint} had other inputs ({'; '.join(lines)}), so that it would not end as an "
                f"uninterrupted one; restore them, or {HOW_TO_RESUME_ANYWAY}."
            )
        return now


def compare_finished(part: Any, folder: Path) -> None:
    """Compare the settings of a finished part of a recipe with those that its folder says it was run with.

    Raises:
        ValueError: A setting differs that changes its result.
    """
    is_training = isinstance(part, StageConfig)
    if is_training:
        RunContext(part).compare_settings(folder)
    # The part is not run, so that nothing else compares the towers that it began with.
    names = list(TOWERS)
    if not is_training:
        names += [field.name for field in fields(part) if affects_numbers(field)]
    old, new = read_json(folder / SETTINGS), {name: getattr(part, name, None) for name in names}
    new = json.loads(json.dumps(new))
    if changed := [name for name in names if old.get(name) != new[name]]:
        lines = "; ".join(f"{name}: {_short(old.get(name))} -> {_short(new[name])}" for name in changed)
        raise ValueError(f"{folder} was made with other settings ({lines}); delete it, or use another output_dir.")


def stage_command(*required: str) -> Callable[[Callable[[Any, RunContext], Any]], Callable[..., Any]]:
    """Decorate the work of a stage's command, which becomes `run(config, resume=False)`.

    The work is called with its settings, of which `required` must be set, in the context of its run, from before the
    models are loaded to the saved result.
    """

    def decorate(work: Callable[[Any, RunContext], Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def run(config: StageConfig, resume: bool = False) -> Any:
            require(config, required)
            with RunContext(config, config.resume_from_checkpoint or resume, is_command=True) as context:
                return work(config, context)

        return run

    return decorate


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


def _as_json(args: StageConfig) -> dict[str, Any]:
    names = {field.name for field in fields(args) if field.init and field.name != "hub_token"}
    values = {name: value for name, value in args.to_dict().items() if name in names}
    # As JSON has them: tuples are lists, keys are strings.
    return json.loads(json.dumps({**values, PROCESSES: args.world_size}, default=str))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}..."


def _with_optimizer(checkpoint: Path) -> Path:
    if not any(checkpoint.glob("optimizer*")):
        raise ValueError(
            f"{checkpoint} has the model alone, as save_only_model saves it: optimizer and schedule would begin anew. "
            "Name a checkpoint that has their states, or start a new run from this model in another output_dir."
        )
    return checkpoint


def _require_unfinished(folder: Path) -> None:
    if (folder / FOLDER_MANIFEST).exists():
        raise FileExistsError(
            f"{folder} contains a finished run without a whole checkpoint: there is nothing to continue. "
            "Choose another output_dir, or delete this one to train again."
        )


def _require_no_run(folder: Path) -> None:
    newest = last_checkpoint(folder, contents=False)
    results = [name for name in RESULT_FILES if (folder / name).exists()]
    if newest is None:
        _require_unfinished(folder)
    if newest is not None or results:
        raise FileExistsError(
            f"{folder} already contains a run ({newest.name if newest else results[0]}); add --resume to "
            f"{'continue it' if newest else 'begin it again'}, or choose another output_dir."
        )

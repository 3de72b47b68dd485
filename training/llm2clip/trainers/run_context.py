"""The context of a run: its folder, which no other run uses meanwhile, its settings, and where it starts."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2clip.trainers.base_config import StageConfig
from llm2clip.trainers.checkpoints import MODULE_FOLDERS, SETTINGS, choose_checkpoint, list_result, unregister_result
from llm2clip.trainers.run_state import INPUTS, read_run_state
from llm2clip.trainers.sharding import require_sharding
from llm2clip.utils.files import read_json, remove_unfinished, write_json
from llm2clip.utils.locks import run_lock
from llm2clip.utils.processes import on_main_process
from llm2clip.utils.settings import require

logger = logging.getLogger(__name__)

# Settings that do not change the trained parameters. All others break the promise that a resumed run ends as an
# uninterrupted one.
FREE = {
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "push_to_hub", "verify_cache"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("dataloader_persistent_workers", "per_device_eval_batch_size", "prediction_loss_only", "batch_eval_metrics"),
    *("resume_from_checkpoint", "resume_anyway", "restore_callback_states_from_checkpoint"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
    "activation_checkpointing_kwargs",
    *("teacher_rows", "into"),
    *("frozen_states_dir", "bundle_text_model", "ddp_timeout", "skip_memory_metrics", "local_rank", "debug"),
    *("torch_empty_cache_steps", "jit_mode_eval"),
}
# Where something is: what it is, is compared as an input of the run, or by the store that is opened.
LOCATIONS = {
    *("model", "model_name_or_path", "vision_model_name_or_path", "text_model_name_or_path"),
    "image_processor_name_or_path",
    *("model_revision", "vision_model_revision", "text_model_revision"),
    *("feature_cache", "embedding_cache", "eval_embedding_cache"),
}
# What a checkpoint's state of the optimizer belongs to.
FIXED = {"optim", "optim_args", "optim_target_modules"}
FREE_PREFIXES = ("log_", "logging_", "hub_", "save_", "eval_", "do_", "include_", "trackio_")
# In an iterable data set of others, it decides which worker yields which row.
ORDERING = {"dataloader_num_workers"}
PROCESSES, BATCH_SIZE = "number of processes", "per_device_train_batch_size"
# Settings that may differ on another number of processes: those that follow from it, and from the memory that a larger
# batch on each needs.
FOLLOWING = {PROCESSES, BATCH_SIZE, "tower_chunk_size"}
MAX_LENGTH = 200
ANYWAY = "add --resume-anyway (in Python, resume_anyway=True)"


class RunContext:
    """Within `with RunContext(args, resume) as run`, a run has `args.output_dir` to itself.

    Args:
        args: The settings of the run. On another number of processes than before, the batch of each becomes its share
            of the batch of the run.
        resume: See [`choose_checkpoint`].
        is_command: The run is that of a command, which is refused in the folder of another run, and stores its
            settings in its folder.
        elastic: Whether the data can be read by another number of processes.

    Attributes:
        checkpoint: Where the run starts; None at the beginning.
        settings: The settings of the run as JSON.
        changed: Names of the settings that differ from those of the run that is continued.
        is_open: Whether the run has begun and not ended.

    Raises:
        ValueError: On entering: another run uses the folder, the checkpoint is damaged, settings differ that change
            the trained parameters (unless `resume_anyway`), or the run would not be sharded as it asks.
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
        # Of a run that goes on on other processes, which keeps its own.
        self._kept: dict[str, Any] = {}
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> RunContext:
        args = self.args
        require_sharding(args)
        with contextlib.ExitStack() as stack:
            stack.enter_context(run_lock(args.output_dir))
            if args.should_save:
                folder = Path(args.output_dir)
                for written in (folder, *folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), *folder.glob(MODULE_FOLDERS)):
                    remove_unfinished(written)
            self.checkpoint = choose_checkpoint(args, self.resume, self.is_command)
            if self.checkpoint is not None:
                self.compare_settings(self.checkpoint)
            self.take_settings()
            if self.is_command and args.should_save:
                self._store_settings()
            self._lock = stack.pop_all()
        self.is_open = True
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None and self.is_command:
            list_result(self.args)
        self.is_open = False
        self._lock.close()

    def at_end(self, function: Callable[[], None]) -> None:
        """Call a function when the run ends, also with an error."""
        self._lock.callback(function)

    def take_settings(self) -> None:
        """Take the settings as they are now for those of the run."""
        self.settings = {**_as_json(self.args), **self._kept}

    def _store_settings(self) -> None:
        path = Path(self.args.output_dir) / SETTINGS
        with contextlib.suppress(OSError, ValueError):
            if read_json(path) == self.settings:
                return
        unregister_result(self.args)  # the list of a finished run has the checksum of its settings
        write_json(path, self.settings)

    def save(self, checkpoint: Path) -> None:
        """Store the settings in a checkpoint too; called in the main process."""
        write_json(checkpoint / SETTINGS, self.settings)

    def compare_settings(self, folder: Path) -> None:
        """Compare the settings with those that are stored in a folder, and print what differs.

        Raises:
            ValueError: A setting differs that changes the trained parameters, and `resume_anyway` is off; or the
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
        changed = {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}
        lines = {name: f"{name}: {_short(before)} -> {_short(now)}" for name, (before, now) in changed.items()}
        for line in lines.values():
            logger.info("changed since the run was started: %s", line)
        self.changed = {name for name, (before, now) in changed.items() if _compared(before) != _compared(now)}
        free = (FREE | LOCATIONS) - (set() if self.elastic else ORDERING) | (FOLLOWING if continued else set())
        breaking = [
            line for name, line in lines.items()
            if name in self.changed and name not in free and not name.startswith(FREE_PREFIXES)
        ]  # fmt: skip
        if breaking and not self.args.resume_anyway:
            raise ValueError(
                f"the run of {folder} was started with other settings ({'; '.join(breaking)}), so that it would not "
                f"end as an uninterrupted one; resume with its settings, or {ANYWAY}."
            )
        if fixed := [lines[name] for name in lines if name in FIXED]:
            raise ValueError(f"a resumed run goes on with the optimizer of {folder} ({'; '.join(fixed)}); leave it.")
        self._kept = {name: old[name] for name in (PROCESSES, BATCH_SIZE)} if continued else {}

    def compare_inputs(self, read: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Compare what the run reads with what it read before; called in all processes.

        Args:
            read: Returns it by name in words; called in the main process.

        Returns:
            What `read` returned.

        Raises:
            ValueError: Something differs, and `resume_anyway` is off.
        """
        return on_main_process(lambda: self._compare_inputs(dict(read())))

    def _compare_inputs(self, now: dict[str, Any]) -> dict[str, Any]:
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
                f"uninterrupted one; restore them, or {ANYWAY}."
            )
        return now


def compare_finished(part: Any, folder: Path) -> None:
    """Compare the settings of a finished part of a recipe with those that its folder says it was run with.

    Raises:
        ValueError: A setting differs that changes its result.
    """
    if isinstance(part, StageConfig):
        RunContext(part).compare_settings(folder)
        return
    old, new = read_json(folder / SETTINGS), json.loads(json.dumps(asdict(part)))
    changed = [name for name in new.keys() - FREE - LOCATIONS if _compared(old.get(name)) != _compared(new[name])]
    if changed:
        lines = "; ".join(f"{name}: {_short(old.get(name))} -> {_short(new[name])}" for name in sorted(changed))
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


def _compared(value: Any) -> Any:
    """Return what of a setting is compared: of sources and a first part, all but where their files are."""
    if isinstance(value, dict):
        return {name: entry for name, entry in value.items() if name not in LOCATIONS}
    return [_compared(entry) for entry in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}..."

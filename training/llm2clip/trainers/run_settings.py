"""The settings of a run, stored beside its checkpoints: what has changed when it is resumed."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from llm2clip.trainers.base_config import StageConfig
from llm2clip.trainers.checkpoints import SETTINGS, unlist_result
from llm2clip.trainers.elastic import BATCH_SIZE, FOLLOWING, PROCESSES, keep_global_batch
from llm2clip.utils.files import read_json, write_json

logger = logging.getLogger(__name__)

# Settings that do not change the trained parameters. All others break the promise that a resumed run ends as an
# uninterrupted one.
FREE = {
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "push_to_hub", "verify_cache"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("dataloader_persistent_workers", "per_device_eval_batch_size", "prediction_loss_only", "batch_eval_metrics"),
    *("resume_from_checkpoint", "resume_anyway", "restore_callback_states_from_checkpoint"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing", "loss_chunk_size"),
    *("frozen_states_dir", "bundle_text_model", "ddp_timeout", "skip_memory_metrics", "local_rank", "debug"),
    *("bf16_full_eval", "fp16_full_eval", "torch_empty_cache_steps", "jit_mode_eval", "skip_bad_steps"),
}
# In an iterable data set of others, it decides which worker yields which row.
ORDERING = {"dataloader_num_workers"}
FREE_PREFIXES = ("log_", "logging_", "hub_", "save_", "eval_", "do_", "include_", "trackio_")
MAX_LENGTH = 200


def check_settings(args: StageConfig, checkpoint: Path, elastic: bool = True) -> dict[str, Any]:
    """Compare the settings of a resumed run with those of its checkpoint, and print what differs.

    On another number of processes, the batch of each is set so that all together have the batch of the run.

    Args:
        args: The present settings.
        checkpoint: A folder with settings.
        elastic: Whether the data can be read by another number of processes.

    Returns:
        The settings to store in place of the present ones: a run that other processes go on keeps its own.

    Raises:
        ValueError: A setting differs that changes the trained parameters, and `resume_anyway` is off.
    """
    path = checkpoint / SETTINGS
    if not path.is_file():
        logger.warning("%s is missing: the settings of the resumed run cannot be compared with these.", path)
        return {}
    old = read_json(path)
    continued = elastic and keep_global_batch(args, old)
    new = _settings(args)
    # Another version of transformers may have other settings.
    changed = {
        name: f"{name}: {_short(old[name])} -> {_short(new[name])}"
        for name in new
        if name in old and old[name] != new[name]
    }
    free = FREE if elastic else FREE - ORDERING
    if continued:
        free = free | FOLLOWING
    breaking = [line for name, line in changed.items() if name not in free and not name.startswith(FREE_PREFIXES)]
    for line in changed.values():
        logger.info("changed since the run was started: %s", line)
    if breaking and not args.resume_anyway:
        raise ValueError(
            f"the run of {checkpoint} was started with other settings ({'; '.join(breaking)}), so that it would not "
            "end as an uninterrupted one; resume with its settings, or add --resume-anyway "
            "(in Python, resume_anyway=True)."
        )
    return {name: old[name] for name in (PROCESSES, BATCH_SIZE)} if continued else {}


def copy_settings(args: StageConfig, checkpoint: Path) -> None:
    """Store the settings of a run in one of its checkpoints too."""
    write_json(checkpoint / SETTINGS, read_json(Path(args.output_dir) / SETTINGS))


def write_settings(args: StageConfig, kept: Mapping[str, Any] | None = None) -> None:
    """Store the settings of a run in its folder, those of [`check_settings`] in place of the present ones."""
    if not args.should_save:
        return
    path, settings = Path(args.output_dir) / SETTINGS, {**_settings(args), **(kept or {})}
    with contextlib.suppress(OSError, ValueError):
        if read_json(path) == settings:
            return
    unlist_result(args)  # the list of a finished run has these settings' checksum
    write_json(path, settings)


def _settings(args: StageConfig) -> dict[str, Any]:
    names = {field.name for field in fields(args) if field.init and field.name != "hub_token"}
    values = {name: value for name, value in args.to_dict().items() if name in names}
    # As JSON has them: tuples are lists, keys are strings.
    return json.loads(json.dumps({**values, PROCESSES: args.world_size}, default=str))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}..."

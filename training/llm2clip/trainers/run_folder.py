"""The folder of a run: one run at a time, whose settings are those of the run that it resumes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llm2clip.hub.sentence_transformers import NORMALIZE_FOLDER
from llm2clip.trainers.base_config import StageConfig
from llm2clip.trainers.checkpoints import list_result, refuse_damaged, resume_point
from llm2clip.trainers.run_settings import check_settings, write_settings
from llm2clip.trainers.sharding import refuse_unsharded
from llm2clip.utils.files import remove_unfinished
from llm2clip.utils.locks import run_lock
from llm2clip.utils.settings import require


@contextmanager
def run_folder(args: StageConfig, choose: Callable[[], str | None], elastic: bool = True) -> Iterator[str | None]:
    """Lock `output_dir`, choose the checkpoint to start from, compare the settings with its run's, and store them.

    A command enters it before it loads its models, and its trainer again: that finds the lock held and the settings
    equal.

    Args:
        args: The settings of the run.
        choose: Returns the checkpoint; called with the folder locked.
        elastic: Whether the data can be read by another number of processes.

    Raises:
        ValueError: Another run uses the folder, the checkpoint is damaged, the settings differ (see
            [`check_settings`]), or the run would not be sharded as it asks (see [`refuse_unsharded`]).
    """
    refuse_unsharded(args)
    with run_lock(args.output_dir):
        if args.should_save:
            folder = Path(args.output_dir)
            for written in (folder, *folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), folder / NORMALIZE_FOLDER):
                remove_unfinished(written)
        checkpoint, kept = choose(), {}
        if checkpoint is not None:
            refuse_damaged(checkpoint)
            kept = check_settings(args, Path(checkpoint), elastic)
        write_settings(args, kept)
        yield checkpoint


def stage_command(*required: str) -> Callable[[Callable[[Any, str | None], Any]], Callable[..., Any]]:
    """Decorate the work of a stage's command, which becomes `run(config, resume=False)`.

    The work is called with its settings, of which `required` must be set, and the checkpoint to start from, and has
    the folder of the run to itself, from before the models are loaded to the saved result.
    """

    def decorate(work: Callable[[Any, str | None], Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def run(config: StageConfig, resume: bool = False) -> Any:
            require(config, required)
            with run_folder(config, partial(resume_point, config, resume)) as checkpoint:
                result = work(config, checkpoint)
                list_result(config)
                return result

        return run

    return decorate

"""Pushing to the Hub during and after training, through [`Uploader`] as `llm2clip push` does."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy

from llm2clip.hub.cards.card import CARD, read_card
from llm2clip.hub.licenses import Base, bases_of, check_repo, license_model
from llm2clip.hub.upload import Uploader, explanation
from llm2clip.trainers.base_config import StageConfig
from llm2clip.trainers.checkpoints import SETTINGS
from llm2clip.trainers.model_card import made_from
from llm2clip.trainers.run_state import RUN_STATE
from llm2clip.trainers.weight_average import AVERAGE_FILE, WeightAverage
from llm2clip.utils.files import atomic_path
from llm2clip.utils.manifests import FOLDER_MANIFEST
from llm2clip.utils.repos import hub_ids, names_of

logger = logging.getLogger(__name__)

# Files of a checkpoint that are for resuming only.
TRAINING_STATE = (
    *("*.pt", "*.pth", "*.bin", "trainer_state.json", "*fsdp*", "optimizer*", AVERAGE_FILE, "README.md"),
    *(FOLDER_MANIFEST, SETTINGS, RUN_STATE),
)


class PushCallback(TrainerCallback):
    """Pushes checkpoints in the background as `hub_strategy` says, each with the card of the run.

    While an upload runs, later checkpoints are not pushed, unless `hub_always_push` is set.

    Args:
        publish: Copies the model of a checkpoint, and writes the card, into `output_dir`.
        uploader: Makes the connection to the repo of the run, with another token or revision if they are given.
    """

    def __init__(self, publish: Callable[[Path], None], uploader: Callable[..., Uploader]) -> None:
        self.publish, self.uploader = publish, uploader
        self.jobs: list[tuple[Uploader, Future[Any]]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.push_to_hub or not state.is_world_process_zero or args.hub_strategy == HubStrategy.END:
            return
        self.finish(wait=False)
        if self.jobs and not args.hub_always_push:
            return
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self.publish(checkpoint)
        is_step = args.save_strategy == SaveStrategy.STEPS
        message = f"Training in progress, {f'step {state.global_step}' if is_step else f'epoch {int(state.epoch)}'}"
        uploader = self.uploader()
        # The jobs of one client run one after the other.
        self.jobs.append((uploader, uploader.api.run_as_future(uploader.upload, Path(args.output_dir), message)))
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            job = uploader.api.run_as_future(uploader.upload_checkpoint, checkpoint, name, f"{message}, checkpoint")
            self.jobs.append((uploader, job))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()

    def upload(
        self, folder: Path, message: str, blocking: bool = True, token: str | None = None, revision: str | None = None
    ) -> Any:
        """Upload a folder after the uploads that run.

        Returns:
            See [`Uploader.upload`]; its `Future` unless `blocking`.

        Raises:
            ValueError: The Hub refuses, or the connection broke; the message names the command that pushes the folder.
        """
        self.finish()
        uploader = self.uploader(token, revision)
        if not blocking:
            return uploader.api.run_as_future(uploader.upload, folder, message)
        with push_error(folder, uploader.repo_id, uploader.revision):
            return uploader.upload(folder, message)

    def finish(self, wait: bool = True) -> None:
        """Wait for the uploads, unless `wait` is off, and warn about those that failed."""
        for uploader, job in [entry for entry in self.jobs if wait or entry[1].done()]:
            self.jobs.remove((uploader, job))
            if (error := job.exception()) is not None:
                reason = explanation(error, uploader.repo_id) or error
                logger.warning("pushing a checkpoint failed, a later push will replace it: %s", reason)


def uploader_of(args: StageConfig, repo_id: str, token: str | None = None, revision: str | None = None) -> Uploader:
    """Make the connection to a repo, by default with the token and the branch of the settings."""
    return Uploader(repo_id, revision=revision or args.hub_revision, token=token or args.hub_token)


def open_repo(
    args: StageConfig, model: Any, token: str | None, private: bool | None
) -> tuple[str, tuple[dict[str, str], list[Base]]]:
    """Create the repo of a run and its branch, before the first step.

    Returns:
        Its id; and the license of the model with the models that it is made from.

    Raises:
        ValueError: The Hub refuses, or the repo contains something else; or the license on the card in the output
            folder or in the repo, or the name of the repo, does not keep the license of a model that is trained.
    """
    folder = Path(str(args.output_dir))
    bases = bases_of(folder, made_from(args, model))
    stated = license_model({}, read_card(folder)[0], bases, str(folder / CARD))
    uploader = uploader_of(args, args.hub_model_id or folder.absolute().name, token)
    check_repo(uploader.repo_id, stated, bases, None)
    private = args.hub_private_repo if private is None else private
    repo = uploader.prepare(model.config.model_type, private).repo_id
    check_repo(repo, stated, bases, uploader.read_card())
    return repo, (stated, bases)


def publish_model(checkpoint: Path, folder: Path, write: Callable[[str], None], average: WeightAverage | None) -> None:
    """Copy the model of a checkpoint into the folder that is uploaded; `write` writes it with averaged weights."""
    copy_model(checkpoint, folder)
    if average is not None:
        with average.in_place(), tempfile.TemporaryDirectory() as scratch:
            write(scratch)
            copy_model(Path(scratch), folder)


def copy_model(checkpoint: Path, destination: Path) -> None:
    """Copy the files of a checkpoint into another folder, except those that are for resuming only."""
    ignore = shutil.ignore_patterns(*TRAINING_STATE)
    shutil.copytree(checkpoint, destination, ignore=ignore, copy_function=_copy_file, dirs_exist_ok=True)


def _copy_file(source: str, destination: str) -> str:
    """Copy a file that replaces an older one, so that a kill leaves one of the two whole."""
    with atomic_path(destination) as temporary:
        shutil.copyfile(source, temporary)
    return destination


@contextmanager
def push_error(folder: Path, repo: str, revision: str | None) -> Iterator[None]:
    """Within this context, the error of an upload says how to repeat it."""
    try:
        yield
    except ValueError as error:
        branch = f" --revision {revision}" if revision else ""
        raise ValueError(
            f"{error} The result is in {folder}; `llm2clip push {folder} {repo}{branch}` uploads it."
        ) from error


def check_pushing(args: StageConfig, llm: Any, result_needs_llm: bool, checkpoints_need_llm: bool) -> None:
    """Raise a `ValueError` before a run that would push a reference to an LLM in a local folder.

    Args:
        args: The settings of the run.
        llm: Hub id or folder of the LLM.
        result_needs_llm, checkpoints_need_llm: Whether they refer to the LLM instead of containing its weights.
    """
    local = [name for name in names_of(llm) if not hub_ids(name)]
    if not args.push_to_hub or not local:
        return
    llm = local[0]
    if result_needs_llm:
        raise ValueError(
            f"push_to_hub with the LLM in {llm}, a local folder that others cannot load: push the LLM first and name "
            "its Hub id, or include its weights in the result (stage 1: --save-format merged; stage 2: "
            "--bundle-text-model true)."
        )
    if checkpoints_need_llm and args.hub_strategy != HubStrategy.END:
        raise ValueError(
            f"checkpoints that are pushed during training refer to the LLM in {llm}, a local folder that others "
            "cannot load: push the LLM first and name its Hub id, or push the result alone (--hub-strategy end)."
        )

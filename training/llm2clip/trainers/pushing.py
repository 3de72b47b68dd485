"""Pushing to the Hub during and after training, through [`Uploader`] as `llm2clip push` does."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy

from llm2clip.hub.base_licenses import code_license
from llm2clip.hub.hub_errors import explanation
from llm2clip.hub.upload import Uploader
from llm2clip.trainers.checkpoints import SETTINGS
from llm2clip.trainers.weight_average import AVERAGE_FILE
from llm2clip.utils.files import atomic_path, write_text
from llm2clip.utils.manifests import FOLDER_MANIFEST
from llm2clip.utils.repos import hub_ids

logger = logging.getLogger(__name__)

# Files of a checkpoint that are for resuming only.
TRAINING_STATE = (
    *("*.pt", "*.pth", "*.bin", "trainer_state.json", "*fsdp*", "optimizer*", AVERAGE_FILE, "README.md"),
    *(FOLDER_MANIFEST, SETTINGS, "inputs.json", "stream.json"),
)


class PushCallback(TrainerCallback):
    """Writes the card before each push, and pushes checkpoints in the background as `hub_strategy` says.

    While an upload runs, later checkpoints are not pushed, unless `hub_always_push` is set.
    """

    def __init__(self, trainer: PushingTrainer) -> None:
        self.trainer = trainer
        self.jobs: list[Future[Any]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.push_to_hub or not state.is_world_process_zero or args.hub_strategy == HubStrategy.END:
            return
        self.finish(wait=False)
        if self.jobs and not args.hub_always_push:
            return
        checkpoint = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        self.trainer.publish_checkpoint(checkpoint)
        self.trainer.callback_handler.on_push_begin(args, state, control)
        is_step = args.save_strategy == SaveStrategy.STEPS
        message = f"Training in progress, {f'step {state.global_step}' if is_step else f'epoch {int(state.epoch)}'}"
        uploader = self.trainer.uploader()
        # The jobs of one client run one after the other.
        self.jobs.append(uploader.api.run_as_future(uploader.upload, Path(args.output_dir), message))
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            job = uploader.api.run_as_future(uploader.upload_checkpoint, checkpoint, name, f"{message}, checkpoint")
            self.jobs.append(job)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()
        self.trainer.create_model_card()

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.create_model_card()

    def finish(self, wait: bool = True) -> None:
        """Wait for the uploads, unless `wait` is off, and warn about those that failed."""
        for job in [job for job in self.jobs if wait or job.done()]:
            self.jobs.remove(job)
            if (error := job.exception()) is not None:
                reason = explanation(error, str(self.trainer.hub_model_id)) or error
                logger.warning("pushing a checkpoint failed, a later push will replace it: %s", reason)


class PushingTrainer(Trainer):
    """A Trainer that pushes through [`Uploader`], and only to a repo that contains no other model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pushing = PushCallback(self)
        self.add_callback(self.pushing)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repo and its branch before training, and write the license that is pushed with the code.

        `token` and `private` are by default `hub_token` and `hub_private_repo`.

        Raises:
            ValueError: The Hub refuses, or the repo contains something else; the message names the next step.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        write_text(folder / "LICENSE", code_license())
        uploader = Uploader(
            self.args.hub_model_id or folder.absolute().name,
            revision=self.args.hub_revision,
            token=token or self.args.hub_token,
        )
        private = self.args.hub_private_repo if private is None else private
        # Any, since the Trainer declares them as None.
        repo: Any = uploader.prepare(cast(Any, self.model).config.model_type, private).repo_id
        self.hub_model_id, self.push_in_progress = repo, None

    def publish_checkpoint(self, checkpoint: Path) -> None:
        """Copy the model of a checkpoint, without what is for resuming only, to `output_dir`, which is uploaded."""
        copy_files(checkpoint, Path(str(self.args.output_dir)), *TRAINING_STATE)

    def uploader(self, token: str | None = None, revision: str | None = None) -> Uploader:
        """Make the connection to the repo of this run."""
        revision = revision or self.args.hub_revision
        return Uploader(str(self.hub_model_id), revision=revision, token=token or self.args.hub_token)

    def card_on_the_hub(self) -> str | None:
        """Read the card in the repo of this run, which people may have edited."""
        if not self.args.push_to_hub or self.hub_model_id is None:
            return None
        try:
            return self.uploader().read_card()
        except ValueError as error:
            # The upload that follows may succeed, so the run continues.
            logger.warning("the card on the Hub cannot be read (%s); the local one is used.", error)
            return None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Leave pushing to [`PushCallback`]: transformers 5.2 to 5.23 has no setting that turns its own push off."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model into `output_dir`, write the card, and upload both; see `transformers.Trainer`.

        Returns:
            See [`Uploader.upload`]; its `Future` unless `blocking`.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.pushing.finish()
        uploader, folder = self.uploader(token, revision), Path(str(self.args.output_dir))
        if not blocking:
            return uploader.api.run_as_future(uploader.upload, folder, str(commit_message))
        return uploader.upload(folder, str(commit_message))

    def push_result(self) -> None:
        """Upload the folder of a finished run as it is.

        Raises:
            ValueError: The Hub refuses, or the connection broke; the message names the command that pushes the folder.
        """
        if not self.is_world_process_zero():
            return
        folder, repo, revision = Path(str(self.args.output_dir)), str(self.hub_model_id), self.args.hub_revision
        try:
            self.uploader().upload(folder, "End of training")
        except ValueError as error:
            branch = f" --revision {revision}" if revision else ""
            raise ValueError(
                f"{error} The result is in {folder}; `llm2clip push {folder} {repo}{branch}` uploads it."
            ) from error


def copy_files(source: Path, destination: Path, *ignored: str) -> None:
    """Copy the files of a folder into another one, except those of the ignored patterns."""
    ignore = shutil.ignore_patterns(*ignored)
    shutil.copytree(source, destination, ignore=ignore, copy_function=_copy_file, dirs_exist_ok=True)


def _copy_file(source: str, destination: str) -> str:
    """Copy a file that replaces an older one, so that a kill leaves one of the two whole."""
    with atomic_path(destination) as temporary:
        shutil.copyfile(source, temporary)
    return destination


def check_pushing(
    args: TrainingArguments, llm: str | None, result_needs_llm: bool, checkpoints_need_llm: bool
) -> None:
    """Raise a `ValueError` before a run that would push a reference to an LLM in a local folder.

    Args:
        args: The settings of the run.
        llm: Hub id or folder of the LLM.
        result_needs_llm, checkpoints_need_llm: Whether they refer to the LLM instead of containing its weights.
    """
    if not args.push_to_hub or not llm or hub_ids(llm):
        return
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

"""Runs with `push_to_hub`: what the Trainer uploads, by the rules of `llm2clip push`."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, cast

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from llm2clip.hub.hub_errors import explanation
from llm2clip.hub.upload import Uploader
from llm2clip.utils.files import write_license
from llm2clip.utils.repos import hub_ids

logger = logging.getLogger(__name__)


class PushingTrainer(Trainer):
    """A Trainer that pushes what others can load, and only to a repo that holds nothing else."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repo and its branch before training, and write the licence that goes there with the code.

        Args:
            token: Unset: `hub_token`.
            private: Unset: `hub_private_repo`.

        Raises:
            ValueError: The Hub refuses, or the repo holds something else; the message says what to do.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        write_license(folder)
        name = self.args.hub_model_id or folder.absolute().name
        private = self.args.hub_private_repo if private is None else private
        # Any, since the Trainer's own class says None.
        repo: Any = self._uploader(name, token).prepare(cast(Any, self.model).config.model_type, private).repo_id
        self.hub_model_id, self.push_in_progress = repo, None

    def card_on_the_hub(self) -> str | None:
        """The card of the repo that this run pushes to, which people may have edited since."""
        if not self.args.push_to_hub or self.hub_model_id is None:
            return None
        try:
            return self._uploader(self.hub_model_id).read_card()
        except ValueError as error:
            # Not worth a run: the upload that follows may well get through.
            logger.warning("the card cannot be read (%s); the one here is used.", error)
            return None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        # While an upload reads the folder, the Trainer leaves this one out.
        pushes = self.args.hub_strategy != HubStrategy.END and (self.args.hub_always_push or not busy)
        if self.is_world_process_zero() and pushes:
            self._report_failed_pushes()
            # The Trainer takes weights and config from the checkpoint, and would leave the model's code there.
            for path in Path(checkpoint_folder).glob("*.py"):
                shutil.copy(path, str(self.args.output_dir))
            self.create_model_card()
        super()._push_from_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._report_failed_pushes()

    def _report_failed_pushes(self) -> None:
        """Warn of uploads that failed in mid-training: the Trainer never asks for their outcome."""
        push = getattr(self, "push_in_progress", None)
        if push is None:
            return
        for job in [job for job in push.jobs if job.done()]:
            push.jobs.remove(job)
            if (error := job.exception()) is not None:
                said = explanation(error, str(self.hub_model_id)) or error
                logger.warning("a push in mid-training failed, the next one takes its place: %s", said)

    def push_result(self) -> None:
        """Upload the folder of a finished run; `push_to_hub` would save the model anew, in the form of a checkpoint.

        Raises:
            ValueError: The Hub refuses, or the connection broke; the message says how to push what is in the folder.
        """
        if not self.is_world_process_zero():
            return
        folder, repo, revision = Path(str(self.args.output_dir)), str(self.hub_model_id), self.args.hub_revision
        try:
            self._uploader(repo).upload(folder, "End of training")
        except ValueError as error:
            branch = f" --revision {revision}" if revision else ""
            raise ValueError(
                f"{error} The result is in {folder}; `llm2clip push {folder} {repo}{branch}` uploads it."
            ) from error

    def _uploader(self, repo: str, token: str | None = None) -> Uploader:
        return Uploader(repo, revision=self.args.hub_revision, token=token or self.args.hub_token)


def check_pushing(
    args: TrainingArguments, llm: str | None, result_needs_llm: bool, checkpoints_need_llm: bool
) -> None:
    """Refuse to push what others could not load, because the LLM that it refers to is in a folder of this machine.

    Args:
        args: The run's arguments.
        llm: Name of the LLM.
        result_needs_llm: Whether the result refers to it, rather than holding its weights.
        checkpoints_need_llm: Whether checkpoints do.

    Raises:
        ValueError: Others could not load the result, or what is pushed in mid-training.
    """
    if not args.push_to_hub or not llm or hub_ids(llm):
        return
    if result_needs_llm:
        raise ValueError(
            f"push_to_hub with the LLM in {llm}, where others cannot load it from: push the LLM first and name its "
            "Hub id, or put its weights into the result (stage 1: --save-format merged; stage 2: --bundle-text-model "
            "true)."
        )
    if checkpoints_need_llm and args.hub_strategy != HubStrategy.END:
        raise ValueError(
            f"checkpoints that are pushed in mid-training refer to the LLM in {llm}, where others cannot load it "
            "from: push the LLM first and name its Hub id, or push the result alone (--hub-strategy end)."
        )

"""The pushes of a run: of its checkpoints as `hub_strategy` says, and of its result."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy

from llm2clip.files.atomic import atomic_path, write_text
from llm2clip.files.manifests import FOLDER_MANIFEST
from llm2clip.hub.cards.card import CARD, merge_cards, read_card, split_card
from llm2clip.hub.licenses import bases_of, choose_license
from llm2clip.hub.upload import explained, explanation, open_repo, upload_model
from llm2clip.hub.upload_files import model_files, require_no_secrets
from llm2clip.models.repos import hub_ids
from llm2clip.trainers.base_config import StageConfig
from llm2clip.trainers.checkpoints import SETTINGS
from llm2clip.trainers.model_card import made_from
from llm2clip.trainers.run_state import RUN_STATE

logger = logging.getLogger(__name__)

# Files of a checkpoint that are for resuming only.
TRAINING_STATE = (
    *("*.pt", "*.pth", "*.bin", "trainer_state.json", "*fsdp*", "optimizer*", "README.md"),
    *(FOLDER_MANIFEST, SETTINGS, RUN_STATE),
)


class RunRepo:
    """The repo that a run pushes to, which is created, with its branch, before the first step.

    The card in the repo becomes that of the output folder: what people wrote on it stays.

    Args:
        args: The settings of the run.
        model: The model that is trained.
        token, private: By default `hub_token` and `hub_private_repo`.

    Attributes:
        repo_id: OWNER/NAME.
        license: The license of the model.

    Raises:
        ValueError: The Hub refuses, or the repo contains something else; or the license on the card in the output
            folder or in the repo, or the name of the repo, does not keep the license of a model that is trained.
    """

    def __init__(self, args: StageConfig, model: Any, token: str | None = None, private: bool | None = None) -> None:
        self.folder, self.revision, self.strategy = Path(str(args.output_dir)), args.hub_revision, args.hub_strategy
        self.api = HfApi(token=token or args.hub_token)
        repo_id = args.hub_model_id or self.folder.absolute().name
        bases = bases_of(self.folder, made_from(args, model))
        card = self.folder / CARD
        self.license = choose_license({}, read_card(self.folder)[0], bases, str(card))
        self.license.check_repo_name(repo_id)
        private = args.hub_private_repo if private is None else private
        url, branch = open_repo(self.api, repo_id, self.revision, model.config.model_type, private)
        self.repo_id = url.repo_id
        if branch.card is not None:
            merged = merge_cards(branch.card, card.read_text(encoding="utf-8") if card.is_file() else "")
            where = f"README.md of {self.repo_id} on the Hub"
            self.license = choose_license({}, split_card(merged)[0], bases, where)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(card, merged)

    def push_checkpoint(self, checkpoint: Path, message: str) -> list[Future[Any]]:
        """Upload the model in the output folder in the background, and a checkpoint, if `hub_strategy` says so."""
        jobs = [self.api.run_as_future(self._upload, self.folder, message, self.revision)]
        if self.strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if self.strategy == HubStrategy.CHECKPOINT else checkpoint.name
            upload = partial(self.api.upload_folder, repo_id=self.repo_id, folder_path=checkpoint, path_in_repo=name)
            message = f"{message}, checkpoint"
            jobs.append(self.api.run_as_future(upload, commit_message=message, revision=self.revision))
        for job in jobs:
            job.add_done_callback(self._warn_of_failure)
        return jobs

    def _warn_of_failure(self, job: Future[Any]) -> None:
        if not job.cancelled() and (error := job.exception()) is not None:
            reason = explanation(error, self.repo_id) or error
            logger.warning("pushing a checkpoint failed, a later push will replace it: %s", reason)

    def push(self, folder: Path, message: str, blocking: bool, token: str | None, revision: str | None) -> Any:
        """Upload a saved model; returns the `CommitInfo`, or its `Future` unless `blocking`.

        Raises:
            ValueError: The Hub refuses, or the connection broke; the message names the command that pushes the folder.
        """
        revision = revision or self.revision
        if not blocking:
            return self.api.run_as_future(self._upload, folder, message, revision, token)
        try:
            return self._upload(folder, message, revision, token)
        except ValueError as error:
            branch = f" --revision {revision}" if revision else ""
            raise ValueError(
                f"{error} The result is in {folder}; `llm2clip push {folder} {self.repo_id}{branch}` uploads it."
            ) from error

    def _upload(self, folder: Path, message: str, revision: str | None, token: str | None = None) -> Any:
        """Upload the files of a model and no others."""
        files = model_files(folder).uploaded
        require_no_secrets(folder, files, self.api.token)
        with explained(self.repo_id):
            return upload_model(
                self.api, self.repo_id, folder, files, commit_message=message, revision=revision, token=token
            )


def copy_model(checkpoint: Path, destination: Path) -> None:
    """Copy the files of a checkpoint into another folder, except those that are for resuming only."""
    ignore = shutil.ignore_patterns(*TRAINING_STATE)
    shutil.copytree(checkpoint, destination, ignore=ignore, copy_function=_copy_file, dirs_exist_ok=True)


def _copy_file(source: str, destination: str) -> str:
    """Copy a file that replaces an older one, so that a kill leaves one of the two whole."""
    with atomic_path(destination) as temporary:
        shutil.copyfile(source, temporary)
    return destination


def check_pushing(args: StageConfig, llm: str | None, result_needs_llm: bool, checkpoints_need_llm: bool) -> None:
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
            "its Hub id, or include its weights in the result (stage 1: --save-format merged; stage 2: push what "
            "llm2clip build makes of it with --bundle-text-model true)."
        )
    if checkpoints_need_llm and args.hub_strategy != HubStrategy.END:
        raise ValueError(
            f"checkpoints that are pushed during training refer to the LLM in {llm}, a local folder that others "
            "cannot load: push the LLM first and name its Hub id, or push the result alone (--hub-strategy end)."
        )

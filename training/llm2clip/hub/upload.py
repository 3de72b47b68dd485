"""Uploads to the Hub in one commit; the only module of this package that writes to the Hub.

An upload keeps what others store in the repo, and the edits that people made to its card, even during the upload.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from json import JSONDecodeError
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoUrl,
    constants,
    get_session,
    get_token,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llm2clip.hub.cards.card import CARD, merge_cards, split_card, with_repo
from llm2clip.hub.cards.facts import EXAMPLE
from llm2clip.hub.upload_files import model_files, refuse_links, refuse_secrets
from llm2clip.utils.files import read_json
from llm2clip.utils.library_errors import wrap_read_errors
from llm2clip.utils.logs import shortened
from llm2clip.utils.manifests import FOLDER_MANIFEST, MODEL_MANIFEST, stated_files
from llm2clip.utils.repos import inspect_repo

logger = logging.getLogger(__name__)

# The Hub client lets the connection errors of its HTTP library through and has no public class for them: httpx in
# huggingface_hub 1, httpx2 in huggingface_hub 2.
HTTPError: Any = import_module("httpx" if huggingface_hub.__version__.startswith("1.") else "httpx2").HTTPError
# Seconds to connect, to wait for an answer, to send a piece, and to wait for a free connection. The Hub may take
# minutes over a commit of many files, but by default its client waits for ever.
TIMEOUTS = (30.0, 600.0, 600.0, 600.0)
NEXT_STEPS = {
    401: "log in with `hf auth login`, or set HF_TOKEN",
    403: "the token needs write access to the repo and its organization",
    412: "the repo changed during this push: push again",
}
# How many commits are tried while others commit to the same branch.
MAX_ATTEMPTS = 4
# Files that this package and its Trainers write. Those of an earlier push are deleted: they would be loaded instead of
# the new weights, or together with them, or list other weights.
WEIGHT_FILES = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|adapter_config\.json|"
    r"adapter_model\.safetensors|training_args\.bin|manifest\.json|model\.sig"
)
# Files that a repo may contain before the first push.
INITIAL_FILES = {".gitattributes", CARD, "LICENSE"}
# Fields of a card that are merged with those on the Hub, or that differ in an address only.
MERGED_FIELDS = ("tags", "base_model", "base_licenses", "datasets", "model-index", "widget")


class HubError(ValueError):
    """The Hub refuses, or cannot be reached; the message names the next step."""


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Raise errors of the Hub and of the connection as a [`HubError`] in one line; others pass through.

    A Hub that does not answer is such an error after some minutes.
    """
    client = get_session()
    if client.timeout.read is None:
        client.timeout = TIMEOUTS
    try:
        yield
    except Exception as error:
        if message := explanation(error, repo_id):
            raise HubError(message) from error
        raise


def explanation(error: BaseException, repo_id: str) -> str | None:
    """Describe an error of the Hub or of the connection in one line; None for any other error."""
    # The upload threads of the client wrap their errors.
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        step = NEXT_STEPS.get(error.response.status_code)
        return f"{repo_id}: {reason}{f'; {step}' if step else ''}."
    if isinstance(error, (HTTPError, ConnectionError)):
        return f"{repo_id}: the connection broke ({reason}); push again: files that were uploaded are not sent twice."
    if isinstance(error, JSONDecodeError):
        # The page of a hotel's network, or that of another address.
        return f"{repo_id}: {constants.ENDPOINT} does not answer as a Hub does ({reason}): correct HF_ENDPOINT."
    return None


class Snapshot(NamedTuple):
    """A branch at its newest commit; a branch that does not exist yet is new, and starts from that of main."""

    is_new: bool
    commit: str | None
    files: list[str]


class Uploader:
    """The connection to a Hub repo that a model is pushed to.

    Every method raises a ValueError with the next step if the Hub refuses or the connection breaks.

    Args:
        repo_id: OWNER/NAME, or NAME for the owner of the token.
        revision: Branch, created if it does not exist, or pull request (`refs/pr/N`); main by default.
        create_pr: Open a pull request against main instead of committing.
        token: Access token; by default the one that the user is logged in with.
        api: Client to use instead of a new one with `token`.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
        api: HfApi | None = None,
    ) -> None:
        self.repo_id, self.revision, self.create_pr = repo_id, revision, create_pr
        self.api = api or HfApi(token=token)

    def require_token(self) -> None:
        """Raise a ValueError if there is no token to push with."""
        if not (get_token() if self.api.token in (None, True) else self.api.token):
            raise ValueError(f"{self.repo_id}: there is no access token; {NEXT_STEPS[401]}.")

    def contents(self, folder: Path) -> tuple[str | None, str | None]:
        """Read what the repo holds; it need not exist.

        Returns:
            In words, the model whose weights the upload of `folder` would replace by others; and the card of the repo.

        Raises:
            ValueError: The repo contains something else, see [`upload`].
        """
        with explained(self.repo_id):
            try:
                snapshot = self._fitting_snapshot(str(inspect_repo(folder).model_type))
            except RepositoryNotFoundError:
                return None, None
            card, manifest = self._read_card(snapshot), self._download(snapshot, MODEL_MANIFEST)
        ours = folder / MODEL_MANIFEST
        is_same = manifest and ours.is_file() and manifest.read_bytes() == ours.read_bytes()
        if is_same or snapshot.is_new or self.create_pr or "config.json" not in snapshot.files:
            return None, card
        title = re.search(r"^# (.+)", card or "", re.MULTILINE)
        commit = f"commit {str(snapshot.commit)[:8]}, {len(snapshot.files)} files"
        return f"{title[1]} ({commit})" if title else commit, card

    def create_repo(self, private: bool | None = None) -> RepoUrl:
        """Create the repo if it does not exist; returns its address, and completes `repo_id` with the owner.

        Args:
            private: Whether a new repo is private; None follows the default of its owner.

        Raises:
            ValueError: `private` is true, but the repo exists and is public.
        """
        with explained(self.repo_id):
            url = self.api.create_repo(self.repo_id, private=private, exist_ok=True)
            self.repo_id = url.repo_id
            if private and not self.api.model_info(url.repo_id).private:
                raise ValueError(
                    f"{url.repo_id} exists and is public: make it private in its settings, or push to another repo."
                )
        return url

    def prepare(self, model_type: str, private: bool | None = None) -> RepoUrl:
        """Create repo and branch and check write access, so that a long run fails at its start and not at its end.

        Raises:
            ValueError: The repo contains something else, see [`upload`].
        """
        url = self.create_repo(private)
        with explained(self.repo_id):
            self._open_branch(model_type)
            # The first request of every upload; the Hub answers 403 to a read-only token.
            addition = CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=b"?")
            self.api.preupload_lfs_files(self.repo_id, additions=[addition], revision=self.revision)
        return url

    def read_card(self) -> str | None:
        """Read the card in the repo, which people may have edited; None if there is none."""
        with explained(self.repo_id):
            return self._read_card(self._snapshot())

    def upload(self, folder: Path, message: str, files: Mapping[str, Path] | None = None) -> dict[str, Any]:
        """Upload the files of a saved model, with its card, in one commit. The repo has to exist.

        Args:
            folder: The model.
            message: That of the commit.
            files: The files by name; by default those of the model, which are checked for secrets.

        Returns:
            `commit`, `files`, `megabytes`, and `pull_request` if one was opened.

        Raises:
            ValueError: The repo contains another type of model, or files but no model; or a file is a link out of the
                folder, or holds an access token.
        """
        if files is None:
            files = model_files(folder).uploaded
            refuse_secrets(folder, files, self.api.token)
        megabytes = round(sum(file.stat().st_size for file in files.values()) / 1e6, 1)
        logger.info("uploading %d files, %.1f MB, to %s", len(files), megabytes, self.repo_id)
        with explained(self.repo_id):
            commit = self._commit(folder, files, message)
        result = {"commit": commit.oid, "files": len(files), "megabytes": megabytes}
        return {**result, "pull_request": commit.pr_url} if commit.pr_url else result

    def upload_checkpoint(self, folder: Path, name: str, message: str) -> None:
        """Upload a checkpoint with its training state as the folder `name`, for resuming elsewhere.

        Raises:
            ValueError: A file of it is a link out of the folder.
        """
        # Not what lies beside them, perhaps by mistake.
        names = [*stated_files(folder), FOLDER_MANIFEST]
        refuse_links(folder, {file: folder / file for file in names})
        with explained(self.repo_id):
            self.api.upload_folder(
                repo_id=self.repo_id,
                folder_path=folder,
                path_in_repo=name,
                allow_patterns=[glob.escape(file) for file in names],
                commit_message=message,
                revision=self.revision,
            )

    def _commit(self, folder: Path, files: Mapping[str, Path], message: str, attempt: int = 1) -> CommitInfo:
        snapshot = self._open_branch(str(inspect_repo(folder).model_type))
        card = self._merged_card(files[CARD].read_text(encoding="utf-8"), snapshot).encode()
        contents: dict[str, Path | bytes] = {**files, CARD: card}
        stale = [name for name in snapshot.files if WEIGHT_FILES.fullmatch(name) and name not in files]
        # Not upload_folder: where a commit fails, it commits the files in parts, so that others load the new config
        # with the old weights; and it reads the card from the folder.
        try:
            return self.api.create_commit(
                self.repo_id,
                [
                    *(CommitOperationAdd(name, path_or_fileobj=content) for name, content in contents.items()),
                    *(CommitOperationDelete(name) for name in stale),
                ],
                commit_message=message,
                revision=self.revision,
                create_pr=self.create_pr,
                # With it the Hub refuses the commit if the card was edited after it was read.
                parent_commit=snapshot.commit,
            )
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code != 412 or attempt == MAX_ATTEMPTS:
                raise
        logger.info("%s changed during the upload; repeating the commit on top of the change", self.repo_id)
        return self._commit(folder, files, message, attempt + 1)

    def _snapshot(self) -> Snapshot:
        is_new = False
        try:
            commit = self.api.model_info(self.repo_id, revision=self.revision).sha
        except RevisionNotFoundError:
            if self.revision is not None and self.revision.startswith("refs/"):
                raise ValueError(
                    f"{self.repo_id} has no {self.revision}; --create-pr opens a new pull request."
                ) from None
            commit, is_new = self.api.model_info(self.repo_id).sha, True
        return Snapshot(is_new, commit, self.api.list_repo_files(self.repo_id, revision=commit))

    def _open_branch(self, model_type: str) -> Snapshot:
        """Read the branch, which is created if it does not exist, unless the repo contains something else."""
        snapshot = self._fitting_snapshot(model_type)
        if snapshot.is_new:
            self.api.create_branch(self.repo_id, branch=str(self.revision), revision=snapshot.commit, exist_ok=True)
        return snapshot

    def _fitting_snapshot(self, model_type: str) -> Snapshot:
        snapshot = self._snapshot()
        config = self._download(snapshot, "config.json")
        others = [name for name in snapshot.files if name not in INITIAL_FILES]
        if config is None and others:
            raise ValueError(
                f"{self.repo_id} contains {shortened(others)}, but no config.json, so it is not an earlier push of "
                "this model; push to another repo."
            )
        if config is not None and (existing := _model_type(config)) != model_type:
            kind = "something else" if existing is None else f"a model of type {existing!r}"
            raise ValueError(
                f"{self.repo_id} contains {kind}, and this model has type {model_type!r}; push to another repo."
            )
        return snapshot

    def _download(self, snapshot: Snapshot, name: str) -> Path | None:
        if name not in snapshot.files:
            return None
        try:
            return Path(self.api.hf_hub_download(self.repo_id, name, revision=snapshot.commit))
        except LocalEntryNotFoundError as error:
            # Its message advises about the cache; the reason why it asks there is the connection.
            raise error.__cause__ or error from None

    def _read_card(self, snapshot: Snapshot) -> str | None:
        path = self._download(snapshot, CARD)
        if path is None:
            return None
        with wrap_read_errors(f"the card of {self.repo_id} on the Hub"):
            return path.read_text(encoding="utf-8")

    def _merged_card(self, card: str, snapshot: Snapshot) -> str:
        """The folder's card for this repo, with the edits that people made to the card on the Hub."""
        # A pull request is meant to become main.
        branch = "main" if self.revision is None or self.revision.startswith("refs/") else self.revision
        example = f"{self.api.endpoint}/{self.repo_id}/resolve/{branch}/{EXAMPLE}"
        local = with_repo(card, self.repo_id, example)
        theirs = self._read_card(snapshot)
        if theirs is None:
            return local
        merged = merge_cards(theirs, local)
        ours, result = split_card(local)[0], split_card(merged)[0]
        if kept := [key for key, value in ours.items() if result[key] != value and key not in MERGED_FIELDS]:
            logger.warning("the card on the Hub keeps its own %s; change it there", ", ".join(kept))
        return merged


def _model_type(config: Path) -> str | None:
    try:
        return read_json(config).get("model_type")
    except ValueError:
        return None

"""Uploading a folder to a Hub repo in one commit, beside what others keep there and write there meanwhile."""

from __future__ import annotations

import fnmatch
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperation,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoUrl,
    hf_hub_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RevisionNotFoundError,
)

from llm2clip.hub.cards import CARD, EXAMPLE, merge_cards, split_card, with_repo

logger = logging.getLogger(__name__)

# httpx's under huggingface_hub 1, httpx2's under 2.
HTTPError: Any = HfHubHTTPError.__bases__[0]

# How often a commit is made anew because somebody else was quicker.
ATTEMPTS = 4
# What this package and its Trainers write. From an earlier push, it would be loaded beside, or instead of, the new
# weights.
REPLACED = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|adapter_config\.json|"
    r"adapter_model\.safetensors|training_args\.bin"
)
# What a repo may hold before the first push.
FRESH = {".gitattributes", CARD, "LICENSE"}
# What a stage leaves in its folder and nobody needs to load the model.
IGNORED = ("checkpoint-*", ".*", "_*", "*.bin", "*.pt", "*.pth", "skipped-*.jsonl", "trainer_state.json", "runs")
# Fields of a card that are united with those on the Hub, or differ by the address alone.
RENEWED = ("tags", "base_model", "datasets", "model-index", "widget")
NEXT_STEPS = {
    400: "the Hub does not take this: mend what it names (branch, file or the card's metadata), then push again",
    401: "the token is missing or not valid: log in with `hf auth login`, or set HF_TOKEN",
    402: "the account's plan does not cover this: free storage or change the plan in its billing settings",
    403: "the token may not do this: it needs write access to the repo and its organisation",
    404: "there is no such repo, or the token may not see it",
    409: "the repo changed or is being created at the same time: push again",
    412: "the repo changed while this push ran: push again",
    413: "a file is too large for the Hub: take out what the model does not need, or save its weights in shards "
    "(`save_pretrained(..., max_shard_size='5GB')`)",
    429: "too many requests: wait some minutes, then push again",
}


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turn what the Hub or the connection refuses into a ValueError that says what to do; other errors pass."""
    try:
        yield
    except (OSError, HTTPError, HFValidationError, RuntimeError) as error:
        message = explanation(error, repo_id)
        if message is None:
            raise
        raise ValueError(message) from error


def explanation(error: BaseException, repo_id: str) -> str | None:
    """What went wrong and what to do; None for an error that is neither the Hub's nor the connection's."""
    # A thread of the upload wraps its error.
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return f"{repo_id}: {NEXT_STEPS[401]}."
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is no repo name that the Hub takes: {error}"
    if isinstance(error, HfHubHTTPError):
        return f"{repo_id}: {_next_step(error)}."
    if isinstance(error, (HTTPError, ConnectionError)):
        said = str(error) or type(error).__name__
        return f"{repo_id}: the connection broke ({said}); push again, and what has been uploaded is not sent twice."
    return None


def _status(error: HfHubHTTPError) -> int:
    return error.response.status_code if error.response is not None else 0


def _next_step(error: HfHubHTTPError) -> str:
    status = _status(error)
    said = str(getattr(error, "server_message", None) or error).strip().splitlines()[-1]
    other = "the Hub had an error: push again later" if status >= 500 else "the Hub refused: mend what it names"
    return f"{NEXT_STEPS.get(status, other)} (HTTP {status}: {said})"


@dataclass(frozen=True)
class RemoteRepo:
    """A repo at one commit.

    Attributes:
        api: The Hub.
        repo_id: OWNER/NAME.
        revision: Branch or pull request (`refs/pr/N`); None: main.
        is_new: Whether there is no such branch yet; it will begin as a copy of main.
        commit: The newest commit of the branch, or of main.
        files: Paths in it.
    """

    api: HfApi
    repo_id: str
    revision: str | None
    is_new: bool
    commit: str | None
    files: list[str]

    @classmethod
    def find(cls, api: HfApi, repo_id: str, revision: str | None = None) -> RemoteRepo:
        """The repo as it is now.

        Raises:
            ValueError: There is no such pull request.
        """
        is_new = False
        try:
            commit = api.model_info(repo_id, revision=revision).sha
        except RevisionNotFoundError:
            if revision is not None and revision.startswith("refs/"):
                raise ValueError(f"{repo_id} has no {revision}; --create-pr opens a new pull request.") from None
            commit, is_new = api.model_info(repo_id).sha, True
        return cls(api, repo_id, revision, is_new, commit, api.list_repo_files(repo_id, revision=commit))

    def read(self, name: str) -> str | None:
        """A file's text, or None where there is none."""
        if name not in self.files:
            return None
        options: dict[str, Any] = {"endpoint": self.api.endpoint, "token": self.api.token, "force_download": True}
        try:
            path = hf_hub_download(self.repo_id, name, revision=self.commit, **options)
        except ValueError as error:
            # The client hides behind it why a forced download failed.
            raise error.__cause__ or error from None
        return Path(path).read_text(encoding="utf-8")

    def refuse_other_model(self, model_type: str) -> None:
        """Refuse to replace what is no earlier push of such a model.

        Raises:
            ValueError: The repo holds a model of another type, or files of something else.
        """
        config = self.read("config.json")
        if config is None:
            others = [name for name in self.files if name not in FRESH]
            if others:
                raise ValueError(
                    f"{self.repo_id} holds {', '.join(others[:3])}{' and more' if len(others) > 3 else ''}, but no "
                    "config.json, so it is no earlier push of this model; push to another repo."
                )
            return
        try:
            fields = json.loads(config)
        except ValueError:
            fields = None
        theirs = fields.get("model_type") if isinstance(fields, dict) else None
        if theirs != model_type:
            kind = "something else" if theirs is None else f"a model of type {theirs!r}"
            raise ValueError(f"{self.repo_id} holds {kind}, and this model is {model_type!r}; push to another repo.")


def open_repo(api: HfApi, repo_id: str, private: bool | None = None) -> RepoUrl:
    """Make a repo where there is none; returns its address and name.

    Args:
        api: The Hub.
        repo_id: OWNER/NAME, or NAME for the owner of the token.
        private: Whether nobody else may see it; None leaves that of a new repo to the organisation.

    Raises:
        ValueError: It is to be private, but is there already and is public.
    """
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.model_info(url.repo_id).private:
        raise ValueError(
            f"{url.repo_id} is there already and is public: make it private in its settings, or push to another repo."
        )
    return url


def open_branch(api: HfApi, repo_id: str, revision: str | None, model_type: str) -> RemoteRepo:
    """The repo as it is now, with the branch, which is made where it is new.

    Raises:
        ValueError: What is there may not be replaced, see [`RemoteRepo.refuse_other_model`].
    """
    remote = RemoteRepo.find(api, repo_id, revision)
    remote.refuse_other_model(model_type)
    if remote.is_new:
        api.create_branch(repo_id, branch=str(revision), revision=remote.commit, exist_ok=True)
    return remote


def check_write_access(api: HfApi, repo_id: str, revision: str | None = None) -> None:
    """Ask the Hub what every upload asks it first, so that a token which may only read is found out at once.

    Raises:
        HfHubHTTPError: The token may not write to the repo, see [`explained`].
    """
    addition = CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=b"?")
    api.preupload_lfs_files(repo_id, additions=[addition], revision=revision)


def upload(
    folder: Path,
    repo_id: str,
    api: HfApi,
    *,
    message: str,
    revision: str | None = None,
    create_pr: bool = False,
) -> dict[str, Any]:
    """Upload a folder in one commit, around what a person wrote on the card, also while the upload ran.

    Args:
        folder: A saved model with its card; it is not changed.
        repo_id: OWNER/NAME; the repo exists.
        api: The Hub.
        message: Message of the commit.
        revision: Branch, made where it is new, or pull request (`refs/pr/N`); None: main.
        create_pr: Open a pull request instead of committing.

    Returns:
        `commit`, `files`, `megabytes`, and `pull_request` where one was opened.

    Raises:
        ValueError: The repo holds something else, see [`RemoteRepo.refuse_other_model`].
        HfHubHTTPError: The Hub refuses, see [`explained`].
    """
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    local = _local_files(folder)
    megabytes = round(sum(path.stat().st_size for path in local.values()) / 1e6, 1)
    logger.info("uploading %d files, %.1f MB, to %s", len(local), megabytes, repo_id)
    for attempt in range(1, ATTEMPTS + 1):
        remote = open_branch(api, repo_id, revision, model_type)
        try:
            commit = api.create_commit(
                repo_id,
                _operations(folder, local, remote),
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                # So that the Hub refuses, rather than drops what came after the card was read.
                parent_commit=remote.commit,
            )
            break
        except HfHubHTTPError as error:
            if _status(error) != 412 or attempt == ATTEMPTS:
                raise
            logger.info("%s changed meanwhile; the commit is made anew on top of that", repo_id)
    result = {"commit": commit.oid, "files": len(local), "megabytes": megabytes}
    return {**result, "pull_request": commit.pr_url} if commit.pr_url else result


def _local_files(folder: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(fnmatch.fnmatch(part, kind) for part in name.parts for kind in IGNORED):
            found[name.as_posix()] = path
    return found


def _operations(folder: Path, local: dict[str, Path], remote: RemoteRepo) -> list[CommitOperation]:
    files: dict[str, Path | bytes] = {**local, CARD: _card(folder, remote).encode()}
    stale = [name for name in remote.files if REPLACED.fullmatch(name) and name not in local]
    return [
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()),
        *(CommitOperationDelete(path_in_repo=name) for name in stale),
    ]


def _card(folder: Path, remote: RemoteRepo) -> str:
    """The folder's card for this repo, around what a person wrote on the one that is there."""
    local = (folder / CARD).read_text(encoding="utf-8")
    # A pull request is to become main.
    branch = "main" if remote.revision is None or remote.revision.startswith("refs/") else remote.revision
    local = with_repo(local, remote.repo_id, f"{remote.api.endpoint}/{remote.repo_id}/resolve/{branch}/{EXAMPLE}")
    theirs = remote.read(CARD)
    if theirs is None:
        return local
    merged = merge_cards(theirs, local)
    ours, result = split_card(local)[0], split_card(merged)[0]
    kept = [key for key, value in ours.items() if result[key] != value and key not in RENEWED]
    if kept:
        logger.warning("the card on the Hub keeps its own %s; change it there", ", ".join(kept))
    return merged


__all__ = ["RemoteRepo", "check_write_access", "explained", "explanation", "open_branch", "open_repo", "upload"]

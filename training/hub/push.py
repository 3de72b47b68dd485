"""`llm2clip push`: check a built folder, and upload it without losing what others wrote on its card."""

from __future__ import annotations

import fnmatch
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitOperation,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from llm2clip_training.cards import CARD, EXAMPLE, merge_cards, split_card, validate_card, with_repo
from llm2clip_training.hub import build
from llm2clip_training.towers import is_hub_id

logger = logging.getLogger(__name__)

# httpx's under huggingface_hub 1, httpx2's under 2.
HTTPError: Any = HfHubHTTPError.__bases__[0]

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json")
# Fields of a card that are united with those on the Hub, or differ by the address alone.
RENEWED = ("tags", "base_model", "datasets", "model-index", "widget")
# What a stage leaves in its folder and nobody needs to load the model.
IGNORED = ("checkpoint-*", ".*", "_*", "*.bin", "*.pt", "*.pth", "skipped-*.jsonl", "trainer_state.json", "runs")
NEXT_STEPS = {
    401: "the token is missing or not valid: log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not do this: it needs write access to the repo and its organisation",
    404: "there is no such repo, or the token may not see it",
    409: "the repo changed or is being created at the same time: push again",
    412: "the repo changed while this push ran: push again",
    429: "too many requests: wait some minutes, then push again",
}


@dataclass
class PushConfig:
    """Settings of `llm2clip push`."""

    folder: str = field(default="", metadata={"help": "A folder that `llm2clip build` made."})
    repo_id: str = field(default="", metadata={"help": "Where it goes: OWNER/NAME."})
    private: bool = field(default=False, metadata={"help": "Make a new repo private."})
    revision: str | None = field(default=None, metadata={"help": "Branch, made where it is new; unset: main."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request instead of committing."})
    commit_message: str = field(default="Upload model", metadata={"help": "Message of the commit."})
    validate: bool = field(
        default=True, metadata={"help": "Load the folder in a new process, without this package, before the upload."}
    )


def run(config: PushConfig, api: HfApi | None = None) -> dict[str, Any]:
    """Upload a folder in one commit; a push that was cut off goes on where it stopped.

    Args:
        config: The settings.
        api: The Hub; the default is that of the environment, with its token.

    Raises:
        ValueError: The folder is not ready, the repo holds another kind of model, or the Hub refuses; the message says
            what to do. The folder is never changed.
    """
    if not config.folder or not config.repo_id:
        raise ValueError("give a folder and a repo: llm2clip push FOLDER OWNER/NAME")
    folder = Path(config.folder)
    check_folder(folder)
    if not is_hub_id(config.repo_id):
        raise ValueError(
            f"{config.repo_id!r} is no repo name: write OWNER/NAME, of letters, digits, '-', '_' and '.'."
        )
    if config.validate:
        validate_folder(folder)
    api = api or HfApi()
    try:
        return _upload(folder, config, api)
    except (OSError, HTTPError, HFValidationError, RuntimeError) as error:
        raise ValueError(_explanation(error, config.repo_id)) from error


def _explanation(error: BaseException, repo: str) -> str:
    """What went wrong and what to do; an error of another kind is raised as it is."""
    # A thread of the upload wraps its error.
    cause = error
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, LocalTokenNotFoundError):
        return f"{repo}: {NEXT_STEPS[401]}."
    if isinstance(cause, HFValidationError):
        return f"{repo!r} is no repo name that the Hub takes: {cause}"
    if isinstance(cause, HfHubHTTPError):
        return f"{repo}: {_next_step(cause)}."
    if isinstance(cause, (HTTPError, ConnectionError)):
        said = str(cause) or type(cause).__name__
        return f"{repo}: the connection broke ({said}); push again, and what has been uploaded is not sent twice."
    raise error


def _next_step(error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else 0
    said = str(getattr(error, "server_message", None) or error).strip().splitlines()[-1]
    step = NEXT_STEPS.get(status, "the Hub had an error: push again later" if status >= 500 else "the Hub refused")
    return f"{step} (HTTP {status}: {said})"


def check_folder(folder: Path) -> None:
    """Refuse a folder that would not load for others.

    Raises:
        FileNotFoundError: It is not there, or lacks config, weights, card or code.
        ValueError: It names a folder of this machine, or a file is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; `llm2clip build MODEL {folder}` makes one.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; build it first: llm2clip build MODEL FOLDER")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = sorted(folder.glob(WEIGHTS[0]))
    if not weights:
        raise FileNotFoundError(f"{folder} has no weights (*.safetensors).")
    for path in weights:
        try:
            with safe_open(path, framework="pt") as handle:
                handle.keys()
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or truncated: {error}; build the folder again.") from error
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(shards - {path.name for path in weights})
        if missing:
            raise FileNotFoundError(f"{folder} lacks {len(missing)} of its shards: {', '.join(missing[:3])}.")
    for target in (fields.get("auto_map") or {"AutoModel": "its auto_map.X"}).values():
        module = target.split("--")[-1].split(".")[0]
        if "--" not in target and not (folder / f"{module}.py").is_file():
            raise FileNotFoundError(
                f"{folder} lacks the code of {target}; build it first: llm2clip build MODEL FOLDER"
            )
    llm = fields.get("text_model_name_or_path")
    if llm is not None and not is_hub_id(llm):
        raise ValueError(
            f"the LLM of {folder} is in {llm}, where others cannot load it from; `llm2clip build` bundles it or, with "
            "--text-model, names its Hub id."
        )
    validate_card(folder)


def validate_folder(folder: Path) -> None:
    """Load a folder in a new process, offline and without this package, and compare its outputs with ours.

    Raises:
        RuntimeError: It does not load, or gives other outputs.
    """
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if any("--" in target for target in fields["auto_map"].values()):
        logger.info("the code of %s is in another repo, so it is not loaded before the upload", folder)
        return
    logger.info("loading %s here and in a new process", folder)
    build.validate(folder)


def _upload(folder: Path, config: PushConfig, api: HfApi) -> dict[str, Any]:
    # None leaves it to the organisation whether new repos are private.
    url = api.create_repo(config.repo_id, private=config.private or None, exist_ok=True)
    if config.private and not api.model_info(config.repo_id).private:
        raise ValueError(
            f"{config.repo_id} is there already and is public, which --private does not change: make it private in "
            "its settings, or push to another repo."
        )
    remote = _Remote.find(config, api)
    _refuse_other_model(folder, config, remote)
    if config.revision is not None and not config.create_pr:
        api.create_branch(config.repo_id, branch=config.revision, exist_ok=True)
    local = _local_files(folder)
    operations: list[CommitOperation] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in local.items() if name != CARD
    ]
    card = _card(folder, config, remote)
    operations.append(CommitOperationAdd(path_in_repo=CARD, path_or_fileobj=card.encode()))
    # Weights under names of an earlier push would be loaded beside, or instead of, these.
    loaded = [name for name in remote.files if any(fnmatch.fnmatch(name, kind) for kind in WEIGHTS)]
    stale = [name for name in loaded if "/" not in name and name not in local]
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
    size = sum(path.stat().st_size for path in local.values())
    logger.info("uploading %d files, %.1f MB, to %s", len(local), size / 1e6, url)
    commit = api.create_commit(
        config.repo_id,
        operations,
        commit_message=config.commit_message,
        revision=config.revision,
        create_pr=config.create_pr,
    )
    result = {"repo": str(url), "commit": commit.oid, "files": len(local), "megabytes": round(size / 1e6, 1)}
    return {**result, "pull_request": commit.pr_url} if commit.pr_url else result


@dataclass
class _Remote:
    """What is in the repo before the push.

    Attributes:
        revision: Where that is read: a new branch begins as a copy of main.
        files: Paths.
    """

    api: HfApi
    repo_id: str
    revision: str | None
    files: list[str]

    @classmethod
    def find(cls, config: PushConfig, api: HfApi) -> _Remote:
        try:
            return cls(
                api, config.repo_id, config.revision, api.list_repo_files(config.repo_id, revision=config.revision)
            )
        except RevisionNotFoundError:
            return cls(api, config.repo_id, None, api.list_repo_files(config.repo_id))

    def read(self, name: str) -> str | None:
        """A file's text, or None where there is none."""
        if name not in self.files:
            return None
        options: dict[str, Any] = {"endpoint": self.api.endpoint, "token": self.api.token, "force_download": True}
        try:
            path = hf_hub_download(self.repo_id, name, revision=self.revision, **options)
        except ValueError as error:
            # The client hides behind it why a forced download failed.
            raise error.__cause__ or error from None
        return Path(path).read_text(encoding="utf-8")


def _refuse_other_model(folder: Path, config: PushConfig, remote: _Remote) -> None:
    theirs = json.loads(remote.read("config.json") or "{}").get("model_type")
    ours = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    if theirs is not None and theirs != ours:
        raise ValueError(
            f"{config.repo_id} holds a model of type {theirs!r}, and {folder} is {ours!r}; push to another repo."
        )


def _local_files(folder: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(fnmatch.fnmatch(part, kind) for part in name.parts for kind in IGNORED):
            found[name.as_posix()] = path
    return found


def _card(folder: Path, config: PushConfig, remote: _Remote) -> str:
    """The folder's card for this repo, around what a person wrote on the one that is there."""
    local = (folder / CARD).read_text(encoding="utf-8")
    resolve = f"{remote.api.endpoint}/{config.repo_id}/resolve/{config.revision or 'main'}"
    local = with_repo(local, config.repo_id, f"{resolve}/{EXAMPLE}")
    theirs = remote.read(CARD)
    if theirs is None:
        return local
    merged = merge_cards(theirs, local)
    ours, result = split_card(local)[0], split_card(merged)[0]
    kept = [key for key, value in ours.items() if result[key] != value and key not in RENEWED]
    if kept:
        logger.warning("the card on the Hub keeps its own %s; change it there", ", ".join(kept))
    return merged


__all__ = ["PushConfig", "check_folder", "run", "validate_folder"]

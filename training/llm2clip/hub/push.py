"""`llm2clip push`: check a built folder, and upload it without losing what others wrote on its card."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open

from llm2clip.hub import build
from llm2clip.hub.cards import validate_card
from llm2clip.hub.upload import explained, open_repo, upload
from llm2clip.utils.files import read_json
from llm2clip.utils.repos import is_hub_id
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPTextConfig, LLM2CLIPVisionModelWithProjection

logger = logging.getLogger(__name__)


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


def push_folder(folder: str | Path, repo_id: str, **settings: Any) -> dict[str, Any]:
    """Check a folder of [`build_folder`] and upload it to the Hub in one commit.

    Edits that people made to the card on the Hub are kept. An interrupted push can be repeated; files that were
    uploaded before are not sent again.

    Args:
        folder: The folder; it is not changed.
        repo_id: OWNER/NAME; the repo is created if it does not exist.
        settings: Other fields of [`PushConfig`].

    Returns:
        `repo`, its address; `commit`; `files` and `megabytes`; `pull_request` if one was opened.

    Raises:
        FileNotFoundError: The folder is incomplete.
        ValueError: A setting is wrong, the repo contains another model, or the Hub refuses; the message says what to
            do.
    """
    return run(build_config(PushConfig, {"folder": folder, "repo_id": repo_id, **settings}, "PushConfig"))


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
    if config.create_pr and config.revision not in (None, "main"):
        raise ValueError(
            f"--create-pr opens a pull request against main; leave out --revision {config.revision}, or --create-pr."
        )
    if config.validate:
        validate_folder(folder)
    api = api or HfApi()
    with explained(config.repo_id):
        # None leaves it to the organisation whether new repos are private.
        url = open_repo(api, config.repo_id, private=config.private or None)
        options: dict[str, Any] = {"revision": config.revision, "create_pr": config.create_pr}
        return {"repo": str(url), **upload(folder, config.repo_id, api, message=config.commit_message, **options)}


def check_folder(folder: Path) -> None:
    """Refuse a folder that would not load for others.

    Raises:
        FileNotFoundError: It is not there, or lacks config, weights, card, code, tokenizer or image processor.
        ValueError: It names a folder of this machine, or a file is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; `llm2clip build MODEL {folder}` makes one.")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; build it first: llm2clip build MODEL FOLDER")
    fields = read_json(folder / "config.json")
    if "model_type" not in fields:
        raise ValueError(f"{folder / 'config.json'} has no model_type; build the folder: llm2clip build MODEL FOLDER")
    weights = sorted(folder.glob("*.safetensors"))
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
        shards = set(read_json(index)["weight_map"].values())
        missing = sorted(shards - {path.name for path in weights})
        if missing:
            raise FileNotFoundError(f"{folder} lacks {len(missing)} of its shards: {', '.join(missing[:3])}.")
    for target in (fields.get("auto_map") or {"AutoModel": "its auto_map.X"}).values():
        module = target.split("--")[-1].split(".")[0]
        if "--" not in target and not (folder / f"{module}.py").is_file():
            raise FileNotFoundError(
                f"{folder} lacks the code of {target}; build it first: llm2clip build MODEL FOLDER"
            )
    for names in _processor_files(fields):
        if not any((folder / name).is_file() for name in names):
            raise FileNotFoundError(
                f"{folder} lacks {' or '.join(names)}; build it first: llm2clip build MODEL FOLDER"
            )
    llm = fields.get("text_model_name_or_path")
    if llm is not None and not is_hub_id(llm):
        raise ValueError(
            f"the LLM of {folder} is in {llm}, where others cannot load it from; `llm2clip build` bundles it or, with "
            "--text-model, names its Hub id."
        )
    validate_card(folder)


def _processor_files(fields: dict[str, Any]) -> list[tuple[str, ...]]:
    """What turns inputs into tensors: of each tuple one file has to be there."""
    tokenizer, images = ("tokenizer.json",), ("processor_config.json", "preprocessor_config.json")
    if fields["model_type"] == LLM2CLIPTextConfig.model_type:
        return [tokenizer]
    if fields.get("architectures") == [LLM2CLIPVisionModelWithProjection.__name__]:
        return [images]
    return [tokenizer, images]


def validate_folder(folder: Path) -> None:
    """Load a folder in a new process, offline and without this package, and compare its outputs with ours.

    Raises:
        RuntimeError: It does not load, or gives other outputs.
    """
    fields = read_json(folder / "config.json")
    if any("--" in target for target in fields["auto_map"].values()):
        logger.info("the code of %s is in another repo, so it is not loaded before the upload", folder)
        return
    logger.info("loading %s here and in a new process", folder)
    build.validate(folder)


__all__ = ["PushConfig", "check_folder", "push_folder", "run", "validate_folder"]

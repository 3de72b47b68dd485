"""What a Hub repository or folder contains, read from its config files before anything large is loaded."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from transformers import PretrainedConfig
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, find_adapter_config_file

from llm2clip.files.atomic import read_json
from llm2clip.models.places import HUB_ID
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPTextConfig, LLM2CLIPVisionModelWithProjection
from modeling_llm2clip.modeling_llm2clip_utils import OWN_TEXT_MODEL, find_text_model

try:
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
except ImportError:  # before version 2
    get_cached_repo_tree = None  # type: ignore[assignment]


class RepoKind(StrEnum):
    """The kinds of model repository that this package distinguishes."""

    JOINT = "LLM2CLIP model"
    VISION_HALF = "vision half of an LLM2CLIP model"
    TEXT_TOWER = "text tower"
    ADAPTER = "PEFT adapter"
    EMBEDDING_MODEL = "embedding model of sentence-transformers"
    OTHER = "other model"

    @property
    def with_article(self) -> str:
        """Its name in a sentence, such as `an LLM2CLIP model`."""
        return f"{'an' if self.value[0] in 'aeioL' else 'a'} {self.value}"


LLM = "text_model_name_or_path"
OUR_MODELS = (RepoKind.JOINT, RepoKind.VISION_HALF, RepoKind.TEXT_TOWER)


@dataclass(frozen=True)
class Repo:
    """A model repository.

    Attributes:
        name, revision: Hub id or folder, and branch, tag or commit on the Hub.
        kind: What the repository contains. A text tower that is stored as an adapter is a `TEXT_TOWER` with
            `is_adapter`; `ADAPTER` is an adapter without a config of this package; `EMBEDDING_MODEL` is a plain text
            model whose files say how to embed texts; `OTHER` includes plain LLMs.
        is_adapter: Whether the weights are a PEFT adapter.
        config: The fields of config.json, in which an LLM in the repository itself has its whole name; empty if there
            is none.
        subfolder: Where the model is in a CLIP of sentence-transformers, such as `0_CLIPModel`; otherwise empty.
    """

    name: str
    revision: str | None
    kind: RepoKind
    is_adapter: bool
    config: dict[str, Any]
    subfolder: str = ""

    @property
    def model_type(self) -> str | None:
        """`model_type` of config.json."""
        return self.config.get("model_type")

    @property
    def encoders(self) -> list[str]:
        """Of a model that takes `llm_embeds` alone, the names of the text encoders whose embeddings these are."""
        return encoders_of(self.config)

    def require(self, *kinds: RepoKind, hint: str = "`llm2clip convert` converts checkpoints of other code.") -> Repo:
        """Raise ValueError unless the repository is one of `kinds`; returns it. `hint` ends the message."""
        if self.kind in kinds:
            return self
        *others, last = [kind.with_article for kind in kinds]
        wanted = f"{', '.join(others)} or {last}" if others else last
        contents = f"model_type {self.model_type!r}" if self.kind is RepoKind.OTHER else self.kind.with_article
        raise ValueError(f"{self.name} is not {wanted}: it contains {contents}. {hint}")


def embedding_modules(name: str, **hub: Any) -> list[dict[str, Any]]:
    """Read `modules.json`, by which sentence-transformers describes an embedding model; empty if there is none."""
    modules: list[dict[str, Any]] = read_json_file(name, "modules.json", **hub) or []
    return modules if any(module["type"].endswith("Pooling") for module in modules) else []


def find_file(name: str, file: str, **hub: Any) -> str | None:
    """Return the path of a file of a repository or folder, downloaded if necessary; None if there is none.

    Raises:
        OSError: The Hub cannot be asked whether there is one, and its cache does not know; or there is no repository.
    """
    path = "/".join(filter(None, (hub.pop("subfolder", None), file)))
    if Path(name).is_dir():
        return str(Path(name, path)) if Path(name, path).is_file() else None
    try:
        return hf_hub_download(name, path, **hub)
    except LocalEntryNotFoundError as error:
        place = {key: hub.get(key) for key in ("cache_dir", "revision")}
        if _is_known_to_lack(name, path, **place):
            return None
        revision = "" if place["revision"] is None else f" --revision {place['revision']}"
        raise OSError(
            f"the Hub cannot be asked whether {name} has {path} (offline, or no connection), and the cache does not "
            f"have it. Go online once, or download all of it where there is a network: hf download {name}{revision}"
        ) from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise OSError(f"{name} is neither a folder here nor the id of a repository on the Hub: {error}") from error


def _is_known_to_lack(name: str, path: str, **place: Any) -> bool:
    """Tell whether the cache says that a repository has no such file: it was asked before, or is here as a whole."""
    if try_to_load_from_cache(name, path, **place) is _CACHED_NO_EXIST:
        return True
    if get_cached_repo_tree is not None:  # the list of files that such a download keeps
        with suppress(CachedRepoTreeNotFoundError):
            return path not in {entry.path for entry in get_cached_repo_tree(name, **place)}
    # A file of every repository, which only the download of an earlier version brings.
    return isinstance(try_to_load_from_cache(name, ".gitattributes", **place), str)


def read_json_file(name: str, file: str, **hub: Any) -> Any:
    """Read a JSON file of a repository or folder; None if there is none.

    Raises:
        ValueError: It is damaged.
        OSError: See [`find_file`].
    """
    path = find_file(name, file, **hub)
    try:
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or download it again.") from None


def refuse_revision(name: str | Path, revision: Any) -> None:
    """Raise ValueError if a revision is given for a folder, which has none."""
    if revision is not None and Path(name).is_dir():
        raise ValueError(f"revision {revision} is given, but {name} is a folder, not a Hub id; leave it out.")


def inspect_repo(name: str | Path, revision: str | None = None, **hub_arguments: Any) -> Repo:
    """Read the config files of a repository or folder.

    Args:
        name: Hub id or folder.
        revision: Branch, tag or commit on the Hub.
        hub_arguments: `cache_dir`, `token` and other arguments of `from_pretrained`.

    Raises:
        OSError: There is no such repository, or it contains neither config.json nor adapter_config.json.
        ValueError: A revision of a folder is given.
    """
    refuse_revision(name, revision)
    name = str(name)
    _, root, inside = find_text_model(name)
    options = {"revision": revision, **inside, **hub_arguments}
    is_adapter = find_adapter_config_file(root, **options) is not None
    try:
        config = PretrainedConfig.get_config_dict(root, **options)[0]
    except OSError as error:
        if not is_adapter:
            if name in str(error):
                raise
            raise OSError(f"there is no model {name} here, nor can it be read from the Hub: {error}") from error
        config = {}
    subfolder = "" if config or is_adapter else _clip_subfolder(root, **options)
    if subfolder:
        config = PretrainedConfig.get_config_dict(root, **{**options, "subfolder": subfolder})[0]
    if not config and not is_adapter:
        raise FileNotFoundError(f"{name} contains neither config.json nor adapter_config.json.")
    kind = _kind(config, is_adapter)
    # The files of sentence-transformers are not read for models with images.
    if kind is RepoKind.OTHER and "vision_config" not in config and embedding_modules(root, **options):
        kind = RepoKind.EMBEDDING_MODEL
    if LLM in config:
        config = {**config, LLM: find_text_model(config[LLM], root, **options)[0]}
    return Repo(name, revision, kind, is_adapter, config, subfolder)


def _clip_subfolder(name: str, **hub: Any) -> str:
    modules: list[dict[str, str]] = read_json_file(name, "modules.json", **hub) or []
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    return modules[0]["path"] if kinds == ["CLIPModel"] else ""


def _kind(config: dict[str, Any], is_adapter: bool) -> RepoKind:
    if config.get("model_type") == LLM2CLIPTextConfig.model_type:
        return RepoKind.TEXT_TOWER
    if config.get("model_type") == LLM2CLIPConfig.model_type:
        is_half = config.get("architectures") == [LLM2CLIPVisionModelWithProjection.__name__]
        return RepoKind.VISION_HALF if is_half else RepoKind.JOINT
    return RepoKind.ADAPTER if is_adapter else RepoKind.OTHER


def referred_folders(name: str | Path) -> list[Path]:
    """Return the local folders that a local model needs beside its own: its LLM, and what an adapter is for.

    Raises:
        ValueError: A config file is damaged.
    """
    referred: list[Path] = []
    waiting = [Path(name)]
    while waiting:
        folder = waiting.pop()
        for file, key in ((CONFIG_NAME, LLM), (ADAPTER_CONFIG_NAME, "base_model_name_or_path")):
            model = read_json(folder / file).get(key) if (folder / file).is_file() else None
            path = Path(find_text_model(model, folder)[0] or folder)
            if path.is_dir() and path not in (folder, *referred):
                referred.append(path)
                waiting.append(path)
    return referred


def needed_llm(repo: Repo) -> str | None:
    """Return the LLM that a joint model in a folder needs beside that; of an adapter in it, what that is for."""
    name = repo.config.get(LLM)
    folder = Path(find_text_model(OWN_TEXT_MODEL, repo.name)[0])
    if name and Path(name) == folder and folder.is_dir():
        name = read_json(folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
    return name


def local_folders(name: str) -> list[Path]:
    """Return the folders here that a model may be loaded from: its own, or that in the cache of the Hub, and others.

    See [`referred_folders`]; none if there is no such model.
    """
    try:
        folder = Path(snapshot_download(name, local_files_only=True)) if hub_ids(name) else Path(name)
        return [folder, *referred_folders(folder)] if folder.is_dir() else []
    except (OSError, ValueError):
        return []


def hub_commit(name: str, revision: str | None = None) -> str | None:
    """Return the commit of a model on the Hub, from its config, which is downloaded; None for a local folder."""
    if Path(name).is_dir():
        return None
    try:
        path = hf_hub_download(name, CONFIG_NAME, revision=revision)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:  # a CLIP of sentence-transformers, which is in a subfolder
        path = hf_hub_download(name, "modules.json", revision=revision)
    # The folder of a download is named after its commit.
    return Path(path).parent.name


def is_hub_id(name: str) -> bool:
    """Tell whether a name has the form of a Hub id: OWNER/NAME."""
    return "/" in name and HUB_ID.fullmatch(name) is not None


def encoders_of(config: dict[str, Any]) -> list[str]:
    """Return the names of the text encoders whose embeddings a model takes, from its config.json; see [`Repo`]."""
    return [encoder["name"] for encoder in (config.get("text_config") or {}).get("encoders") or ()]


def hub_ids(*names: str | None) -> list[str]:
    """Return the names that are Hub ids and do not exist as local folders or files."""
    return [name for name in names if name and is_hub_id(name) and not Path(name).exists()]

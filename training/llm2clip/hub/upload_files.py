"""Which files of a folder belong to a model, and are uploaded."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeAlias

import modeling_llm2clip
from llm2clip.hub.cards.card import CARD
from llm2clip.utils.files import read_json
from llm2clip.utils.logs import shortened
from llm2clip.utils.manifests import EDITED, MODEL_MANIFEST, MODEL_SIGNATURE, ListedFile, listed_files, written_by

# What a model folder holds, beside its code and the pictures of its card.
ALLOWED = (
    *(CARD, "LICENSE*", "NOTICE*", MODEL_MANIFEST, "config.json", "generation_config.json", "processor_config.json"),
    *("preprocessor_config.json", "modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "adapter_config.json"),
    *("adapter_model*.safetensors", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.*"),
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "spiece.model", "sentencepiece*.model"),
    *("*.tiktoken", "chat_template*", "[0-9]_*/config.json", "[0-9]_*/model.safetensors", "onnx/*_model.onnx*"),
    MODEL_SIGNATURE,
)
# Files of a training run, which are left out without a word.
RUN = (
    *("checkpoint-*", ".*", "_*", "*.bin", "*.pt", "*.pth", "skipped-*.jsonl", "trainer_state.json", "runs"),
    *("log.txt", "error.log", "settings.json", "warm_start", "vision_features", "ema.safetensors"),
)
Stamps: TypeAlias = dict[str, tuple[int, ...]]
PICTURES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg"}
# Commands that list every file of a model.
WRITE_MODELS = ("build", "convert", "merge")
# What is added to a listed model afterwards, by people or by us, and changes nothing that it computes.
ADDED_LATER = (*EDITED, "LICENSE*", "NOTICE*", MODEL_MANIFEST, MODEL_SIGNATURE, "onnx/*")


# Bytes; what is smaller is read once, and kept in memory until the commit.
SMALL = 1 << 24


class ModelFiles(NamedTuple):
    """The files of a folder.

    Attributes:
        uploaded: Those that are uploaded, by their names in the repo.
        others: Names of those that are not, apart from files of a training run.
    """

    uploaded: dict[str, Path]
    others: list[str]


def model_files(folder: Path, include: Sequence[str] = (), check_links: bool = True) -> ModelFiles:
    """Divide the files of a folder into those of a model and others.

    Args:
        folder: A saved model with its card.
        include: Patterns of further names to upload, such as `results/*`. As in a shell, `*` fits no hidden file or
            folder: those often hold secrets, and have to be named.
        check_links: Refuse links out of the folder.

    Raises:
        ValueError: A file to upload is a link out of the folder or has a name that is not UTF-8, or a pattern fits no
            file.
    """
    code = _code(folder)
    card = (folder / CARD).read_text(encoding="utf-8", errors="replace") if (folder / CARD).is_file() else ""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if missing := [pattern for pattern in include if not any(_is_included(name, pattern) for name in files)]:
        raise ValueError(f"--include {missing[0]} fits no file in {folder}.")
    uploaded, others = {}, []
    for name, path in files.items():
        included = any(_is_included(name, pattern) for pattern in include)
        shown = path.suffix.lower() in PICTURES and name in card
        if included or (not _is_of_run(name) and (name in code or shown or _is_allowed(name))):
            uploaded[name] = path
        elif not _is_of_run(name):
            others.append(name)
    if check_links:
        _refuse_names(folder, uploaded)
        refuse_links(folder, uploaded)
    return ModelFiles(uploaded, others)


def read_small(uploaded: Mapping[str, Path]) -> dict[str, bytes | Path]:
    """Read the small files of an upload; of large ones, the path is kept.

    The client reads small files again when it commits, and knows only large ones by their checksums.
    """
    return {name: path.read_bytes() if path.stat().st_size < SMALL else path for name, path in uploaded.items()}


def stamps(folder: Path) -> Stamps:
    """Return what changes with every change of a file, for each file of a folder."""
    found: Stamps = {}
    for path in folder.rglob("*"):
        if path.is_file():
            status = path.stat()
            # Unlike its other times, that of the last change of its status cannot be set.
            found[path.relative_to(folder).as_posix()] = (status.st_ino, status.st_size, status.st_ctime_ns)
    return found


def refuse_changed(folder: Path, names: Iterable[str], before: Stamps) -> None:
    """Raise a ValueError if files are not those of which `before` are the stamps."""
    now = stamps(folder)
    if changed := [name for name in names if name not in before or now.get(name) != before[name]]:
        raise ValueError(
            f"{folder} has changed since it was checked for the upload ({shortened(changed)}); nothing was committed. "
            "Wait until nothing writes there, and push again; if the code in the folder does it, do not trust it."
        )


def refuse_links(folder: Path, uploaded: dict[str, Path]) -> None:
    """Raise a ValueError if a file is a link out of a folder."""
    root = folder.resolve()
    for name, path in uploaded.items():
        if not path.resolve().is_relative_to(root):
            raise ValueError(
                f"{folder / name} is a link out of the folder, to {path.resolve()}; replace it by the file if that is "
                "meant to be public."
            )


def added_files(folder: Path) -> list[str]:
    """Return the files of a listed model that its lists lack, although loading the model would read them.

    An `adapter_config.json` beside the weights, for example, makes transformers load others. Empty where no list has
    all files of a model.

    Raises:
        ValueError: A list is damaged.
    """
    known = listed_files(folder)
    has_model_list = any(listed.manifest == MODEL_MANIFEST for listed in known.values())
    if not has_model_list and written_by(folder) not in WRITE_MODELS:
        return []
    return [name for name in model_files(folder, check_links=False).uploaded if not _is_accounted_for(name, known)]


def _is_accounted_for(name: str, known: dict[str, ListedFile]) -> bool:
    is_later = any(fnmatch.fnmatch(name, pattern) for pattern in ADDED_LATER)
    return name in known or is_later or PurePosixPath(name).suffix.lower() in PICTURES


def _code(folder: Path) -> set[str]:
    """Names of the Python files that the config of a folder refers to, and of those that come with a model of ours."""
    modules = {f"{target.split('.')[0]}.py" for target in code_targets(folder)}
    return modules | {path.name for path in Path(str(modeling_llm2clip.__file__)).parent.glob("*.py")}


def code_targets(folder: Path) -> list[str]:
    """Return what the config of a folder refers to as its code, such as `modeling_llm2clip.LLM2CLIPModel`.

    Raises:
        ValueError: These fields are of another type than transformers writes.
    """
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    classes, pipelines = config.get("auto_map") or {}, config.get("custom_pipelines") or {}
    if not isinstance(classes, dict) or not isinstance(pipelines, dict):
        raise ValueError(f"{path}: auto_map and custom_pipelines have to be objects; build the folder again.")
    found = [pipeline.get("impl") if isinstance(pipeline, dict) else None for pipeline in pipelines.values()]
    for target in classes.values():
        # Of a tokenizer there may be two classes, or one and null.
        found += [one for one in target if one is not None] if isinstance(target, list) else [target]
    targets = [target for target in found if isinstance(target, str)]
    if len(targets) < len(found):
        raise ValueError(f"{path} refers to code by what is no name; build the folder again.")
    return targets


def _is_included(name: str, pattern: str) -> bool:
    """Whether a pattern fits a name, and names every hidden part of it."""
    hidden = [part for part in PurePosixPath(name).parts if part.startswith(".")]
    named = [part for part in PurePosixPath(pattern).parts if part.startswith(".")]
    return fnmatch.fnmatch(name, pattern) and all(any(fnmatch.fnmatch(part, one) for one in named) for part in hidden)


def _is_allowed(name: str) -> bool:
    parts = PurePosixPath(name).parts
    patterns = [PurePosixPath(pattern).parts for pattern in ALLOWED]
    return any(len(parts) == len(pattern) and all(map(fnmatch.fnmatch, parts, pattern)) for pattern in patterns)


def _is_of_run(name: str) -> bool:
    return any(fnmatch.fnmatch(part, pattern) for part in PurePosixPath(name).parts for pattern in RUN)


def _refuse_names(folder: Path, uploaded: dict[str, Path]) -> None:
    for name in uploaded:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"the name of {folder / name} is not UTF-8, as those on the Hub are; rename it."
            ) from None

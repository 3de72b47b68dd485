"""Which files of a folder belong to a model and are uploaded, and which of them nobody should publish."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import get_token

import modeling_llm2clip
from llm2clip.encoders.query_encoder import SPACE_FILE
from llm2clip.files.atomic import read_json
from llm2clip.files.library_errors import wrap_read_errors
from llm2clip.files.manifests import (
    EDITED,
    FOLDER_MANIFEST,
    PICTURES,
    QUERY_ENCODER,
    listed_files,
    written_by,
)
from llm2clip.hub.cards.card import CARD, as_list
from modeling_llm2clip.modeling_llm2clip_utils import TEXT_MODEL

# The default name of sigstore's command `model_signing`.
MODEL_SIGNATURE = "model.sig"
# What a model folder holds, beside its code and the pictures of its card.
MODEL_FILES = (
    *(CARD, "LICENSE*", "NOTICE*", "config.json", "generation_config.json", "processor_config.json"),
    *("preprocessor_config.json", "modules.json", "config_sentence_transformers.json", "sentence_*_config.json"),
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "adapter_config.json"),
    *("adapter_*.safetensors", "tokenizer.json", "tokenizer.model", "vocab.*"),
    "tokenizer_config.json",
    *("special_tokens_map.json", "added_tokens.json", "merges.txt", "spiece.model", "sentencepiece*.model"),
    *("*.tiktoken", "chat_template*", "[0-9]_*/config.json", "[0-9]_*/model.safetensors", "onnx/*_model.onnx*"),
    *(MODEL_SIGNATURE, SPACE_FILE, f"{QUERY_ENCODER}/*", f"{QUERY_ENCODER}/[0-9]_*/*", f"{TEXT_MODEL}/*"),
)
# Files of a training run, which are left out without a word.
RUN_FILES = (
    *("checkpoint-*", ".*", "_*", "*.bin", "*.pt", "*.pth", "skipped-*.jsonl", "trainer_state.json", "runs"),
    *("log.txt", "settings.json", "part[0-9]*", "teacher", "vision_features"),
)
# Commands that list every file of a model; and the one whose list is uploaded with it.
WRITE_MODELS, BUILD = ("build", "convert", "merge"), "build"
# What is added to a listed model afterwards, by people or by us, and changes nothing that it computes.
ADDED_LATER = (*EDITED, "LICENSE*", "NOTICE*", FOLDER_MANIFEST, MODEL_SIGNATURE, "onnx/*", f"{QUERY_ENCODER}/*")
# Access tokens of the Hub, GitHub, AWS, OpenAI and Anthropic, Google, Slack; and private keys.
SECRET = re.compile(
    rb"hf_[A-Za-z0-9]{34,}|github_pat_\w{22,}|gh[pousr]_[A-Za-z0-9]{36,}|(?<![A-Z0-9])AKIA[A-Z0-9]{16}(?![A-Z0-9])|"
    rb"sk-[a-z]+-[\w-]{32,}|AIza[\w-]{35}|xox[abpr]-[\w-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
# Characters of a token that a message shows; and the least that the user's has, since a shorter one may be a word.
SHOWN_CHARACTERS, MIN_TOKEN_LENGTH = 6, 8
# Bytes; larger files are weights, and are not searched.
SEARCHED_BYTES = 1 << 24


class ModelFiles(NamedTuple):
    """The files of a folder.

    Attributes:
        uploaded: Those that are uploaded, by their names in the repo.
        others: Names of those that are not, apart from files of a training run.
    """

    uploaded: dict[str, Path]
    others: list[str]


def model_files(folder: Path, include: Sequence[str] = ()) -> ModelFiles:
    """Divide the files of a folder into those of a model and others.

    Args:
        folder: A saved model with its card.
        include: Patterns of further names to upload, such as `results/*`. As in a shell, `*` fits no hidden file or
            folder: those often hold secrets, and have to be named.

    Raises:
        ValueError: A pattern fits no file.
    """
    card = (folder / CARD).read_text(encoding="utf-8", errors="replace") if (folder / CARD).is_file() else ""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if missing := [pattern for pattern in include if not files.keys() & _fitting(folder, [pattern])]:
        raise ValueError(f"--include {missing[0]} fits no file in {folder}.")
    included, of_model = _fitting(folder, include), _code(folder) | _fitting(folder, MODEL_FILES)
    if written_by(folder) == BUILD:
        included.add(FOLDER_MANIFEST)
    uploaded, others = {}, []
    for name, path in files.items():
        of_run = any(fnmatch.fnmatch(part, pattern) for part in PurePosixPath(name).parts for pattern in RUN_FILES)
        shown = path.suffix.lower() in PICTURES and name in card
        if name in included or (not of_run and (name in of_model or shown)):
            uploaded[name] = path
        elif not of_run:
            others.append(name)
    return ModelFiles(uploaded, others)


def _fitting(folder: Path, patterns: Iterable[str]) -> set[str]:
    return {Path(name).as_posix() for pattern in patterns for name in glob.glob(pattern, root_dir=folder)}


def _code(folder: Path) -> set[str]:
    """Names of the Python files that the config of a folder refers to, and of those that come with a model of ours."""
    modules = {f"{target.split('.')[0]}.py" for target in code_targets(folder)}
    return modules | {path.name for path in Path(str(modeling_llm2clip.__file__)).parent.glob("*.py")}


def code_targets(folder: Path) -> list[str]:
    """Return what the config of a folder refers to as its code, such as `modeling_llm2clip.LLM2CLIPModel`.

    Raises:
        ValueError: The config is damaged.
    """
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    with wrap_read_errors(path):
        targets = [target for value in config.get("auto_map", {}).values() for target in as_list(value)]
        targets += [pipeline["impl"] for pipeline in config.get("custom_pipelines", {}).values()]
        # A tokenizer may have one class and null.
        return [str(target) for target in targets if target is not None]


def added_files(folder: Path) -> list[str]:
    """Return the files of a listed model that its list lacks, although loading the model would read them.

    An `adapter_config.json` beside the weights, for example, makes transformers load others. Empty without a list of
    all files of a model.

    Raises:
        ValueError: The list is damaged.
    """
    known = listed_files(folder)
    if written_by(folder) not in WRITE_MODELS:
        return []
    return [
        name
        for name, path in model_files(folder).uploaded.items()
        if name not in known and path.suffix.lower() not in PICTURES
        if not any(fnmatch.fnmatch(name, pattern) for pattern in ADDED_LATER)
    ]


def require_no_secrets(folder: Path, uploaded: Mapping[str, Path], token: str | bool | None) -> None:
    """Raise a ValueError if a small file contains an access token or a private key.

    Args:
        folder: Where the files are, for the message.
        uploaded: The files by name.
        token: A token besides the one that the user is logged in with; both are searched for too.
    """
    tokens = [known for known in (token, get_token()) if isinstance(known, str) and len(known) >= MIN_TOKEN_LENGTH]
    pattern = re.compile(b"|".join([SECRET.pattern, *(re.escape(known.encode()) for known in tokens)]))
    for name, path in uploaded.items():
        if path.stat().st_size < SEARCHED_BYTES and (secret := pattern.search(path.read_bytes())):
            start = secret[0][:SHOWN_CHARACTERS].decode(errors="replace")
            raise ValueError(
                f"{folder / name} contains what looks like an access token or private key ({start}...), which "
                "everybody could read; remove it there, and revoke it if others may have seen it."
            )

"""Which files of a folder belong to a model, and are uploaded."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import modeling_llm2clip
from llm2clip.hub.cards.card import CARD
from llm2clip.utils.files import read_json
from llm2clip.utils.manifests import MODEL_MANIFEST, MODEL_SIGNATURE

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
PICTURES = {".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg"}


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
        include: Patterns of further names to upload, such as `results/*`.

    Raises:
        ValueError: A file to upload is a link out of the folder, or a pattern fits no file.
    """
    code = _code(folder)
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if missing := [pattern for pattern in include if not fnmatch.filter(files, pattern)]:
        raise ValueError(f"--include {missing[0]} fits no file in {folder}.")
    uploaded, others = {}, []
    for name, path in files.items():
        included = any(fnmatch.fnmatch(name, pattern) for pattern in include)
        shown = path.suffix.lower() in PICTURES and name in card
        if included or (not _is_of_run(name) and (name in code or shown or _is_allowed(name))):
            uploaded[name] = path
        elif not _is_of_run(name):
            others.append(name)
    _refuse_links(folder, uploaded)
    return ModelFiles(uploaded, others)


def _code(folder: Path) -> set[str]:
    """Names of the Python files that the config of a folder refers to, and of those that come with a model of ours."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    targets = [*(config.get("auto_map") or {}).values()]
    targets += [pipeline.get("impl", "") for pipeline in (config.get("custom_pipelines") or {}).values()]
    modules = {f"{target.split('.')[0]}.py" for target in targets if isinstance(target, str)}
    return modules | {path.name for path in Path(str(modeling_llm2clip.__file__)).parent.glob("*.py")}


def _is_allowed(name: str) -> bool:
    parts = PurePosixPath(name).parts
    patterns = [PurePosixPath(pattern).parts for pattern in ALLOWED]
    return any(len(parts) == len(pattern) and all(map(fnmatch.fnmatch, parts, pattern)) for pattern in patterns)


def _is_of_run(name: str) -> bool:
    return any(fnmatch.fnmatch(part, pattern) for part in PurePosixPath(name).parts for pattern in RUN)


def _refuse_links(folder: Path, uploaded: dict[str, Path]) -> None:
    root = folder.resolve()
    for name, path in uploaded.items():
        if not path.resolve().is_relative_to(root):
            raise ValueError(
                f"{folder / name} is a link out of the folder, to {path.resolve()}; replace it by the file if that is "
                "meant to be public."
            )

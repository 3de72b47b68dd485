"""The identity of a text tower and of its tokenizer, read from the files without building the model."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from llm2clip.models.plain_models import load_as_tower
from llm2clip.models.repos import RepoKind, inspect_repo
from modeling_llm2clip import LLM2CLIPTextConfig, LLM2CLIPTextModel
from modeling_llm2clip.identity_llm2clip import text_fingerprint

logger = logging.getLogger(__name__)

# Settings of a tokenizer beside its `tokenizer.json` that change the tokens of a caption.
TOKENIZER_SETTINGS = ("split_special_tokens", "truncation_side", "model_max_length")


def read_fingerprint(name: str, revision: str | None, config: LLM2CLIPTextConfig) -> str | None:
    """Compute the fingerprint of a text tower from its weights, whatever its config has recorded.

    The safetensors files are read one weight at a time. Only where their names are not those of the model (adapters,
    checkpoints that transformers converts) is the model loaded, on the CPU.

    Args:
        name, revision: Text tower, LLM2CLIP model with its LLM, adapter, or plain LLM.
        config: Prompt and pooling of a plain LLM.

    Returns:
        See [`text_fingerprint`].
    """
    stored = _config_of_weights(name, revision, config)
    files = None if stored is None else _find_weights(name, revision, stored)
    if stored is None or files is None:
        return load_as_tower(name, config, revision).fingerprint()
    logger.info("Reading the weights of %s for its fingerprint.", name)
    return text_fingerprint(stored, _read(files))


def _config_of_weights(name: str, revision: str | None, config: LLM2CLIPTextConfig) -> LLM2CLIPTextConfig | None:
    """Return the config of the tower whose weights are in a repository, or None if they are not in it."""
    repo = inspect_repo(name, revision)
    if repo.is_adapter or repo.config.get("text_model_name_or_path") is not None:
        return None
    own: Any = AutoConfig.from_pretrained(name, revision=revision)
    if repo.kind is RepoKind.TEXT_TOWER:
        return own
    if repo.kind is RepoKind.JOINT:
        return own.text_config
    plain = copy.deepcopy(config)
    plain.decoder_config = getattr(own, "text_config", own)
    return plain


def _find_weights(name: str, revision: str | None, config: LLM2CLIPTextConfig) -> dict[str, tuple[str, str]] | None:
    """Return the file and the name there of each weight of a tower, or None if names or shapes are not the model's."""
    files = _safetensors_files(name, revision)
    shapes, paths = {}, {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                shapes[key], paths[key] = tuple(file.get_slice(key).get_shape()), path
    with torch.device("meta"):
        skeleton = LLM2CLIPTextModel(copy.deepcopy(config))
    located = {}
    for weight, tensor in skeleton.state_dict().items():
        inner = weight.removeprefix("decoder.")
        names = (weight, f"text_model.{weight}", inner, f"{skeleton.decoder.base_model_prefix}.{inner}")
        key = next((key for key in names if key in paths), None)
        if key is None or shapes[key] != tuple(tensor.shape):
            return None
        located[weight] = paths[key], key
    return located


def _safetensors_files(name: str, revision: str | None) -> list[str]:
    with contextlib.suppress(OSError):  # there is none
        return [str(cached_file(name, SAFE_WEIGHTS_NAME, revision=revision))]
    with contextlib.suppress(OSError):
        index = str(cached_file(name, SAFE_WEIGHTS_INDEX_NAME, revision=revision))
        return get_checkpoint_shard_files(name, index, revision=revision)[0]
    return []


def _read(files: dict[str, tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
    for weight, (path, key) in sorted(files.items()):
        with safe_open(path, framework="pt") as file:
            yield weight, file.get_tensor(key)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what a tokenizer makes of a caption: vocabulary, merges, normaliser, added tokens, template and limit.

    Its padding, the way back from tokens to text and the version that wrote it do not count.

    Returns:
        32 hexadecimal digits.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # in Python, with rules of its class
        content: dict[str, Any] = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
        content["prompt"] = tokenizer("")["input_ids"]
    else:
        content = json.loads(backend.to_str())
        for name in ("version", "truncation", "padding", "decoder"):
            content.pop(name, None)
        model = content["model"]
        # Written as "a b" by earlier versions of tokenizers.
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []]
        content["model"] = {name: value for name, value in model.items() if value}
    content["settings"] = [getattr(tokenizer, name, None) for name in TOKENIZER_SETTINGS]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

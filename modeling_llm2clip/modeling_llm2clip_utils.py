"""What the models share: refusing incomplete checkpoints, attaching towers, encoding in batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .processing_llm2clip import check_captions, count_cut_captions

logger = logging.get_logger(__name__)

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments of `from_pretrained` that say where and how a repo is read."""
    return {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}


def absolute_path(name: str | os.PathLike[str]) -> str:
    """A folder's absolute path, since a relative one would be a repo id elsewhere; a repo id as it is."""
    return os.fspath(Path(name).resolve()) if name and Path(name).exists() else os.fspath(name)


def refuse_missing(name: Any, part: str, info: dict[str, Any]) -> None:
    """Refuse a checkpoint that would leave a part of a model at random values.

    Args:
        name: The checkpoint.
        part: What was loaded from it.
        info: Loading info of `from_pretrained`.

    Raises:
        ValueError: Weights are missing.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(
            f"{name} lacks weights of {part}: {shown}. They would be random; load the repo that holds them, or the "
            "class that this one was saved from (see `architectures` in its config.json)."
        )


def execution_device(module: nn.Module) -> torch.device:
    """Where a module takes its inputs; its weights may be on the meta device while accelerate offloads them."""
    for submodule in module.modules():
        device = getattr(getattr(submodule, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def adopt_submodel(parent: PreTrainedModel, name: str, child: PreTrainedModel) -> None:
    """Attach `child` after `parent` was built, with the bookkeeping that `post_init` does for its own children."""
    setattr(parent, name, child)
    no_split = getattr(child, "_no_split_modules", None) or []
    parent._no_split_modules = [*dict.fromkeys([*(parent._no_split_modules or []), *no_split])]
    tied = getattr(child, "all_tied_weights_keys", None) or {}
    if hasattr(parent, "all_tied_weights_keys"):
        parent.all_tied_weights_keys.update({f"{name}.{key}": f"{name}.{value}" for key, value in tied.items()})


def encode_batches(
    texts: Sequence[str] | str,
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[Any], Tensor],
    *,
    prompt_token_ids: list[int] | None,
    width: int,
    batch_size: int,
    show_progress_bar: bool,
) -> Tensor:
    """Encode captions in batches of similar length and give the rows back in the order of the input.

    Args:
        texts: Captions; one string counts as a list of one.
        tokenizer: The tokenizer that was saved with the model: it holds the prompt.
        encode: Maps a tokenised batch to `(batch, width)`.
        prompt_token_ids: What the tokenizer has to make of an empty caption, where it is known.
        width: Columns of the result, also for no captions at all.
        batch_size: Captions per batch.
        show_progress_bar: Show a bar over the batches.

    Returns:
        float32 `(len(texts), width)` on the CPU.

    Raises:
        TypeError: An item is not a string (an image, say).
        ValueError: A caption is empty, or the tokenizer does not hold the model's prompt.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    check_captions(texts)
    if not texts:
        return torch.zeros(0, width)
    if prompt_token_ids is not None and list(tokenizer("")["input_ids"]) != prompt_token_ids:
        raise ValueError(
            f"the tokenizer ({tokenizer.name_or_path or 'unnamed'}) does not add the prompt that this model was "
            "trained with; load it from the model's own folder with AutoTokenizer or AutoProcessor."
        )
    tokens = tokenizer(texts, truncation=True)["input_ids"]
    if count_cut_captions(tokenizer, texts, [len(ids) for ids in tokens]):
        # Not their number: whoever encodes millions in many calls reads this once.
        logger.warning_once(f"captions longer than {tokenizer.model_max_length} tokens are cut.")
    order = sorted(range(len(texts)), key=lambda index: len(tokens[index]), reverse=True)
    result = torch.empty(len(texts), width)
    starts = range(0, len(texts), batch_size)
    for start in logging.tqdm(starts, desc="Encoding captions", disable=not show_progress_bar):
        rows = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [tokens[row] for row in rows]}, return_tensors="pt")
        with torch.inference_mode():
            result[rows] = encode(batch).float().cpu()
    return result

"""Functions that the models share: checks of checkpoints, attaching towers, pooling, encoding in batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .image_decoding_llm2clip import with_pillow
from .tokenization_llm2clip import CaptionTokens, pooling_mask

logger = logging.get_logger(__name__)

# Padded tokens of a batch: few on a CPU, whose caches should contain the states, many on an accelerator.
CPU_BATCH_TOKENS = 512
ACCELERATOR_BATCH_TOKENS = 16384
# Folder of an LLM in that of its model, and the name by which the config of the model refers to it.
TEXT_MODEL = "text_model"
OWN_TEXT_MODEL = f"./{TEXT_MODEL}"
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
# Arguments of `from_pretrained` that also apply to an LLM in another repository.
SHARED_ARGUMENTS = (
    "cache_dir", "device_map", "dtype", "force_download", "local_files_only", "max_memory", "offload_buffers",
    "offload_folder", "token", "torch_dtype", "trust_remote_code",
)  # fmt: skip


def hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Select the arguments of `from_pretrained` that locate a repository and control its download."""
    return {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}


def split_arguments(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments of `from_pretrained` into those of the model without its LLM and the LLM's that differ."""
    model_kwargs, llm_kwargs = dict(kwargs), {}
    # A vision tower is small and loses more accuracy, and no published checkpoint was trained with a quantised one.
    if model_kwargs.get("quantization_config") is not None:
        llm_kwargs["quantization_config"] = model_kwargs.pop("quantization_config")
    device_map = model_kwargs.get("device_map")
    if isinstance(device_map, dict):
        inside = {key: device for key, device in device_map.items() if f"{key}.".startswith("text_model.")}
        if inside:
            model_kwargs["device_map"] = {key: device for key, device in device_map.items() if key not in inside}
            llm_kwargs["device_map"] = {key[len("text_model.") :]: device for key, device in inside.items()}
        elif "" in device_map and len(device_map) > 1:
            llm_kwargs["device_map"] = {"": device_map[""]}
    return model_kwargs, llm_kwargs


def text_attention(kwargs: dict[str, Any]) -> str | None:
    """Return the LLM's attention implementation in the arguments of `from_pretrained`, or None if not set."""
    asked = kwargs.get("attn_implementation")
    if asked is None and kwargs.get("config") is not None:  # where AutoModel moves it
        return kwargs["config"].text_config._attn_implementation
    return asked.get("text_config") if isinstance(asked, dict) else asked


def absolute_path(name: str | os.PathLike[str]) -> str:
    """Return the absolute path of a folder (a relative one could be read as a repository id), or a repository id."""
    return os.fspath(Path(name).resolve()) if name and Path(name).exists() else os.fspath(name)


def find_text_model(name: Any, origin: str | os.PathLike[str] = "", **hub: Any) -> tuple[Any, str, dict[str, Any]]:
    """Find the LLM that the config of a model names.

    `./text_model` is in the folder or repository of the model itself, wherever that is moved or copied. In a
    repository it is called `OWNER/NAME/text_model`.

    Args:
        name: Folder or repository, or None if the weights are those of the model.
        origin: Where the config is from.
        hub: Arguments of `from_pretrained` for that place, such as `subfolder`.

    Returns:
        The name with the place in it, the folder or repository of that name, and the arguments of `from_pretrained`
        for what is within a repository.
    """
    if name == OWN_TEXT_MODEL:
        inside = [hub["subfolder"]] if hub.get("subfolder") else []
        name = "/".join([absolute_path(origin), *inside, TEXT_MODEL])
    parts = str(name or "").split("/")
    if len(parts) > 2 and parts[0] and parts[-1] == TEXT_MODEL and not Path(str(name)).exists():
        return name, "/".join(parts[:2]), {"subfolder": "/".join(parts[2:])}
    return name, name or "", {}


def load_complete(load: Callable[..., Any], name: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Call a `from_pretrained`, and raise ValueError for a checkpoint that would leave weights at random values.

    Returns:
        The model, and the loading info.
    """
    model, info = load(name, *args, output_loading_info=True, **kwargs)
    if missing := sorted(info["missing_keys"]):
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(
            f"{name} does not contain all weights of {type(model).__name__}: {shown} would be initialized randomly. "
            "Load a repository that contains them, or use the class that saved this one (`architectures` in its "
            "config.json)."
        )
    return model, info


def own_part(model: PreTrainedModel, processor: Any, name: str) -> Any:
    """Return the tokenizer or image processor for a model: that of `processor`, or the one saved with the model.

    The latter is loaded once, from the revision that the model was loaded from.

    Args:
        processor: The processor, the part itself, or None.
        name: `tokenizer` or `image_processor`.

    Raises:
        ValueError: There is no processor, and the model was not loaded from where one is.
    """
    if processor is not None:
        return getattr(processor, name, processor)
    parts = model.__dict__.setdefault("_own_parts", {})
    if name in parts:
        return parts[name]
    origin, words = model.config.name_or_path, name.replace("_", " ")
    if not origin:
        raise ValueError(f"this model was built in memory, so that there is no {words} to load; pass processor=.")
    # A tokenizer would otherwise read the config again, and warn that it does not know its type.
    load: Any = AutoImageProcessor
    known: dict[str, Any] = {}
    if name == "tokenizer":
        load, known = AutoTokenizer, {"config": model.config}
    try:
        # Without False, it would ask on the terminal whether to run code.
        part = load.from_pretrained(origin, **getattr(model, "hub_arguments", {}), **known, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"no {words} can be loaded from {origin}; pass processor=.") from error
    parts[name] = with_pillow(part) if name == "image_processor" else part
    return parts[name]


def execution_device(module: nn.Module) -> torch.device:
    """Return the device for a module's inputs; accelerate keeps offloaded weights on the meta device."""
    for submodule in module.modules():
        device = getattr(getattr(submodule, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def adopt_submodel(parent: PreTrainedModel, name: str, child: PreTrainedModel) -> None:
    """Attach `child` to a finished `parent`, with the bookkeeping that `post_init` does for its children."""
    setattr(parent, name, child)
    name_layers(parent)
    tied = getattr(child, "all_tied_weights_keys", None) or {}
    if hasattr(parent, "all_tied_weights_keys"):
        parent.all_tied_weights_keys.update({f"{name}.{key}": f"{name}.{value}" for key, value in tied.items()})


def name_layers(model: PreTrainedModel) -> None:
    """Name the classes of a model's transformer layers, which FSDP and `device_map` keep together.

    They are those that its parts name. A tower also names classes of the whole CLIP that it is from, and FSDP expects
    that a model has all that it names.
    """
    own = {type(module).__name__ for module in model.modules()}
    named = [name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()]
    model._no_split_modules = [name for name in dict.fromkeys(named) if name in own]


def pool(hidden_states: Tensor, attention_mask: Tensor, pooling_mask: Tensor, mode: str) -> Tensor:
    """Pool token states `(batch, tokens, hidden)` into one vector per caption.

    Args:
        attention_mask: `(batch, tokens)`, 1 for real tokens.
        pooling_mask: `(batch, tokens)`, 1 for the tokens that are pooled.
        mode: `mean`; `weighted_mean` (weights grow linearly along the pooled tokens); `last_token`; `eos_token` (the
            same token, with a prompt that ends in EOS); `bos_token` (the first real token).

    Returns:
        float32 `(batch, hidden)`: a mean rounded to 16 bits would lose accuracy that the states still have.
    """
    if mode in ("mean", "weighted_mean"):
        weights = pooling_mask.float()
        if mode == "weighted_mean":
            weights = weights * weights.cumsum(dim=1)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
        return (hidden_states.float() * weights[..., None]).sum(dim=1)
    if mode == "bos_token":
        index = attention_mask.long().argmax(dim=1)
    else:
        positions = torch.arange(pooling_mask.shape[1], device=pooling_mask.device)
        index = (positions * pooling_mask).argmax(dim=1)
    return hidden_states[torch.arange(len(index), device=index.device), index].float()


def token_batches(lengths: Sequence[int], max_tokens: int, max_captions: int | None = None) -> list[list[int]]:
    """Group captions of similar length, given their numbers of tokens.

    Args:
        max_tokens: Largest number of tokens in a batch, including padding; a longer caption is a batch of its own.
        max_captions: Largest number of captions in a batch; None for as many as the tokens allow.

    Returns:
        The indices of each batch's captions, the longest first.
    """
    batches: list[list[int]] = []
    for caption in sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True):
        batch = batches[-1] if batches else []
        has_room = max_captions is None or len(batch) < max_captions
        if batch and has_room and (len(batch) + 1) * lengths[batch[0]] <= max_tokens:
            batch.append(caption)
        else:
            batches.append([caption])
    return batches


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; after that each of its modules is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def encode_tokens(
    tokens: CaptionTokens,
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[Any], Tensor],
    *,
    model: nn.Module,
    device: torch.device,
    width: int,
    batch_size: int | None = None,
    show_progress_bar: bool = False,
) -> Tensor:
    """Encode tokenised captions in batches of similar length, and repeated captions only once.

    Args:
        tokens: From [`tokenize_captions`].
        encode: Maps a batch on the device to `(batch, width)`.
        model: What `encode` calls; it is in evaluation mode meanwhile.
        device: Device of the model; it determines the size of the batches.
        batch_size: Largest number of captions in a batch; None for as many as their tokens allow.

    Returns:
        float32 `(len(tokens.ids), width)` on the CPU, in the order of the input.

    Raises:
        ValueError: An embedding is NaN or infinite.
    """
    row_of: dict[tuple[int, ...], int] = {}
    rows = [row_of.setdefault(tuple(ids), len(row_of)) for ids in tokens.ids]
    distinct = list(row_of)
    starts = None if tokens.starts is None else dict(zip(rows, tokens.starts, strict=True))
    budget = CPU_BATCH_TOKENS if device.type == "cpu" else ACCELERATOR_BATCH_TOKENS
    batches = token_batches([len(ids) for ids in distinct], budget, batch_size)
    result = torch.empty(len(distinct), width)
    for batch in logging.tqdm(batches, desc="Encoding captions", disable=not show_progress_bar):
        inputs = tokenizer.pad({"input_ids": [list(distinct[row]) for row in batch]}, return_tensors="pt")
        if starts is not None:
            inputs["pooling_mask"] = pooling_mask(inputs["attention_mask"], [starts[row] for row in batch])
        with evaluating(model), torch.inference_mode():
            result[batch] = encode(inputs.to(device)).float().cpu()
    return require_finite(result if len(distinct) == len(rows) else result[rows], "captions")


def require_finite(rows: Tensor, what: str) -> Tensor:
    """Return embeddings, `(n, width)`; ValueError if one is NaN or infinite."""
    broken = (~rows.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    if broken:
        raise ValueError(
            f"the embeddings of {len(broken)} of {len(rows)} {what} are NaN or infinite, first that of item "
            f"{broken[0]}: the weights are damaged or of a training that diverged, or the dtype is too narrow."
        )
    return rows


def unit_features(features: Any) -> Tensor:
    """Normalise the pooled output of a model to unit length, in float32 for the precision of 16-bit models."""
    return F.normalize(features.pooler_output.float(), dim=-1)


def shorten(rows: Tensor, truncate_dim: int | None) -> Tensor:
    """Return the first values of embeddings, `(n, truncate_dim)`, scaled to unit length; None returns them whole.

    Raises:
        ValueError: They have fewer values.
    """
    if truncate_dim is None:
        return rows
    if not 0 < truncate_dim <= rows.shape[-1]:
        raise ValueError(f"truncate_dim is {truncate_dim}, but embeddings have {rows.shape[-1]} values.")
    return F.normalize(rows[..., :truncate_dim], dim=-1)

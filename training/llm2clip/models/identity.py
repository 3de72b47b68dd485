"""Identities: what the rows of a model depend on, by its weights, its tokenizer and its preprocessing.

That of a text tower is written when it is saved, and only compared later; the model's code makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llm2clip.models.plain_models import load_as_tower
from llm2clip.models.repos import Repo, RepoKind, inspect_repo
from modeling_llm2clip import LLM2CLIPTextConfig
from modeling_llm2clip.identity_llm2clip import RULE as WEIGHTS_RULE
from modeling_llm2clip.identity_llm2clip import digest_weight

# The rule that identities of encoders and of vision towers were made by.
RULE = "4-"
# Settings of a tokenizer beside its `tokenizer.json` that change the tokens of a caption.
TOKENIZER_SETTINGS = ("split_special_tokens", "truncation_side", "model_max_length")
# Steps of image processors, and the settings of each.
STEPS = {
    "do_resize": ("size", "resample", "crop_pct", "size_divisor"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor", "rescale_offset"),
    "do_normalize": ("image_mean", "image_std"),
    "do_pad": ("pad_size",),
}
# Settings of image processors that belong to no step: those that read any shape (NaFlex).
PATCHES = ("patch_size", "max_num_patches")
# Parts of a model that place images and captions in its space.
SPACE_PARTS = ("visual_standardization", "visual_projection", "text_adapter")


def text_tower_fingerprint(name: str, revision: str | None, config: LLM2CLIPTextConfig) -> str | None:
    """Return the fingerprint that a text tower records; one without a record is loaded, on the CPU.

    Args:
        name, revision: Text tower, LLM2CLIP model, adapter, or plain LLM.
        config: Prompt and pooling of a plain LLM.
    """
    if (recorded := _recorded(inspect_repo(name, revision))) is not None:
        return recorded
    return load_as_tower(name, config, revision).identity()


def _recorded(repo: Repo) -> str | None:
    if repo.kind is RepoKind.JOINT:
        return repo.config.get("text_model_fingerprint")
    return repo.config.get("fingerprint") if repo.kind is RepoKind.TEXT_TOWER else None


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
    return _digest(content)


def vision_fingerprint(model: Any, image_processor: Any, *, with_projection: bool = True) -> str:
    """Hash the weights and the pooling of a vision tower, and the preprocessing of its images.

    Every value counts, rounded to bfloat16, so that a tower in float32 and its copy in bfloat16 are equal, as are a
    model and its vision half. The LLM and the adapter do not count, nor do the libraries that decode and resize.

    Args:
        model: An [`LLM2CLIPModel`] or its vision half.
        image_processor: What prepares the pixel values.
        with_projection: Whether the projection and the standardisation before it count, which the pooled features of
            the tower do not depend on.

    Returns:
        `4-` and 32 hexadecimal digits.

    Raises:
        ValueError: A weight is offloaded or quantised.
    """
    names = ("vision_model", *(SPACE_PARTS[:2] if with_projection else ()))
    tower = model.config.vision_config
    content = {
        "model_type": tower.model_type,
        "image_size": getattr(tower, "image_size", None),
        "pooling": model.config.vision_pooling,
        **({"layers": layers} if (layers := model.config.vision_layers) else {}),
        "preprocessing": preprocessing(image_processor),
        "weights": _digests(model, names),
    }
    return RULE + _digest(content)


def space_identity(model: Any) -> str:
    """Identify the space of an LLM2CLIP model by the weights of its projection and of its text adapter.

    Returns:
        `3-` and 32 hexadecimal digits.
    """
    return WEIGHTS_RULE + _digest(_digests(model, SPACE_PARTS))


def weights_checksum(model: nn.Module) -> str:
    """Hash every weight of a model, rounded to bfloat16, so that a model and its copy in bfloat16 are equal.

    Returns:
        `3-` and 32 hexadecimal digits.

    Raises:
        ValueError: A weight is offloaded or quantised.
    """
    return WEIGHTS_RULE + _digest(_digest_all(model.state_dict()))


def preprocessing(image_processor: Any) -> dict[str, Any]:
    """Select the settings of an image processor that change pixel values; those of steps that are off do not."""
    settings = image_processor.to_dict()
    names = [name for step, parts in STEPS.items() if settings.get(step) for name in (step, *parts)]
    kept = {name: settings[name] for name in (*names, *PATCHES) if settings.get(name) is not None}
    sizes = {name: value for name, value in kept.items() if isinstance(value, Mapping)}
    # Versions of transformers name the unset sides of a size or leave them out.
    return kept | {name: {side: length for side, length in size.items() if length} for name, size in sizes.items()}


def _digests(model: Any, parts: Iterable[str]) -> dict[str, str]:
    """Hash the weights of some parts of an LLM2CLIP model, by their names in it."""
    present = {name: part for name in parts if (part := getattr(model, name, None)) is not None}
    state = {key: value for name, part in present.items() for key, value in part.state_dict(prefix=f"{name}.").items()}
    # transformers 5 nests some towers once more than earlier versions.
    return _digest_all({key.replace("vision_model.vision_model.", "vision_model."): state[key] for key in state})


def _digest_all(weights: Mapping[str, Tensor]) -> dict[str, str]:
    digests = {}
    for name, weight in weights.items():
        if weight.is_meta or type(weight.data) is not Tensor:
            raise ValueError(
                f"{name} cannot be read to identify the model: it is offloaded or quantised. Load it whole, onto one "
                "device and in float32 or bfloat16."
            )
        if weight.is_floating_point():
            digests[name] = digest_weight(weight)
        else:
            content = weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digests[name] = hashlib.sha256(f"{tuple(weight.shape)}".encode() + content).hexdigest()[:32]
    return digests


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

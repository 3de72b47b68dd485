"""The identity of a vision tower, a hash of all that its image embeddings depend on, and of any model's weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modeling_llm2clip.identity_llm2clip import RULE, decoder_identity, digest_weight, plain_settings

# Fields of vision towers that do not change what they compute in evaluation: training, other heads, use as a backbone.
IRRELEVANT = re.compile(
    r"drop_path_rate|use_mask_token|mask_ratio|projection_dim|out_features|out_indices|stage_names|apply_layernorm"
    r"|reshape_hidden_states"
)
# Settings of an image processor by the step that they belong to.
STEPS = {
    "do_resize": ("size", "resample"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
    "do_pad": ("pad_size",),
}
# What says how an image processor is called and saved. Images are RGB before they come to it.
NOT_PIXELS = re.compile(
    r"_.*|auto_map|processor_class|image_processor_type|feature_extractor_type|return_tensors|(input_)?data_format"
    r"|device|disable_grouping|default_to_square|do_convert_rgb|backend"
)


def vision_fingerprint(model: Any, image_processor: Any, *, with_projection: bool = True) -> str:
    """Hash the weights and settings of a vision tower and the preprocessing of its images.

    Every value counts, rounded to bfloat16, so that a tower in float32 and its copy in bfloat16 are equal, as are a
    model and its vision half. The LLM and the adapter do not count, nor do the libraries that decode and resize.

    Args:
        model: An [`LLM2CLIPModel`] or its vision half.
        image_processor: What prepares the pixel values.
        with_projection: Whether the projection and the standardisation before it count, which the pooled features of
            the tower do not depend on.

    Returns:
        `3-` and 32 hexadecimal digits.

    Raises:
        ValueError: A weight is offloaded or quantised.
    """
    weights = _weights(model)
    _require_loaded(weights)
    content = {
        "tower": tower_settings(model.vision_model),
        "preprocessing": preprocessing(image_processor),
        "weights": {
            name: digest_weight(weight)
            for name, weight in weights.items()
            if with_projection or name.startswith("vision_model.")
        },
    }
    if model.config.vision_pooling != "cls":
        content["pooling"] = model.config.vision_pooling
    return RULE + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def weights_checksum(model: nn.Module) -> str:
    """Hash every weight of a model, rounded to bfloat16, so that a model and its copy in bfloat16 are equal.

    Returns:
        `3-` and 32 hexadecimal digits.

    Raises:
        ValueError: A weight is offloaded or quantised.
    """
    weights, digests = model.state_dict(), {}
    _require_loaded(weights)
    for name, weight in weights.items():
        if weight.is_floating_point():
            digests[name] = digest_weight(weight)
        else:
            content = weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digests[name] = hashlib.sha256(f"{tuple(weight.shape)}".encode() + content).hexdigest()[:32]
    return RULE + hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:32]


def _require_loaded(weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        if weight.is_meta or type(weight.data) is not Tensor:
            raise ValueError(
                f"{name} cannot be read to identify the model: it is offloaded or quantised. Load it whole, onto one "
                "device and in float32 or bfloat16."
            )


def _weights(model: Any) -> dict[str, Tensor]:
    names = ("vision_model", "visual_standardization", "visual_projection")
    parts = {f"{name}.": part for name in names if (part := getattr(model, name)) is not None}
    state = {name: value for prefix, part in parts.items() for name, value in part.state_dict(prefix=prefix).items()}
    # transformers 5 nests some towers once more than earlier versions.
    return {name.replace("vision_model.vision_model.", "vision_model."): value for name, value in state.items()}


def tower_settings(tower: Any) -> dict[str, Any]:
    """Select the settings of a vision tower that change its output, without those at the default of their class."""
    # The settings that are irrelevant to decoders are so to all towers of transformers.
    settings = decoder_identity(tower.config, bidirectional=False)
    return {name: value for name, value in settings.items() if not IRRELEVANT.fullmatch(name)}


def preprocessing(image_processor: Any) -> dict[str, Any]:
    """Select the settings of an image processor that change pixel values; those of steps that are off do not."""
    settings = image_processor.to_dict()
    for step, names in STEPS.items():
        if not settings.get(step):
            for name in (step, *names):
                settings.pop(name, None)
    kept = {name: value for name, value in settings.items() if value is not None and not NOT_PIXELS.fullmatch(name)}
    sizes = {name: value for name, value in kept.items() if isinstance(value, dict)}
    # Versions of transformers name the unset sides of a size or leave them out.
    kept |= {name: {side: length for side, length in size.items() if length} for name, size in sizes.items()}
    return plain_settings(kept)

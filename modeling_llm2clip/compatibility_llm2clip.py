"""What exists for transformers before 5.6 alone, 4.57 above all, and how the models use its attention.

One saved folder gives equal results in 4.57.6 and in every release from 5.2 on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# Whether decoders respect `is_causal` of their config; flash attention and FlexAttention are causal before.
IS_CAUSAL_COUNTS = VERSION >= (5, 2)
# CLIP and SigLIP towers nest their modules one level deeper before 5.6.
NESTED_TOWERS = () if VERSION >= (5, 6) else ("clip_vision_model", "siglip_vision_model")
NEST = "vision_model.vision_model"


class AttentionBackends:
    """Mixin of the models here: they run with every attention implementation of transformers."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers would look for its version's call in the module of the class.
        return True


def attention_function(implementation: str, eager: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of an attention implementation; that of `eager` is the model's own."""
    if VERSION >= (5, 0):
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    return eager if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]


class ProcessorParts:
    """Mixin of the processor: the parts that version 4 loads. Version 5 reads them in the signature."""

    if VERSION < (5, 0):  # version 5 warns about these
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"


def loading_arguments(name: str | os.PathLike[str], hub: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that a model with a vision tower needs.

    Args:
        hub: Arguments that locate the repository.
    """
    arguments: dict[str, Any] = {}
    if NESTED_TOWERS:
        fields, _ = PretrainedConfig.get_config_dict(name, **hub)
        if fields.get("vision_config", {}).get("model_type") in NESTED_TOWERS:
            arguments["key_mapping"] = {r"^vision_model\.": f"{NEST}."}
    if VERSION < (5, 0):
        # Version 4 otherwise leaves the buffers of a part that is offloaded to disk at their initial values.
        arguments["offload_buffers"] = True
    return arguments


def with_flat_tower(model: PreTrainedModel, state_dict: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Name the weights of a vision tower as the newest version does; None, if they need not be named, as it is."""
    if model.config.vision_config.model_type not in NESTED_TOWERS:
        return state_dict
    state_dict = model.state_dict() if state_dict is None else state_dict
    return {name.replace(f"{NEST}.", "vision_model.", 1): value for name, value in state_dict.items()}


def record_dtype(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Write the dtype of a saved model: version 4 records that of its first parameter, which is logit_scale."""
    if VERSION < (5, 0):
        model.config.dtype = model.dtype
        model.config.save_pretrained(folder)


ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_local_base_freq", "global_rope_theta", "local_rope_theta")
# The fields of version 4 for the bases of layers that attend to everything and of those with a window.
ROPE_BASES = {"modernbert": ("global_rope_theta", "local_rope_theta")}


def with_version_4_rope(decoder: dict[str, Any]) -> dict[str, Any]:
    """Copy a decoder's rotary settings to the fields of version 4, which would silently use its defaults."""
    rope = decoder.get("rope_parameters")
    if not isinstance(rope, dict):
        return decoder
    fields: dict[str, Any] = {}
    everything, window = ROPE_BASES.get(str(decoder.get("model_type")), ("rope_theta", "rope_local_base_freq"))
    if isinstance(rope.get("full_attention"), dict):  # one set per layer type, as in Gemma 3
        fields[window] = (rope.get("sliding_attention") or {}).get("rope_theta")
        rope = rope["full_attention"]
    fields[everything] = rope.get("rope_theta")
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {**decoder, **{key: value for key, value in fields.items() if value is not None}}


def without_version_4_rope(decoder: dict[str, Any]) -> dict[str, Any]:
    """Remove the fields that [`with_version_4_rope`] adds, where this version does not need them."""
    if VERSION < (5, 0) or decoder.get("rope_parameters") is None:
        return decoder
    return {key: value for key, value in decoder.items() if key not in ROPE_FIELDS}


def make_readable_by_version_4(folder: str | os.PathLike[str]) -> None:
    """Make the tokenizer and image processor files of a folder readable by transformers 4.57."""
    folder = Path(folder)
    tokenizer = _read(folder / "tokenizer_config.json")
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        _write(folder / "tokenizer_config.json", {**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"})
    processor = _read(folder / "processor_config.json")
    if "image_processor" in processor:
        image_processor = {**processor["image_processor"], "processor_class": processor.get("processor_class")}
        name = image_processor.get("image_processor_type", "")
        if VERSION >= (5, 0):
            # LLM2CLIPProcessor uses Pillow. Its class has a suffix in version 5; in version 4 torchvision's has one.
            name = name.removesuffix("Pil")
            name = name if hasattr(transformers, f"{name}Pil") else f"{name}Fast"
        _write(folder / "preprocessor_config.json", {**image_processor, "image_processor_type": name})


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

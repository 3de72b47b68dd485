"""Convert JSON files written by transformers 5 so that transformers 4.57 reads them too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import transformers

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])


class AttentionBackends:
    """Mixin of the models here: they run with every attention implementation of transformers."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True


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
    """Remove the fields that [`with_version_4_rope`] adds."""
    if decoder.get("rope_parameters") is None:
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

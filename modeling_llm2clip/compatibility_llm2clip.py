"""What transformers 4.57 needs in the JSON files that a newer version writes, so that one folder serves them all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from transformers import __version__ as transformers_version

VERSION_4_TOKENIZER = "PreTrainedTokenizerFast"
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_local_base_freq")


def with_version_4_rope(decoder: dict[str, Any]) -> dict[str, Any]:
    """A decoder's JSON with the rotary settings also where version 4 looks: it would silently use its defaults."""
    rope = decoder.get("rope_parameters")
    if not isinstance(rope, dict):
        return decoder
    fields: dict[str, Any] = {}
    if isinstance(rope.get("full_attention"), dict):  # one set per kind of layer, as in Gemma 3
        fields["rope_local_base_freq"] = (rope.get("sliding_attention") or {}).get("rope_theta")
        rope = rope["full_attention"]
    fields["rope_theta"] = rope.get("rope_theta")
    if rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {**decoder, **{key: value for key, value in fields.items() if value is not None}}


def without_version_4_rope(decoder: dict[str, Any]) -> dict[str, Any]:
    """The JSON of [`with_version_4_rope`] as newer versions want it."""
    if decoder.get("rope_parameters") is None:
        return decoder
    return {key: value for key, value in decoder.items() if key not in ROPE_FIELDS}


def nests_vision_towers() -> bool:
    """Whether CLIP's and SigLIP's towers keep everything one level deeper, as before transformers 5.6."""
    return tuple(int(part) for part in transformers_version.split(".")[:2]) < (5, 6)


def make_readable_by_version_4(folder: str | os.PathLike[str]) -> None:
    """Complete a folder's tokenizer and image processor files, where it has any."""
    tokenizer_file = Path(folder) / "tokenizer_config.json"
    if tokenizer_file.is_file():
        tokenizer = json.loads(tokenizer_file.read_text(encoding="utf-8"))
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":
            tokenizer["tokenizer_class"] = VERSION_4_TOKENIZER
            _write(tokenizer_file, tokenizer)
    processor_file = Path(folder) / "processor_config.json"
    if processor_file.is_file():
        processor = json.loads(processor_file.read_text(encoding="utf-8"))
        if "image_processor" in processor:
            image_processor = {**processor["image_processor"], "processor_class": processor.get("processor_class")}
            name = image_processor.get("image_processor_type", "")
            if not transformers_version.startswith("4."):
                # The names of the two backends: torchvision's had a suffix, now PIL's has one.
                name = name.removesuffix("Pil") if name.endswith("Pil") else f"{name}Fast"
            image_processor["image_processor_type"] = name
            _write(Path(folder) / "preprocessor_config.json", image_processor)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

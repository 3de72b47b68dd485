"""The files by which sentence-transformers reads a saved model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm2clip.utils.files import write_json
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPTextConfig, LLM2CLIPVisionModelWithProjection

MODULES = "sentence_transformers.base.modules"
NORMALIZE_FOLDER = "1_Normalize"
# `forward` and not `get_image_features`: some towers take more than pixels, and of another method's arguments
# sentence-transformers passes only those that its signature names.
FORWARD = {"method": "forward", "method_output_name": "pooler_output"}


def write_sentence_transformers_files(folder: str | Path) -> list[Path]:
    """Make a saved model folder load as `SentenceTransformer(folder, trust_remote_code=True)`.

    A joint model embeds captions and images with unit rows, as its `encode_text` and `encode_image` do. A text tower
    embeds captions as its `encode` does: not normalised, so that the rows can go into an adapter as `llm_embeds`
    (`similarity` is the cosine, and `encode(normalize_embeddings=True)` gives unit rows). No prompt is added here: the
    tokenizer holds it. Files of those names are replaced.

    Args:
        folder: What `save_pretrained` of a model and of its processor or tokenizer left.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: The folder holds no config.json, or no tokenizer or image processor.
        ValueError: It holds another kind of model, a vision half alone, or a PEFT adapter.
    """
    folder = Path(folder)
    modalities = _modalities(folder)
    text_alone = list(modalities) == ["text"]
    modules = [("", f"{MODULES}.transformer.Transformer")]
    if not text_alone:
        modules.append((NORMALIZE_FOLDER, f"{MODULES}.normalize.Normalize"))
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": index, "name": str(index), "path": path, "type": kind}
            for index, (path, kind) in enumerate(modules)
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": modalities,
            "module_output_name": "sentence_embedding",
        },
        "config_sentence_transformers.json": {
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    if not text_alone:
        files[f"{NORMALIZE_FOLDER}/config.json"] = {
            "module_input_name": "sentence_embedding",
            "module_output_name": "sentence_embedding",
        }
    for name, content in files.items():
        write_json(folder / name, content)
    return [folder / name for name in files]


def _modalities(folder: Path) -> dict[str, dict[str, str]]:
    """What a folder's model embeds, and by which of its methods."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; give a folder that save_pretrained() has written.")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds a PEFT adapter, which sentence-transformers would put on a plain causal LLM; merge it "
            "first: load it, call merge_adapter() and save_pretrained()."
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind not in (LLM2CLIPConfig.model_type, LLM2CLIPTextConfig.model_type):
        raise ValueError(f"{folder} holds a model of type {kind!r}; give a folder of an LLM2CLIP model or text tower.")
    if LLM2CLIPVisionModelWithProjection.__name__ in (config.get("architectures") or []):
        raise ValueError(f"{folder} holds a vision half alone, which takes no captions; give the whole model.")
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer; save the model's processor or tokenizer there too.")
    if kind == LLM2CLIPTextConfig.model_type:
        return {"text": FORWARD}
    if not (folder / "processor_config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no processor_config.json; save the model's processor there too.")
    return {"text": FORWARD, "image": FORWARD}


__all__ = ["write_sentence_transformers_files"]

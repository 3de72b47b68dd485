"""Files that make a saved model folder loadable as a `SentenceTransformer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm2clip.files.atomic import write_json
from llm2clip.models.repos import RepoKind, inspect_repo

MODULES = "sentence_transformers.base.modules"
NORMALIZE_FOLDER = "1_Normalize"
# `forward` instead of `get_image_features`: some towers need more inputs than the pixels, and sentence-transformers
# passes to any other method only the arguments in its signature.
FORWARD = {"method": "forward", "method_output_name": "pooler_output"}


def write_sentence_transformers_files(folder: str | Path) -> None:
    """Make a saved model folder load as `SentenceTransformer(folder, trust_remote_code=True)`.

    A joint model embeds captions and images as unit vectors, like its `encode_text` and `encode_image`, and an image
    with a text, `{"image": ..., "text": ...}`, as the sum of both, scaled to unit length. A text tower embeds
    captions like its `encode`: not normalized, so that an adapter accepts the rows as `llm_embeds` (`similarity` is
    the cosine, and `encode(normalize_embeddings=True)` returns unit vectors). No prompt is set,
    because the tokenizer adds it. Existing files of the same names are replaced.

    Args:
        folder: A model and its processor or tokenizer, written by `save_pretrained`.

    Raises:
        ValueError: The folder contains another kind of model.
    """
    folder = Path(folder)
    repo = inspect_repo(folder)
    repo.require(RepoKind.JOINT, RepoKind.TEXT_TOWER, hint="Give the folder of a model that embeds captions.")
    names = ["text"] if repo.kind is RepoKind.TEXT_TOWER else ["text", "image", "image+text"]
    modalities = dict.fromkeys(names, FORWARD)
    modules = [{"idx": 0, "name": "0", "path": "", "type": f"{MODULES}.transformer.Transformer"}]
    files: dict[str, Any] = {
        "modules.json": modules,
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
            # What the code that ships with a model runs with.
            "requirements": {"transformers": ">=4.57.6,!=5.0.*,!=5.1.*"},
        },
    }
    if "image" in modalities:
        modules.append({"idx": 1, "name": "1", "path": NORMALIZE_FOLDER, "type": f"{MODULES}.normalize.Normalize"})
        renamed = dict.fromkeys(("module_input_name", "module_output_name"), "sentence_embedding")
        files[f"{NORMALIZE_FOLDER}/config.json"] = renamed
    for name, content in files.items():
        write_json(folder / name, content)

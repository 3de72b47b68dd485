"""Opening an encoder of any library."""

from __future__ import annotations

import torch

from llm2clip.encoders.custom import CustomEncoder
from llm2clip.encoders.encoder import TowerEncoder
from llm2clip.encoders.open_clip import PREFIX, OpenClipEncoder
from llm2clip.encoders.ours import LLM2CLIPTowers
from llm2clip.encoders.transformers_clip import TransformersEncoder
from llm2clip.utils.processes import process_state
from llm2clip.utils.repos import OUR_MODELS, RepoKind, inspect_repo


def load_encoder(
    spec: str,
    revision: str | None = None,
    dtype: str = "float32",
    device: torch.device | str | None = None,
    batch_size: int | None = None,
) -> TowerEncoder:
    """Load a model of images and texts, of any library.

    Args:
        spec: Hub id or folder of an LLM2CLIP model, or of a CLIP, SigLIP, SigLIP 2 or CLIP-like model of transformers.
            `open_clip:MODEL/PRETRAINED` is a model of open_clip, where PRETRAINED is a tag, or the path of a
            checkpoint (`open_clip:ViT-B-32//path/to.pt`). `PATH.py:FUNCTION` calls a function of yours, which returns
            `(model, preprocess, tokenizer)` as open_clip and CLIP_benchmark have them. The vision half of an LLM2CLIP
            model embeds images only, a text tower or an embedding model of sentence-transformers texts only.
        revision: Branch, tag or commit on the Hub.
        dtype: `float32`, `bfloat16` or `float16`, in which the model computes.
        device: The default is a GPU if there is one.
        batch_size: Largest number of texts per forward pass; the default is as many as their tokens allow.

    Returns:
        An encoder: `encode_text(texts)` and `encode_image(images)` return unit rows; `width`; `identity()`.

    Raises:
        OSError: There is no such model.
        ImportError: open_clip is not installed.
        ValueError: The model is of another kind, or would have random weights.
    """
    device = torch.device(device or process_state().device)
    if spec.startswith(PREFIX):
        if revision is not None:
            raise ValueError(f"{spec} is a model of open_clip, which has no revision ({revision!r}).")
        return OpenClipEncoder.load(spec, dtype, device, batch_size)
    if spec.rpartition(":")[0].endswith(".py"):
        if revision is not None:
            raise ValueError(f"{spec} is a function, which has no revision ({revision!r}).")
        return CustomEncoder.load(spec, dtype, device, batch_size)
    repo = inspect_repo(spec, revision)
    has_both = {"vision_config", "text_config"} <= set(repo.config)
    if repo.kind in OUR_MODELS or (repo.kind is RepoKind.EMBEDDING_MODEL and not has_both):
        return LLM2CLIPTowers.load(repo, dtype, device, batch_size)
    return TransformersEncoder.load(spec, revision, dtype, device, batch_size)

"""Opening an encoder of any library, and embedding with one of ours in one call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.command_line.processes import process_state
from llm2clip.data import ImageBackend, OnError
from llm2clip.encoders.custom import CustomEncoder
from llm2clip.encoders.encoder import Encoder
from llm2clip.encoders.mapped_text import MappedTextEncoder, is_mapped_text
from llm2clip.encoders.open_clip import OpenClipEncoder
from llm2clip.encoders.ours import OurEncoder
from llm2clip.encoders.query_encoder import QueryTextEncoder, TextEncoder, has_query_encoder
from llm2clip.encoders.sentence_transformer import SentenceTransformerEncoder
from llm2clip.encoders.transformers_clip import TransformersEncoder, has_both_features
from llm2clip.models.places import OPEN_CLIP
from llm2clip.models.repos import OUR_MODELS, RepoKind, embedding_modules, inspect_repo


def load_encoder(
    spec: str,
    revision: str | None = None,
    dtype: str = "float32",
    device: torch.device | str | None = None,
    needs: Sequence[str] = (),
    truncate_dim: int | None = None,
    text_encoder: TextEncoder = "llm",
    image_backend: ImageBackend = "exact",
) -> Encoder:
    """Load a model of images and texts, of any library.

    Args:
        spec: Hub id or folder of an LLM2CLIP model, or of a CLIP, SigLIP, SigLIP 2 or CLIP-like model of transformers,
            also as sentence-transformers saved it (`sentence-transformers/clip-ViT-B-32`). A multimodal embedding
            model of sentence-transformers (`Qwen/Qwen3-VL-Embedding-2B`) embeds texts as queries, images as documents.
            `open_clip:MODEL/PRETRAINED` is a model of open_clip, where PRETRAINED is a tag, or the path of a
            checkpoint (`open_clip:ViT-B-32//path/to.pt`). `PATH.py:FUNCTION` calls a function of yours, which returns
            `(model, preprocess, tokenizer)` as open_clip and CLIP_benchmark have them. The vision half of an LLM2CLIP
            model embeds images only, a text tower or an embedding model of sentence-transformers texts only.
        revision: Branch, tag or commit on the Hub.
        dtype: `float32`, `bfloat16` or `float16`, in which the model computes; `auto` is that of the checkpoint, or
            `float32` where it does not say; on a CPU, which is slow in `float16`, `float32` replaces that type outside
            the LLM.
        device: The default is a GPU if there is one.
        needs: What it has to embed: `image`, `text` or both. Of an LLM2CLIP model that embeds images alone, only the
            vision half is loaded. The default takes what there is.
        truncate_dim: Number of values that are kept of each embedding, scaled to unit length again; by default all.
        text_encoder: `query` embeds texts with the small encoder in `query_encoder/` of an LLM2CLIP model, without its
            LLM; `auto` does so where there is one.
        image_backend: `fast`, for an LLM2CLIP model, decodes JPEGs to tensors, with pixel values that differ by up to
            2 of 255 from those of its image processor.

    Returns:
        An encoder: `encode_text(texts)` and `encode_image(images)` return unit rows; `width`; `identity()`.

    Raises:
        OSError: There is no such model.
        ImportError: open_clip or sentence-transformers, which the model needs, is not installed.
        ValueError: The model is of another kind, lacks a side that is needed, would have random weights, has no query
            encoder of its own, or no such backend.
    """
    device = torch.device(device or process_state().device)
    is_function = spec.rpartition(":")[0].endswith(".py")
    options: dict[str, Any] = {"device": device, "dtype": dtype, "image_backend": image_backend}
    encoder: Encoder
    if text_encoder == "query" or (text_encoder == "auto" and has_query_encoder(spec, revision)):
        encoder = QueryTextEncoder.load(spec, revision, **options)
    elif is_mapped_text(spec):
        encoder = load_query_encoder(spec, dtype, device)
    elif is_function or spec.startswith(OPEN_CLIP):
        if revision is not None:
            raise ValueError(f"{spec} is no repository on the Hub, and has no revision ({revision!r}).")
        load = CustomEncoder.load if is_function else OpenClipEncoder.load
        encoder = load(spec, "float32" if dtype == "auto" else dtype, device)
    else:
        repo = inspect_repo(spec, revision)
        has_both = {"vision_config", "text_config"} <= set(repo.config)
        if repo.kind in OUR_MODELS or (repo.kind is RepoKind.EMBEDDING_MODEL and not has_both):
            encoder = OurEncoder.load(spec, revision, needs, **options)
        elif (
            not has_both_features(repo.model_type)
            and not repo.subfolder
            and embedding_modules(spec, revision=revision)
        ):
            encoder = SentenceTransformerEncoder.load(spec, revision, dtype, device)
        else:
            encoder = TransformersEncoder.load(spec, revision, dtype, device, repo.subfolder)
    if encoder.image_backend != image_backend:
        raise ValueError(f"image_backend is {image_backend}, but {spec} is no LLM2CLIP model of images: leave it out.")
    return encoder.truncate(truncate_dim)


def load_query_encoder(
    folder: str | os.PathLike[str],
    dtype: str = "float32",
    device: torch.device | str | None = None,
    images: Encoder | None = None,
) -> MappedTextEncoder:
    """Open a query encoder that `llm2clip align --keep-images` wrote, with its text model.

    Args:
        images: The model of the image vectors, for queries that are images.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: Its text model has changed, or `images` is another model than that of the vectors.
    """
    return MappedTextEncoder.load(
        folder, lambda name, revision: load_encoder(name, revision, dtype, device, needs=["text"]), images
    )


def embed_captions(
    captions: Sequence[str] | str,
    model: Any,
    processor: Any = None,
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    show_progress_bar: bool | None = None,
    instruction: str | None = None,
) -> Tensor:
    """Embed captions with an LLM2CLIP model or a text tower.

    Args:
        captions: The captions, of any length; one string counts as a list of one.
        model: A loaded `LLM2CLIPModel` or `LLM2CLIPTextModel`, which is put into evaluation mode, or the Hub id or
            folder of one.
        processor: The model's processor or tokenizer; required with a loaded model.
        batch_size: Largest number of captions per forward pass; the default is as many as the device keeps up with.
        device: Device of the model. By default a loaded model stays where it is, and another one uses a GPU if there
            is one.
        show_progress_bar: `False` hides the progress bar.
        instruction: Text before every caption, as in stage 1; it is context and not pooled.

    Returns:
        float32 on the CPU, in input order. Of an LLM2CLIP model unit rows `(len(captions), projection_dim)` in the
        space that captions share with images; of a text tower its own embeddings `(len(captions), hidden_size)`.

    Raises:
        NonFiniteError: An embedding is NaN or infinite.
        ValueError: A caption is empty, the repository is another kind of model, or a loaded model comes without its
            processor.
    """
    encoder = _open(model, processor, device, "text")
    return encoder.embed(captions, batch_size, show_progress_bar is not False, instruction)[0]


def embed_images(
    images: Sequence[Any] | Any,
    model: Any,
    processor: Any = None,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    on_error: OnError = "raise",
    show_progress_bar: bool | None = None,
) -> Tensor:
    """Embed images with an LLM2CLIP model.

    Args:
        images: PIL images, paths, URLs, encoded bytes, arrays, tensors or records of `datasets`, mixed as you like;
            one image counts as a list of one.
        model: A loaded model, which is put into evaluation mode, or the Hub id or folder of one; then only the vision
            half is loaded.
        processor: The model's processor or image processor; required with a loaded model.
        batch_size: Images per forward pass.
        num_workers: Worker processes that read and decode images; 0 decodes in this process.
        device: Device of the model. By default a loaded model stays where it is, and another one uses a GPU if there
            is one.
        on_error: `raise` for an image that cannot be read, or `skip` it: its row is NaN, and a warning names it.
        show_progress_bar: `False` hides the progress bar.

    Returns:
        Unit rows, float32 `(len(images), projection_dim)` on the CPU, in input order.

    Raises:
        DamagedImageError: An image cannot be read.
        NonFiniteError: The model's embedding of an image is NaN or infinite.
        ValueError: The repository is not an LLM2CLIP model, or a loaded model comes without its processor.
    """
    encoder = _open(model, getattr(processor, "image_processor", processor), device, "image")
    show = show_progress_bar is not False
    return encoder.encode_image(images, batch_size, num_workers, show, on_error=on_error)


def _open(model: Any, processor: Any, device: torch.device | str | None, need: str) -> OurEncoder:
    if isinstance(model, (str, Path)):
        return OurEncoder.load(os.fspath(model), None, [need], processor=processor, device=device)
    if processor is None:
        raise ValueError("a loaded model needs its processor too: AutoProcessor.from_pretrained(...).")
    return OurEncoder((model if device is None else model.to(device)).eval(), processor)

"""Open the embedder that a caller means: of a loaded model, of a folder, or of a repository on the Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import torch

EmbedderT = TypeVar("EmbedderT")


def open_embedder(
    embedder_class: type[EmbedderT], model: Any, processor: Any, device: torch.device | str | None = None
) -> EmbedderT:
    """Return an embedder of a loaded model, which is put into evaluation mode, or load one.

    Args:
        embedder_class: `CaptionEmbedder` or `ImageEmbedder`.
        model: A loaded model, or the Hub id or folder of one.
        processor: Replaces the one that is saved with the model; required with a loaded model.
        device: By default a loaded model stays where it is, and another one uses a GPU if there is one.

    Raises:
        OSError: There is no such model.
        ValueError: The repository is another kind of model, or a loaded model comes without its processor.
    """
    make: Any = embedder_class
    if isinstance(model, (str, Path)):
        embedder = make.load(os.fspath(model), device=device)
        return embedder if processor is None else make(embedder.model, processor)
    if processor is None:
        raise ValueError("a loaded model needs its processor too: AutoProcessor.from_pretrained(...).")
    return make((model if device is None else model.to(device)).eval(), processor)

"""An alignment that keeps the space of an image-text model: only the text side is solved for, from texts alone."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from llm2clip.command_line.processes import on_main_process
from llm2clip.data import CaptionImageDataset, OnError, SkippedSample
from llm2clip.encoders import Encoder, OurEncoder
from llm2clip.store import EmbeddingCache, Store
from llm2clip.store.store import caption_keys
from llm2clip.trainers.closed_form import DEFAULT_RIDGE, sum_pairs
from llm2clip.trainers.stored_rows import require_captions
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel
from modeling_llm2clip.modeling_llm2clip_heads import LLM2CLIPStandardization, LLM2CLIPTextAdapter

logger = logging.getLogger(__name__)

# What is tried where a validation set can choose.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# The fields of a model's config that say how it makes embeddings of a tower's outputs.
VISION_SIDE = (
    *("vision_pooling", "vision_layers", "standardize_vision", "visual_head", "visual_head_expansion"),
    *("visual_projection", "visual_projection_bias"),
)
# Above this cosine, two models embed an image as one and the same.
SAME = 0.999


def take_vision_side(model: LLM2CLIPModel, image_processor: Any, encoder: Encoder, name: str) -> None:
    """Let a model project images as another one does, so that they are in the space of that one's texts.

    The vision tower has to be that model's already. What follows it is taken from there: all heads of an LLM2CLIP
    model, the projection of a CLIP, nothing of a SigLIP, which has none.

    Args:
        encoder: The other model, which is called `name` in messages.

    Raises:
        ValueError: Its embeddings have another width, or it embeds images otherwise.
    """
    config = cast(LLM2CLIPConfig, model.config)
    size = config.vision_config.image_size
    shape = (size, size, 3) if isinstance(size, int) else (*size, 3)
    noise = [np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8) for seed in range(2)]
    images = [Image.fromarray(values) for values in noise]
    wanted, ours = encoder.encode_image(images).cpu(), OurEncoder(model.eval(), image_processor)
    other: Any = encoder.model
    is_ours, head = isinstance(encoder, OurEncoder), getattr(other, "visual_projection", None)
    head = head if is_ours or isinstance(head, nn.Linear) else None
    fields: dict[str, Any] = {"vision_pooling": "cls", "vision_layers": None, "standardize_vision": False}
    fields |= {"visual_head": "linear", "visual_projection": head is not None}
    fields |= {"visual_projection_bias": getattr(head, "bias", None) is not None}
    if is_ours:
        fields = {field: getattr(other.config, field) for field in VISION_SIDE}
    for field, value in fields.items():
        setattr(config, field, value)
    weight = model.text_adapter.proj.weight
    model.visual_projection = (nn.Identity() if head is None else head).to(weight.device, weight.dtype)
    standardization: LLM2CLIPStandardization | None = getattr(other, "visual_standardization", None)
    model.visual_standardization = None if standardization is None else standardization.to(weight.device)
    with contextlib.suppress(RuntimeError):  # a head for features of another width
        if (ours.encode_image(images).cpu() * wanted).sum(dim=1).min() > SAME:
            return
    raise ValueError(
        f"keep_space_of: {name} embeds images otherwise than the vision tower of this model, so that its texts are in "
        f"another space than these images. Give {name} as vision_model_name_or_path, with its image processor."
    )


def drawn_captions(dataset: CaptionImageDataset, cache: EmbeddingCache, on_error: OnError) -> list[str]:
    """List the captions of a data set that training draws from, each once; no image is read.

    Raises:
        MissingCaptionError: The cache lacks a caption, and `on_error` is `raise`.
    """
    rows = (row for row in dataset.captions(on_error) if not isinstance(row, SkippedSample))
    drawn = (text for row in rows for text, weight in zip(row.texts, row.weights, strict=True) if weight)
    texts = list(dict.fromkeys(drawn))
    if on_error == "skip":
        stored = cache.contains(texts)
        require_captions(int((~stored).sum()), len(stored), cache, "skip", "the training set")
        texts = list(itertools.compress(texts, stored))
    return texts


def align_texts(
    model: LLM2CLIPModel,
    texts: Sequence[str],
    cache: EmbeddingCache,
    targets: Store,
    ridge: float | None,
    measure: Callable[[], float] | None,
) -> dict[str, float]:
    """Solve for the linear map from the LLM's embeddings of texts to another model's, by ridge regression, and set it.

    With texts `y` of unit length and targets `x`, centred, the map is `(Cyy + ridge * mean(diag Cyy) I)^-1 Cyx`.

    Args:
        texts, cache: The texts, and the LLM's embeddings of them.
        targets: The other model's embeddings of them, of the width of the model's space.
        ridge: None: the best of `RIDGES` by `measure`, or the default without it.
        measure: Measures the model on validation sets.

    Returns:
        The ridge, and what was measured with it.
    """
    rows, target_rows = cache.rows(list(texts)), targets.find(caption_keys(texts))

    def pairs(start: int, stop: int) -> tuple[Tensor, Tensor, None]:
        captions = cache.read(rows[start:stop], torch.float32)
        # As the model itself prepares them.
        prepared = model.text_adapter.prepare(captions.to(model.text_adapter.proj.weight.device)).cpu()
        return F.normalize(targets.read(target_rows[start:stop], torch.float32), dim=-1), prepared, None

    sums = sum_pairs(len(rows), pairs)
    _set_linear_text_head(model)
    layer = model.text_adapter.proj

    ridges = RIDGES if ridge is None and measure is not None else (DEFAULT_RIDGE if ridge is None else ridge,)
    solved = dict(zip(ridges, sums.regressions(ridges), strict=True))

    def install(choice: float) -> None:
        weight, bias = solved[choice]
        with torch.no_grad():
            layer.weight.copy_(weight.T)
            layer.bias.copy_(bias)

    scores = [0.0]
    if measure is not None:
        scores = []
        for choice in ridges:
            install(choice)
            scores.append(measure())
    best = on_main_process(lambda: max(range(len(scores)), key=scores.__getitem__))
    install(ridges[best])
    logger.info("Ridge regression: ridge %g.", ridges[best])
    metrics = {"closed_form_ridge": ridges[best]}
    return metrics if measure is None else {**metrics, "closed_form_mean_recall": scores[best]}


def _set_linear_text_head(model: LLM2CLIPModel) -> None:
    config, weight = cast(LLM2CLIPConfig, model.config), model.text_adapter.proj.weight
    config.text_head = "linear"
    model.text_adapter = LLM2CLIPTextAdapter(config).to(weight.device, weight.dtype)

"""The heads of a model that are not trained: solved for in closed form, or those of another model's space."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from llm2clip.encoders import OurEncoder, load_encoder
from llm2clip.trainers.closed_form import (
    DEFAULT_RIDGE,
    DEFAULT_WIDTH,
    ClosedFormAlignment,
    sum_pairs,
)
from llm2clip.trainers.stage2_config import Alignment
from llm2clip.trainers.stored_rows import StoredPairsDataset
from llm2clip.utils.processes import on_main_process
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel
from modeling_llm2clip.modeling_llm2clip_heads import (
    LLM2CLIPStandardization,
    LLM2CLIPTextAdapter,
    build_visual_head,
)

logger = logging.getLogger(__name__)

# What is tried where a validation set can choose.
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
WIDTHS = (128, 256, 512)
# The heads that each alignment needs, and the hidden width of the gated part, which is small beside its linear map.
HEADS = {"closed_form": "linear", "closed_form_then_train": "residual"}
EXPANSION = 2
# The fields of a model's config that say how it makes embeddings of a tower's outputs.
VISION_SIDE = (
    *("vision_pooling", "standardize_vision", "visual_head", "visual_head_expansion"),
    *("visual_projection", "visual_projection_bias"),
)
# Above this cosine, two models embed an image as one and the same.
SAME = 0.999


def align(
    model: LLM2CLIPModel,
    dataset: StoredPairsDataset,
    alignment: Alignment,
    ridge: float | None,
    width: int | None,
    measure: Callable[[], float] | None,
) -> dict[str, float]:
    """Solve for the linear maps of a model and set them; see [`closed_form_alignment`].

    Args:
        dataset: The pairs. The captions of an image share its weight by the weights of the source.
        alignment: Which heads the model gets.
        ridge, width: None: the best of `RIDGES` and `WIDTHS` by `measure`, or the default without it.
        measure: Measures the model on validation sets.

    Returns:
        The ridge and the width, and what was measured with them.
    """
    samples, caption_rows, weights = dataset.pairs()
    image_rows = dataset.image_rows[samples]
    factors = torch.from_numpy(weights)

    def pairs(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        captions = dataset.cache.read(caption_rows[start:stop], torch.float32)
        # As the model itself prepares them.
        texts = model.text_adapter.prepare(captions.to(model.text_adapter.proj.weight.device)).cpu()
        return dataset.features.read_views(image_rows[start:stop]), texts, factors[start:stop]

    solver = sum_pairs(len(caption_rows), pairs).solver()
    if width is not None and width > solver.max_width:
        solver.solve(DEFAULT_RIDGE, width)  # refuses it
    fitting = sorted({min(choice, solver.max_width) for choice in WIDTHS})
    ridges = RIDGES if ridge is None and measure is not None else (DEFAULT_RIDGE if ridge is None else ridge,)
    widths = [width] if width is not None else fitting if measure is not None else [min(DEFAULT_WIDTH, max(fitting))]
    # The largest width first: the maps of the others are its first columns.
    solved = {choice: solver.solve(choice, max(widths)) for choice in ridges}
    choices = [(choice, cut) for choice in ridges for cut in widths]
    scores = [0.0]
    if measure is not None:
        scores = []
        for choice, cut in choices:
            set_heads(model, "linear", cut)
            install(model, solved[choice].cut(cut))
            scores.append(measure())
    best = on_main_process(lambda: max(range(len(scores)), key=scores.__getitem__))
    ridge, width = choices[best]
    set_heads(model, HEADS[alignment], width)
    install(model, solved[ridge].cut(width))
    logger.info("Closed form: ridge %g, width %d.", ridge, width)
    metrics = {"closed_form_ridge": ridge, "closed_form_width": float(width)}
    return metrics if measure is None else {**metrics, "closed_form_mean_recall": scores[best]}


def head_fields(kind: str, width: int) -> dict[str, Any]:
    """Return the fields of a model's config that make its heads those of a kind, `linear` or `residual`."""
    return {
        "projection_dim": width,
        "visual_projection": True,
        "visual_projection_bias": True,
        "visual_head": kind,
        "text_head": kind,
        **({"visual_head_expansion": EXPANSION} if kind == "residual" else {}),
    }


def set_heads(model: LLM2CLIPModel, kind: str, width: int) -> None:
    """Give a model new heads of a kind, `linear` or `residual`, and a width, unless it has such heads."""
    config, wanted = cast(LLM2CLIPConfig, model.config), head_fields(kind, width)
    if all(getattr(config, name) == value for name, value in wanted.items()):
        return
    for name, value in wanted.items():
        setattr(config, name, value)
    weight = model.text_adapter.proj.weight
    head, adapter = build_visual_head(config), LLM2CLIPTextAdapter(config)
    for part in (head, adapter):
        part.apply(model._init_weights)
        part.to(weight.device, weight.dtype)
    if (center := model.text_adapter.center) is not None:
        cast(Tensor, adapter.center).copy_(center)
    model.visual_projection, model.text_adapter = head, adapter


def take_space(model: LLM2CLIPModel, image_processor: Any, name: str) -> None:
    """Let a model project images as another one does, so that they are in the space of that one's texts.

    The vision tower has to be that model's already. What follows it is taken from there: all heads of an LLM2CLIP
    model, the projection of a CLIP, nothing of a SigLIP, which has none.

    Args:
        name: Hub id or folder of a model of images and texts; see [`load_encoder`](llm2clip.encoders.load_encoder).

    Raises:
        ValueError: Its embeddings have another width, or it embeds images otherwise.
    """
    encoder, config = load_encoder(name, device="cpu", needs=["image"]), cast(LLM2CLIPConfig, model.config)
    if encoder.width != config.projection_dim:
        raise ValueError(
            f"distill_from: {name} embeds as {encoder.width} values, but the model as {config.projection_dim}; set "
            f"projection_dim: {encoder.width}."
        )
    size = config.vision_config.image_size
    shape = (size, size, 3) if isinstance(size, int) else (*size, 3)
    noise = [np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8) for seed in range(2)]
    images = [Image.fromarray(values) for values in noise]
    wanted, ours = encoder.encode_image(images), OurEncoder(model.eval(), image_processor)

    def is_same() -> bool:
        return bool((ours.encode_image(images) * wanted).sum(dim=1).min() > SAME)

    if is_same():
        return
    other: Any = encoder.model
    is_ours, head = isinstance(encoder, OurEncoder), getattr(other, "visual_projection", None)
    head = head if is_ours or isinstance(head, nn.Linear) else None
    fields: dict[str, Any] = {"vision_pooling": "cls", "standardize_vision": False, "visual_head": "linear"}
    fields |= {"visual_projection": head is not None}
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
        if is_same():
            logger.info("Images are projected as by %s, whose space is kept.", name)
            return
    raise ValueError(
        f"distill_from: {name} embeds images otherwise than the vision tower of this model, so that its texts would "
        f"be taught another space than that of the images. Give {name} as vision_model_name_or_path, with its image "
        "processor, or leave distill_from out."
    )


def standardize(model: LLM2CLIPModel) -> None:
    """Let a model standardise its features and centre its captions, with statistics that are set later."""
    config = cast(LLM2CLIPConfig, model.config)
    weight = model.text_adapter.proj.weight
    if model.visual_standardization is None:
        config.standardize_vision = True
        model.visual_standardization = LLM2CLIPStandardization(config.vision_width).to(weight.device)
    if model.text_adapter.center is None:
        config.center_text = True
        model.text_adapter.center = torch.zeros(config.text_config.hidden_size, device=weight.device)


def linear_maps(model: LLM2CLIPModel) -> tuple[nn.Linear, nn.Linear]:
    """Return the layers whose weights a closed form gives: of images, of texts."""
    head: Any = model.visual_projection
    return getattr(head, "linear", head), model.text_adapter.linear or model.text_adapter.proj


def freeze_maps(model: LLM2CLIPModel) -> None:
    """Keep these layers as they are in training."""
    for layer in linear_maps(model):
        layer.requires_grad_(False)


@torch.no_grad()
def install(model: LLM2CLIPModel, alignment: ClosedFormAlignment) -> None:
    """Set the linear maps of a model, and the statistics of its features if it standardises them."""
    image, text = linear_maps(model)
    weight, bias = alignment.image_map, torch.zeros_like(alignment.correlations)
    if model.visual_standardization is not None:
        model.set_vision_statistics(alignment.image_mean, alignment.image_std)
    else:
        weight = weight / alignment.image_std[:, None]
        bias = -(alignment.image_mean @ weight)
    _set(image, weight, bias)
    _set(text, alignment.text_map, -(alignment.text_mean @ alignment.text_map))


def _set(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight.T)
    layer.bias.copy_(bias)

"""The vision tower and its projection, which every LLM2CLIP model has, and the vision half as a model."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compatibility_llm2clip import AttentionBackends, loading_arguments, record_dtype, with_flat_tower
from .configuration_llm2clip import EVA02VisionConfig, LLM2CLIPConfig
from .image_decoding_llm2clip import decode_image  # noqa: F401
from .modeling_eva02 import EVA02VisionModel
from .modeling_llm2clip_heads import (
    GATE,
    LLM2CLIPResidualHead,
    LLM2CLIPStandardization,
    build_visual_head,
    init_like_the_original,
)
from .modeling_llm2clip_utils import execution_device, hub_arguments, load_complete, name_layers

# transformers 4.57 takes from a local folder only the modules that this one itself names.
from .processing_llm2clip import custom_pipelines
from .tokenization_llm2clip import tokenize_captions  # noqa: F401

# Inputs of towers that read images of any shape as padded lists of patches.
MASK_INPUTS = ("pixel_attention_mask", "pixel_mask", "spatial_shapes")
# Sequences of one token in an attention layer at once: kernels for GPUs take fewer than 2**16.
ATTENTION_ROWS = 2**14
# Names that towers give the norm after their last layer.
LAST_NORMS = ("layernorm", "post_layernorm", "norm")


def patch_tokens(tower: nn.Module, output: Any, pixel_values: Tensor) -> Tensor:
    """Select the patches of a tower's last hidden state, normalised as the tower normalises its pooled token.

    Class and register tokens, which come first, are as many as there are tokens without a patch. A hierarchical tower
    has none and fewer tokens than patches. The feature map of a convolutional tower has a token per position. A tower
    that reads a list of patches (NaFlex) has no other tokens; `pixel_values` is then `(batch, patches, values)`.

    Returns:
        `(batch, patches, hidden_size)`.

    Raises:
        ValueError: The tower has no fixed patch size.
    """
    states = output.last_hidden_state
    if states.ndim == 4:
        return states.flatten(2).transpose(1, 2)
    first = 0 if pixel_values.ndim == 3 else getattr(tower, "num_prefix_tokens", None)
    if first is None:
        size = getattr(tower.config, "patch_size", None)
        sides = (size, size) if isinstance(size, int) else size
        if not isinstance(sides, (tuple, list)) or len(sides) != 2:
            raise ValueError(f"{type(tower).__name__} has no fixed patch size, so its patches cannot be pooled.")
        height, width = pixel_values.shape[-2:]
        first = max(states.shape[1] - (height // sides[0]) * (width // sides[1]), 0)
    inner: Any = getattr(tower, "vision_model", tower)
    if _is_clip(inner) and output.get("pooler_output") is not None:
        states = inner.post_layernorm(states)
    return states[:, first:]


def _is_clip(tower: nn.Module) -> bool:
    """Towers like CLIP's have a norm before their layers, and another that they apply to the class token alone."""
    is_clip = hasattr(tower, "pre_layrnorm") or hasattr(tower, "pre_layernorm")
    return is_clip and hasattr(tower, "post_layernorm")


def output_after(tower: nn.Module, output: Any, layer: int) -> Any:
    """Return what a tower would return if it ended after a layer: that layer's states, normalised and pooled.

    Args:
        output: What it returned, with the hidden states.
        layer: Number of the layer, from 1.
    """
    states = output.hidden_states
    if layer == len(states) - 1:
        return output
    inner: Any = getattr(tower, "vision_model", tower)
    norm = getattr(inner, next(name for name in LAST_NORMS if hasattr(inner, name)))
    if _is_clip(inner):
        return BaseModelOutputWithPooling(states[layer], norm(states[layer][:, 0]))
    tokens = norm(states[layer])
    if output.get("pooler_output") is None:
        return BaseModelOutputWithPooling(tokens)
    pool = getattr(inner, "head", None) or getattr(inner, "pooler", None)
    return BaseModelOutputWithPooling(tokens, tokens[:, 0] if pool is None else pool(tokens))


def pool_alone(tower: nn.Module, patches: Tensor) -> Tensor:
    """Map every patch of [`patch_tokens`] to the space of the tower's pooled token.

    A tower that pools by attention (SigLIP) pools each patch alone. In other towers the spaces are the same.

    Returns:
        `(batch, patches, hidden_size)`.
    """
    head: Any = getattr(getattr(tower, "vision_model", tower), "head", None)
    if not hasattr(head, "probe"):
        return patches
    pooled = [head(part[:, None]) for part in patches.flatten(0, 1).split(ATTENTION_ROWS)]
    return torch.cat(pooled).unflatten(0, patches.shape[:2])


class LLM2CLIPPreTrainedModel(AttentionBackends, PreTrainedModel):
    """Base of the joint model and of the vision half: the vision tower and its projection."""

    config_class = LLM2CLIPConfig
    base_model_prefix = ""

    def post_init(self) -> None:
        super().post_init()
        name_layers(self)

    def _build_vision_tower(self) -> None:
        config = self.config.vision_config
        is_eva = config.model_type == EVA02VisionConfig.model_type
        self.vision_model: Any = EVA02VisionModel(config) if is_eva else AutoModel.from_config(config)

    def _build_visual_projection(self, tower: PreTrainedModel | None = None) -> None:
        config: Any = self.config
        tower = self.vision_model if tower is None else tower
        masks = [name for name in inspect.signature(tower.forward).parameters if name in MASK_INPUTS]
        if config.vision_pooling != "cls" and masks:
            raise ValueError(
                f"vision_pooling {config.vision_pooling!r} needs the patches of an image, but {type(tower).__name__} "
                f"pads them ({masks[0]}); use vision_pooling 'cls'."
            )
        inner: Any = getattr(tower, "vision_model", tower)
        if config.vision_layers and (masks or not any(hasattr(inner, name) for name in LAST_NORMS)):
            raise ValueError(
                f"vision_layers: how {type(tower).__name__} normalises and pools is not known; leave it unset."
            )
        standardization = LLM2CLIPStandardization(config.vision_width) if config.standardize_vision else None
        self.visual_standardization: LLM2CLIPStandardization | None = standardization
        self.visual_projection: nn.Module = build_visual_head(config)

    def _keep_in_float32(self, *names: str) -> None:
        """Load these buffers, and the statistics of the features, in float32 into a model of any dtype.

        Called after post_init(), because transformers 4.57 rejects the name of a buffer before.
        """
        names += () if self.visual_standardization is None else ("visual_standardization",)
        self._keep_in_fp32_modules_strict = [*(self._keep_in_fp32_modules_strict or ()), *names]

    def _init_weights(self, module: nn.Module) -> None:
        # The towers initialise their own layers, so that every Linear here is of the head or in the adapter.
        if isinstance(module, LLM2CLIPStandardization):
            nn.init.zeros_(module.mean)
            nn.init.ones_(module.std)
        elif isinstance(module, LLM2CLIPResidualHead):
            nn.init.constant_(module.gate, GATE)
        elif self.config.initializer == "original" and isinstance(module, nn.Linear):
            init_like_the_original(module, self.config.vision_config if module is self.visual_projection else None)
        else:
            super()._init_weights(module)

    @classmethod
    def _load(cls, name: str | os.PathLike[str], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        kwargs = {**loading_arguments(name, hub_arguments(kwargs)), **kwargs}
        return load_complete(super().from_pretrained, name, *args, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Save the model, with the same parameter names in every transformers version."""
        state_dict = with_flat_tower(self, state_dict)
        if self._auto_class is not None:
            self.config.custom_pipelines = custom_pipelines(with_text="text" in self.input_modalities)
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        if kwargs.get("is_main_process", True):
            record_dtype(self, save_directory)

    @property
    def dtype(self) -> torch.dtype:
        # The first parameter is logit_scale, which stays in float32 in a model of any dtype.
        return self.vision_model.dtype

    def get_vision_features(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = None, **kwargs: Any
    ) -> Tensor:
        """Compute the pooled features of images, before standardisation, dropout and projection.

        The arguments are those of [`get_image_features`].

        Returns:
            `(batch, vision_width)`, in the tower's dtype or, if `vision_pooling` is a mean, in float32.
        """
        return self._tower_features(pixel_values, interpolate_pos_encoding, kwargs)[1]

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        vision_features: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Embed images, or stored features of images.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            interpolate_pos_encoding: Accept an image size other than the tower's, if the tower supports it.
            vision_features: `(batch, vision_width)` of any floating dtype, from [`get_vision_features`], instead of
                pixels.
            kwargs: Passed to the vision tower, such as `output_hidden_states`; not used with `vision_features`.

        Returns:
            `pooler_output` `(batch, projection_dim)`, not normalised, and the hidden states of the tower, if it ran.

        Raises:
            ValueError: Both pixels and features are given, or neither, or features of another width.
        """
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("pass either pixel_values or vision_features, stored features of images.")
        if vision_features is not None:
            expected = self.config.vision_width
            if vision_features.ndim != 2 or vision_features.shape[-1] != expected:
                raise ValueError(
                    f"vision_features have shape {tuple(vision_features.shape)}, but this model takes (batch, "
                    f"{expected}): they come from another vision tower or pooling."
                )
            has_weights = next(self.visual_projection.parameters(), None) is not None
            device = execution_device(self.visual_projection if has_weights else self)
            return BaseModelOutputWithPooling(pooler_output=self._project(vision_features.to(device)))
        output, features = self._tower_features(pixel_values, interpolate_pos_encoding, kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=self._project(features),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )

    def get_patch_features(self, pixel_values: Tensor, **kwargs: Any) -> Tensor:
        """Embed each patch of images as the pooled features are embedded.

        In place of the pooled token or the mean over the patches there is the patch; with `vision_pooling` `cls_mean`,
        the patch is in place of the mean; with `vision_layers`, in each of them. A tower that pools by attention pools
        each patch alone.

        Returns:
            `(batch, patches, projection_dim)`, not normalised.
        """
        _, layers = self._run_tower(pixel_values, None, kwargs)
        patches = []
        for layer in layers:
            of_layer = patch_tokens(self.vision_model, layer, pixel_values)
            if self.config.vision_pooling == "cls":
                of_layer = pool_alone(self.vision_model, of_layer)
            elif self.config.vision_pooling == "cls_mean":
                pooled = layer.pooler_output.flatten(1).float()[:, None].expand(-1, of_layer.shape[1], -1)
                of_layer = torch.cat([pooled, of_layer], dim=-1)
            patches.append(of_layer)
        return self._project(torch.cat(patches, dim=-1))

    def _run_tower(
        self, pixel_values: Any, interpolate_pos_encoding: bool | None, kwargs: dict[str, Any]
    ) -> tuple[Any, list[Any]]:
        """Run the tower; returns its output, and those of the layers that are the features."""
        if interpolate_pos_encoding is not None:
            kwargs["interpolate_pos_encoding"] = interpolate_pos_encoding
        numbers = self.config.vision_layers
        if numbers:
            kwargs["output_hidden_states"] = True
        output = self.vision_model(pixel_values=pixel_values, **kwargs)
        if not numbers:
            return output, [output]
        return output, [output_after(self.vision_model, output, number) for number in numbers]

    def _tower_features(
        self, pixel_values: Any, interpolate_pos_encoding: bool | None, kwargs: dict[str, Any]
    ) -> tuple[Any, Tensor]:
        """Run the tower, and pool what it returns; a mean is in float32, which is more accurate than 16 bits."""
        output, layers = self._run_tower(pixel_values, interpolate_pos_encoding, kwargs)
        features = [self._pool(layer, pixel_values) for layer in layers]
        return output, features[0] if len(features) == 1 else torch.cat(features, dim=-1)

    def _pool(self, output: Any, pixel_values: Any) -> Tensor:
        tower, pooling = self.vision_model, self.config.vision_pooling
        pooled = output.get("pooler_output")
        if pooling != "mean":
            if pooled is None:
                raise ValueError(f"{type(tower).__name__} has no pooled output; use vision_pooling 'mean'.")
            pooled = pooled.flatten(1)
        if pooling == "cls":
            return pooled
        mean = patch_tokens(tower, output, pixel_values).float().mean(dim=1)
        return mean if pooling == "mean" else torch.cat([pooled.float(), mean], dim=-1)

    def _project(self, features: Tensor) -> Tensor:
        if self.visual_standardization is not None:
            features = self.visual_standardization(features)
        features = F.dropout(features, self.config.feature_dropout, self.training)
        weight = next(self.visual_projection.parameters(), None)
        return self.visual_projection(features if weight is None else features.to(weight.dtype))


class LLM2CLIPVisionModelWithProjection(LLM2CLIPPreTrainedModel):
    """The vision half of an LLM2CLIP model, for images alone and for multimodal LLMs.

    `pooler_output` is the image embedding `(batch, projection_dim)`; `output_hidden_states=True` returns the hidden
    states of every block.
    """

    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_adapter\.", r"^logit_(scale|bias)$"]

    def __init__(self, config: LLM2CLIPConfig) -> None:
        super().__init__(config)
        self._build_vision_tower()
        self._build_visual_projection()
        self.post_init()
        self._keep_in_float32()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = cls._load(pretrained_model_name_or_path, *args, **kwargs)
        return (model, info) if wants_info else model

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        vision_features: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """See `get_image_features`."""
        return self.get_image_features(pixel_values, interpolate_pos_encoding, vision_features, **kwargs)

"""The vision tower and its projection, which every LLM2CLIP model has, and the vision half as a model."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compatibility_llm2clip import VERSION, AttentionBackends
from .configuration_llm2clip import EVA02VisionConfig, LLM2CLIPConfig
from .image_decoding_llm2clip import decode_image  # noqa: F401
from .modeling_eva02 import EVA02VisionModel
from .modeling_llm2clip_utils import apply_umask, hub_arguments, load_complete

# transformers 4.57 takes from a local folder only the modules that this one itself names.
from .processing_llm2clip import LLM2CLIPProcessor  # noqa: F401
from .tokenization_llm2clip import with_prompt  # noqa: F401

# CLIP and SigLIP towers nest their modules one level deeper before transformers 5.6.
NESTS_TOWERS = VERSION < (5, 6)
NEST = "vision_model.vision_model"
CLIP_TOWER = "clip_vision_model"
NESTED_TOWERS = (CLIP_TOWER, "siglip_vision_model")


class LLM2CLIPPreTrainedModel(AttentionBackends, PreTrainedModel):
    """Base of the joint model and of the vision half: the vision tower and its projection."""

    config_class = LLM2CLIPConfig
    base_model_prefix = ""
    _no_split_modules = ["EVA02Block"]

    def _build_vision_tower(self) -> None:
        config = self.config.vision_config
        is_eva = config.model_type == EVA02VisionConfig.model_type
        self.vision_model: Any = EVA02VisionModel(config) if is_eva else AutoModel.from_config(config)

    def _build_visual_projection(self) -> None:
        width, expected = self.config.vision_config.hidden_size, self.config.projection_dim
        self.visual_projection: nn.Module = nn.Identity()
        if self.config.visual_projection:
            self.visual_projection = nn.Linear(width, expected, bias=self.config.visual_projection_bias)
        elif width != expected:
            raise ValueError(
                f"without a visual projection the tower's width {width} has to be projection_dim {expected}."
            )

    def _init_weights(self, module: nn.Module) -> None:
        # The towers initialise their own layers, so that every Linear here is the projection or in the adapter.
        if self.config.initializer == "original" and isinstance(module, nn.Linear):
            init_like_the_original(module, self.config.vision_config if module is self.visual_projection else None)
        else:
            super()._init_weights(module)

    @classmethod
    def _load(cls, name: str | os.PathLike[str], *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Load a checkpoint, and raise an error if weights are missing."""
        if NESTS_TOWERS:
            fields, _ = PretrainedConfig.get_config_dict(name, **hub_arguments(kwargs))
            if fields.get("vision_config", {}).get("model_type") in NESTED_TOWERS:
                kwargs["key_mapping"] = {r"^vision_model\.": f"{NEST}."}
        return load_complete(super().from_pretrained, name, *args, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Save the model, with the same parameter names in every transformers version."""
        if NESTS_TOWERS and self.config.vision_config.model_type in NESTED_TOWERS:
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {name.replace(f"{NEST}.", "vision_model.", 1): value for name, value in state_dict.items()}
        if self._auto_class is not None:
            # Imported here: only a model that is saved needs it.
            from .pipeline_llm2clip import custom_pipelines

            self.config.custom_pipelines = custom_pipelines(with_text="text" in self.input_modalities)
        super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        apply_umask(*Path(save_directory).glob("*.safetensors"))
        if VERSION < (5, 0) and kwargs.get("is_main_process", True):
            # Version 4 records the dtype of the first parameter, which is logit_scale.
            self.config.dtype = self.dtype
            self.config.save_pretrained(save_directory)

    @property
    def dtype(self) -> torch.dtype:
        # The first parameter is logit_scale, which stays in float32 in a model of any dtype.
        return self.vision_model.dtype

    def get_image_features(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Embed images.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            interpolate_pos_encoding: Accept an image size other than the tower's, if the tower supports it.
            kwargs: Passed to the vision tower, such as `output_hidden_states`.

        Returns:
            `pooler_output` `(batch, projection_dim)`, not normalised, and the hidden states of the tower.
        """
        if interpolate_pos_encoding is not None:
            kwargs["interpolate_pos_encoding"] = interpolate_pos_encoding
        output = self.vision_model(pixel_values=pixel_values, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=self.visual_projection(output.pooler_output),
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )


def init_like_the_original(linear: nn.Linear, tower: PretrainedConfig | None) -> None:
    """Initialise a projection or a layer of the adapter as the original code does.

    EVA's head starts near zero (`eva_vit_model.py`: 0.02 times `init_scale` 0.001), OpenAI's projection at
    `width**-0.5` (`transformer.py`); the adapter, and the projection after a tower of timm, as torch's Linear.

    Args:
        tower: Config of the vision tower before the projection; None for the adapter.
    """
    # Only torch.nn.init, for the reason given in EVA02VisionModel.
    bound = 0.0
    if tower is not None and tower.model_type == EVA02VisionConfig.model_type:
        nn.init.trunc_normal_(linear.weight, std=0.02 * 0.001)
    elif tower is not None and tower.model_type == CLIP_TOWER:
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    else:
        nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        bound = linear.in_features**-0.5
    if linear.bias is not None:
        nn.init.uniform_(linear.bias, -bound, bound)


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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = cls._load(pretrained_model_name_or_path, *args, **kwargs)
        return (model, info) if wants_info else model

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """See `get_image_features`."""
        return self.get_image_features(pixel_values, interpolate_pos_encoding, **kwargs)


class LLM2CLIPLogitScale(PreTrainedModel):
    """The logit scale of a CLIP-like checkpoint alone; NaN if the checkpoint has none."""

    config_class = PretrainedConfig
    _keys_to_ignore_on_load_unexpected = [r".*"]
    _keys_to_ignore_on_load_missing = [r"logit_scale"]

    def __init__(self, config: PretrainedConfig, shape: tuple[int, ...] = ()) -> None:
        super().__init__(config)
        self.logit_scale = nn.Parameter(torch.full(shape, math.nan))
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        nn.init.constant_(module.logit_scale, math.nan)


def read_logit_scale(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> float | None:
    """Read the logarithm of a checkpoint's logit scale, whatever else it holds; None if it has none."""
    for shape in ((), (1,)):  # of CLIP, of SigLIP
        options = {**hub_arguments(kwargs), "dtype": torch.float32, "ignore_mismatched_sizes": True}
        model = LLM2CLIPLogitScale.from_pretrained(name, shape, config=PretrainedConfig(), **options)
        if not model.logit_scale.isnan().any():
            return model.logit_scale.item()
    return None


def load_vision_tower(name: str | os.PathLike[str], kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load a vision tower: a vision model, or that of a CLIP-like or LLM2CLIP model; otherwise raise ValueError."""
    config = AutoConfig.from_pretrained(name, **hub_arguments(kwargs))
    if config.model_type == LLM2CLIPConfig.model_type:
        return LLM2CLIPVisionModelWithProjection.from_pretrained(name, **kwargs).vision_model
    # Of a CLIP-like repository, only the vision half is read.
    config = getattr(config, "vision_config", config)
    loader: Any = EVA02VisionModel if config.model_type == EVA02VisionConfig.model_type else AutoModel
    tower, _ = load_complete(loader.from_pretrained, name, config=config, **kwargs)
    if tower.main_input_name != "pixel_values":
        raise ValueError(f"{name} contains a {type(tower).__name__}, which does not take images; pass a vision tower.")
    return tower

"""The joint LLM2CLIP model (arXiv 2411.04997): a vision tower, and a text adapter on an LLM's caption embeddings."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, logging

# transformers 4.57 takes from a local folder only the modules that this one itself names.
from .compatibility_llm2clip import with_version_4_rope  # noqa: F401
from .configuration_llm2clip import LLM2CLIPConfig
from .identity_llm2clip import text_fingerprint  # noqa: F401
from .image_decoding_llm2clip import decode_images, is_list, require_file
from .merging_llm2clip import merged_weights  # noqa: F401
from .modeling_eva02 import EVA02VisionModel  # noqa: F401
from .modeling_llm2clip_backbone import text_fields  # noqa: F401
from .modeling_llm2clip_features import GATE, Float32Buffers, checked_statistics
from .modeling_llm2clip_packing import PackedBatch  # noqa: F401
from .modeling_llm2clip_pairing import LLM2CLIPPairedModel
from .modeling_llm2clip_probe import verify_decoder  # noqa: F401
from .modeling_llm2clip_text import LLM2CLIPTextModel
from .modeling_llm2clip_utils import (
    absolute_path,
    adopt_submodel,
    encode_pixels,
    encode_tokens,
    execution_device,
    own_part,
    require_finite,
    unit_features,
)
from .modeling_llm2clip_vision import load_vision_tower, read_logit_scale
from .processing_llm2clip import LLM2CLIPProcessor  # noqa: F401
from .sentence_transformers_llm2clip import read_embedding_model  # noqa: F401
from .tokenization_llm2clip import tokenize_captions

if TYPE_CHECKING:
    from .pipeline_llm2clip import custom_pipelines  # noqa: F401


FROM_CHECKPOINT = "checkpoint"


@dataclass
class LLM2CLIPOutput(ModelOutput):
    """Joint output of [`LLM2CLIPModel`].

    Args:
        loss: Symmetric InfoNCE, or the sigmoid loss if the model has a bias; only with `return_loss=True`.
        logits_per_image: `(images, texts)`.
        logits_per_text: `(texts, images)`.
        image_embeds: `(images, projection_dim)`, unit length.
        text_embeds: `(texts, projection_dim)`, unit length.
        logit_scale: The factor between cosine and logit.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None


class LLM2CLIPAdapterBlock(nn.Module):
    """Residual block: `x + W2 GELU(W1 LN(x))`."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, expansion * width)
        self.fc2 = nn.Linear(expansion * width, width)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.fc2(F.gelu(self.fc1(self.norm(states))))


class LLM2CLIPTextAdapter(Float32Buffers):
    """Map an LLM's caption embedding to the space shared with images (paper, section 3.2).

    With `text_head` `linear` there is only `proj`, and with `residual` this adapter is added to a linear map.
    """

    center: Tensor | None

    def __init__(self, config: LLM2CLIPConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        self.normalize = config.adapter_normalize
        self.register_buffer("center", torch.zeros(width, dtype=torch.float32) if config.center_text else None)
        is_linear = config.text_head == "linear"
        self.blocks = nn.Sequential(
            *(
                LLM2CLIPAdapterBlock(width, config.adapter_expansion)
                for _ in range(0 if is_linear else config.adapter_num_layers)
            )
        )
        self.norm: nn.Module = nn.Identity() if is_linear else nn.LayerNorm(width)
        self.proj = nn.Linear(width, config.projection_dim)
        is_residual = config.text_head == "residual"
        self.linear = nn.Linear(width, config.projection_dim) if is_residual else None
        self.gate = nn.Parameter(torch.full((1,), GATE)) if is_residual else None

    def prepare(self, llm_embeds: Tensor) -> Tensor:
        """Centre and normalise embeddings `(batch, hidden_size)` as the config says; what the layers see."""
        if self.center is None:
            return F.normalize(llm_embeds, dim=-1) if self.normalize else llm_embeds
        # In float32: the difference of two nearby values of 16 bits would be inaccurate.
        states = llm_embeds.float() - self.center
        return F.normalize(states, dim=-1) if self.normalize else states

    def forward(self, llm_embeds: Tensor) -> Tensor:
        dtype = self.proj.weight.dtype
        states = self.prepare(llm_embeds if self.center is not None else llm_embeds.to(dtype)).to(dtype)
        output = self.proj(self.norm(self.blocks(states)))
        return output if self.linear is None else self.linear(states) + self.gate * output


class LLM2CLIPModel(LLM2CLIPPairedModel):
    """Vision tower, projection, text adapter and, unless skipped, the LLM.

    The LLM's weights are in the checkpoint, or in the repository that `config.text_model_name_or_path` names; then the
    LLM is attached after loading. `from_pretrained(..., text_model=False)` skips it: captions are then passed as
    `llm_embeds`, until `load_text_model()` or `set_text_model(model)` attaches an LLM.
    """

    input_modalities = ["image", "text"]
    _keep_in_fp32_modules_strict = ["logit_scale"]

    def __init__(
        self, config: LLM2CLIPConfig, text_model: bool = True, vision_model: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        if vision_model is None:
            self._build_vision_tower()
        self._build_visual_projection(vision_model)
        bundled = text_model and config.text_model_name_or_path is None
        self.text_model: Any = LLM2CLIPTextModel(config.text_config) if bundled else None
        if not bundled:
            self._keys_to_ignore_on_load_unexpected = [r"^text_model\."]
        self.text_adapter = LLM2CLIPTextAdapter(config)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        bias = config.logit_bias_init_value
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))
        if bias is not None:
            # Set here, because transformers 4.57 rejects the name of a parameter that the model does not have.
            self._keep_in_fp32_modules_strict = ["logit_scale", "logit_bias"]
        self.post_init()
        self._keep_in_float32(*() if self.text_adapter.center is None else ("text_adapter.center",))
        if vision_model is not None:
            # Attached after post_init(), which would initialise its weights again.
            adopt_submodel(self, "vision_model", vision_model)
            self.config.vision_config = vision_model.config
            for part in (self.visual_standardization, self.visual_projection, self.text_adapter):
                if part is not None:
                    part.to(vision_model.device, vision_model.dtype)
            for scalar in (self.logit_scale, self.logit_bias):
                if scalar is not None:
                    scalar.data = scalar.data.to(vision_model.device)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LLM2CLIPTextAdapter) and module.center is not None:
            nn.init.zeros_(module.center)
        if isinstance(module, LLM2CLIPTextAdapter) and module.gate is not None:
            nn.init.constant_(module.gate, GATE)
        elif isinstance(module, LLM2CLIPModel):
            nn.init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if module.logit_bias is not None:
                nn.init.constant_(module.logit_bias, self.config.logit_bias_init_value)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model: str | os.PathLike[str] | PreTrainedModel,
        text_model: str | os.PathLike[str] | LLM2CLIPTextModel,
        *,
        vision_model_kwargs: dict[str, Any] | None = None,
        text_config: PretrainedConfig | None = None,
        text_model_revision: str | None = None,
        logit_scale_init_value: float | str | None = None,
        **config_fields: Any,
    ) -> LLM2CLIPModel:
        """Build a model for stage 2: a pretrained vision tower, a text tower, and a new projection and adapter.

        Args:
            vision_model: A vision model, or its repository or folder; of a CLIP-like model, the vision half is used.
            text_model: A text tower, which becomes part of the model, or the repository or folder of one, which is
                recorded but not loaded.
            text_config: Config of the text tower, if its repository has none (a plain LLM).
            logit_scale_init_value: Logarithm of the initial logit scale; `"checkpoint"`: that of the CLIP-like
                checkpoint of the vision tower. By default the checkpoint's, as in the original code, or ln(1 / 0.07)
                if it has none.
            config_fields: Fields of [`LLM2CLIPConfig`], such as `projection_dim`.

        Raises:
            ValueError: The checkpoint has no logit scale, but `"checkpoint"` asks for it.
        """
        scale = logit_scale_init_value
        if not isinstance(vision_model, PreTrainedModel):
            name, vision_kwargs = vision_model, vision_model_kwargs or {}
            vision_model = load_vision_tower(name, vision_kwargs)
            if scale is None or scale == FROM_CHECKPOINT:
                stored = read_logit_scale(name, vision_kwargs)
                scale = scale if stored is None else stored
        if scale is None or scale == FROM_CHECKPOINT:
            # `llm2clip convert` keeps the scale there, because a tower has no such weight.
            scale = getattr(vision_model.config, "logit_scale_init_value", scale)
        if scale == FROM_CHECKPOINT:
            raise ValueError(
                f"{vision_model.name_or_path or type(vision_model).__name__} has no logit scale; set "
                "logit_scale_init_value to a number, or leave it unset for ln(1 / 0.07)."
            )
        if scale is not None:
            config_fields["logit_scale_init_value"] = scale
        if isinstance(text_model, PreTrainedModel):
            text_config = text_model.config
        else:
            if text_config is None:
                text_config = AutoConfig.from_pretrained(text_model, revision=text_model_revision)
                text_config = getattr(text_config, "text_config", text_config)
            config_fields["text_model_name_or_path"] = absolute_path(text_model)
            config_fields["text_model_revision"] = text_model_revision
            config_fields.setdefault("text_model_fingerprint", getattr(text_config, "fingerprint", None))
        # Copied, because a new config resets the attention implementation of its sub-configs.
        config = cls.config_class(
            vision_config=copy.deepcopy(vision_model.config), text_config=copy.deepcopy(text_config), **config_fields
        )
        model = cls(config, text_model=False, vision_model=vision_model)
        if isinstance(text_model, PreTrainedModel):
            model.set_text_model(text_model)
        return model

    def get_input_embeddings(self) -> nn.Module:
        return (self.text_model or self.vision_model).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        (self.text_model or self.vision_model).set_input_embeddings(value)

    def set_text_center(self, mean: Tensor) -> None:
        """Set the mean `(hidden_size,)` of the LLM's embeddings, which the adapter subtracts from each.

        Raises:
            ValueError: The model does not centre, or the values are not finite or of another width.
        """
        if self.text_adapter.center is None:
            raise ValueError("this model does not centre the LLM's embeddings; set center_text=True.")
        self.text_adapter.center.copy_(checked_statistics("mean", mean, self.config.text_config.hidden_size))

    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pooling_mask: Tensor | None = None,
        llm_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Embed captions with the LLM, or from its cached embeddings.

        Args:
            input_ids: `(batch, tokens)`, from this model's processor or tokenizer; the masks have the same shape.
            llm_embeds: `(batch, hidden_size)`, caption embeddings of the LLM, instead of tokens.

        Returns:
            `pooler_output` `(batch, projection_dim)`, not normalised.

        Raises:
            ValueError: Tokens are passed to a model without its LLM, or the embeddings have the wrong width.
        """
        states = None
        if llm_embeds is None:
            if self.text_model is None:
                raise ValueError(
                    "this model was loaded without its LLM; call model.load_text_model(), or pass llm_embeds=, the "
                    "LLM's caption embeddings."
                )
            output = self.text_model(input_ids, attention_mask, pooling_mask, **kwargs)
            states, llm_embeds = output.last_hidden_state, output.pooler_output
        expected = self.config.text_config.hidden_size
        if llm_embeds.shape[-1] != expected:
            raise ValueError(
                f"llm_embeds have width {llm_embeds.shape[-1]}, but this adapter takes {expected}: they come from "
                "another LLM."
            )
        llm_embeds = llm_embeds.to(execution_device(self.text_adapter))
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self.text_adapter(llm_embeds))

    def encode_text(
        self,
        texts: Sequence[str] | str,
        processor: Any = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        instruction: str | None = None,
    ) -> Tensor:
        """Embed captions of any length.

        Args:
            processor: This model's processor, or its tokenizer; by default it is loaded from where the model was.
            batch_size: Largest number of captions in a batch; see [`LLM2CLIPTextModel.encode`].
            instruction: Text before every caption, as in stage 1; it is context and not pooled.

        Returns:
            Unit vectors, float32 `(len(texts), projection_dim)` on the CPU, in input order.

        Raises:
            ValueError: A caption is empty, or there is no tokenizer.
        """
        tokenizer = own_part(self, processor, "tokenizer")
        return encode_tokens(
            tokenize_captions(texts, tokenizer, self.config.text_config, instruction),
            tokenizer,
            lambda batch: unit_features(self.get_text_features(**batch)),
            device=execution_device(self if self.text_model is None else self.text_model),
            width=self.config.projection_dim,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
        )

    def encode_image(
        self, images: Sequence[Any] | Any, processor: Any = None, batch_size: int = 64, show_progress_bar: bool = False
    ) -> Tensor:
        """Embed images.

        Args:
            images: Images of any kind that [`decode_image`] reads (PIL images, paths, URLs, bytes), arrays or tensors,
                or a single one. A column of `datasets` is a list.
            processor: This model's processor, or its image processor; by default as in `encode_text`.

        Returns:
            Unit vectors, float32 `(len(images), projection_dim)` on the CPU, in input order.

        Raises:
            DamagedImageError: An image cannot be decoded.
            FileNotFoundError: A file does not exist.
            ValueError: An embedding is NaN or infinite, or there is no image processor.
        """
        images = list(images) if is_list(images) else [images]
        for image in images:
            require_file(image, "encode_text()")
        prepare = own_part(self, processor, "image_processor")
        starts = range(0, len(images), batch_size)
        batches = (
            prepare(images=decode_images(images[start : start + batch_size]), return_tensors="pt")
            for start in logging.tqdm(starts, desc="Encoding images", disable=not show_progress_bar)
        )
        rows = torch.cat([torch.empty(0, self.config.projection_dim), *encode_pixels(self, batches)])
        return require_finite(rows, "images")

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pooling_mask: Tensor | None = None,
        llm_embeds: Tensor | None = None,
        return_loss: bool | None = None,
        return_logits: bool = True,
        interpolate_pos_encoding: bool | None = None,
        vision_features: Tensor | None = None,
        **kwargs: Any,
    ) -> LLM2CLIPOutput | BaseModelOutputWithPooling:
        """Compare images with captions; given only one of them, embed it (`get_*_features`).

        Args:
            return_loss: Also return the loss; image i and caption i are a pair.
            return_logits: `False` skips the logits, for a loss that is computed from the embeddings.
            vision_features: Stored features of images instead of pixels; see [`get_image_features`].
            kwargs: Passed to the vision tower if there are images, otherwise to the LLM.
        """
        has_text = input_ids is not None or llm_embeds is not None
        has_images = pixel_values is not None or vision_features is not None
        text_inputs = input_ids, attention_mask, pooling_mask, llm_embeds
        if not has_images and not has_text:
            raise ValueError(
                "pass pixel_values or vision_features, input_ids or llm_embeds, or images and captions together."
            )
        if not has_images:
            return self.get_text_features(*text_inputs, **kwargs)
        image_features = self.get_image_features(pixel_values, interpolate_pos_encoding, vision_features, **kwargs)
        if not has_text:
            return image_features
        image_embeds = unit_features(image_features)
        text_embeds = unit_features(self.get_text_features(*text_inputs)).to(image_embeds.device)
        logit_scale = self.logit_scale.exp().to(image_embeds.device)
        logit_bias = None if self.logit_bias is None else self.logit_bias.to(image_embeds.device)
        logits = loss = None
        if return_logits or return_loss:
            logits = logit_scale * text_embeds @ image_embeds.t()
            if logit_bias is not None:
                logits = logits + logit_bias
            if return_loss and logit_bias is not None:
                signs = 2 * torch.eye(len(logits), device=logits.device) - 1
                loss = -F.logsigmoid(signs * logits).sum() / len(logits)
            elif return_loss:
                pairs = torch.arange(len(logits), device=logits.device)
                loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.t(), pairs)) / 2
        return LLM2CLIPOutput(
            loss=loss,
            logits_per_image=None if logits is None else logits.t(),
            logits_per_text=logits,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            logit_scale=logit_scale,
            logit_bias=logit_bias,
        )

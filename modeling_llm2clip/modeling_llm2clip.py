"""The joint LLM2CLIP model (arXiv 2411.04997): a vision tower, and a text adapter on an LLM's caption embeddings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput, logging

# transformers 4.57 takes from a local folder only the modules that this one itself names.
from .compatibility_llm2clip import with_version_4_rope  # noqa: F401
from .configuration_llm2clip import LLM2CLIPConfig, LLM2CLIPTextConfig
from .identity_llm2clip import text_fingerprint  # noqa: F401
from .image_decoding_llm2clip import decode_images, is_list, require_file
from .modeling_eva02 import EVA02VisionModel  # noqa: F401
from .modeling_llm2clip_decoder import text_model_class  # noqa: F401
from .modeling_llm2clip_heads import GATE, LLM2CLIPTextAdapter
from .modeling_llm2clip_text import LLM2CLIPTextModel
from .modeling_llm2clip_utils import (
    OWN_TEXT_MODEL,
    SHARED_ARGUMENTS,
    absolute_path,
    adopt_submodel,
    encode_tokens,
    evaluating,
    execution_device,
    find_text_model,
    hub_arguments,
    own_part,
    require_finite,
    shorten,
    split_arguments,
    text_attention,
    unit_features,
)
from .modeling_llm2clip_vision import LLM2CLIPPreTrainedModel
from .processing_llm2clip import LLM2CLIPProcessor  # noqa: F401
from .tokenization_llm2clip import tokenize_captions

logger = logging.get_logger(__name__)


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
        pooler_output: `(images, projection_dim)`, with the logits and as many captions as images: image i and
            caption i as one query, the sum of both.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    logit_scale: Tensor | None = None
    logit_bias: Tensor | None = None
    pooler_output: Tensor | None = None


class LLM2CLIPModel(LLM2CLIPPreTrainedModel):
    """Vision tower, projection, text adapter and, unless skipped, the LLM.

    The LLM's weights are in the checkpoint, or in the repository that `config.text_model_name_or_path` names; then the
    LLM is attached after loading. `from_pretrained(..., text_model=False)` skips it: captions are then passed as
    `llm_embeds`, until `load_text_model()` or `set_text_model(model)` attaches an LLM. A model of the embeddings of
    several text encoders (`encoders` of its text config) takes `llm_embeds` alone.
    """

    # The LLM that `text_adapter` was trained with, or None if it is not loaded.
    text_model: Any
    hub_arguments: dict[str, Any]
    input_modalities = ["image", "text"]
    _keep_in_fp32_modules_strict = ["logit_scale"]

    def __init__(
        self, config: LLM2CLIPConfig, text_model: bool = True, vision_model: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        if vision_model is None:
            self._build_vision_tower()
        self._build_visual_projection(vision_model)
        bundled = text_model and config.text_model_name_or_path is None and not config.text_config.encoders
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
        if config.text_config.encoders:
            self.input_modalities = ["image"]
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
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        text_model: bool = True,
        text_model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint and its LLM.

        Args:
            text_model_kwargs: Arguments of `from_pretrained` for the LLM alone; the others are those of this call.
            kwargs: Arguments of transformers' `from_pretrained`. `attn_implementation` may be set by part, as
                `{"vision_config": ..., "text_config": ...}`. A `device_map` may place `text_model` elsewhere, such as
                on `"disk"`. `quantization_config` applies to the LLM only.

        Raises:
            ValueError: Weights are missing, or the adapter was trained with another LLM.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model_kwargs, llm_kwargs = split_arguments(kwargs)
        is_about_llm = "quantization_config" in llm_kwargs or bool(text_model_kwargs)
        if not text_model and is_about_llm:
            raise ValueError(
                "quantization_config and text_model_kwargs apply to the LLM, which text_model=False does not load; "
                "drop one of the two."
            )
        llm_kwargs.update(text_model_kwargs or {})
        attention = text_attention(model_kwargs)
        together = text_model and not llm_kwargs
        model, info = cls._load(pretrained_model_name_or_path, *args, text_model=together, **model_kwargs)
        # For the processor. A token is left out, since a model may be pickled.
        model.hub_arguments = {name: value for name, value in hub_arguments(model_kwargs).items() if name != "token"}
        named = model.config.text_model_name_or_path
        bundled = named is None and not model.config.text_config.encoders
        if named == OWN_TEXT_MODEL:
            # As the model in memory needs it, which may be saved elsewhere.
            name = find_text_model(named, pretrained_model_name_or_path, **hub_arguments(model_kwargs))[0]
            model.config.text_model_name_or_path, model.config.text_model_revision = name, model_kwargs.get("revision")
        if is_about_llm:
            model.config.text_config.require_text_model()
        text_model = text_model and not model.config.text_config.encoders
        if text_model and model.text_model is None:
            if attention is not None:
                llm_kwargs.setdefault("attn_implementation", attention)
            shared = {key: model_kwargs[key] for key in SHARED_ARGUMENTS if model_kwargs.get(key) is not None}
            if bundled:
                shared |= {"name_or_path": pretrained_model_name_or_path, "config": model.config.text_config}
                shared |= hub_arguments(model_kwargs)
            model.load_text_model(**{**shared, **llm_kwargs})
        weights_stay = not text_model or not model.text_model.has_readable_weights
        if bundled and weights_stay:
            # Record their location for load_text_model() and for the next save_pretrained().
            model.config.text_model_name_or_path = absolute_path(pretrained_model_name_or_path)
            model.config.text_model_revision = kwargs.get("revision")
        elif bundled:
            model.config.text_model_name_or_path = None
        return (model, info) if wants_info else model

    def load_text_model(self, name_or_path: str | None = None, revision: str | None = None, **kwargs: Any) -> None:
        """Load and attach the LLM.

        Args:
            name_or_path: Repository or folder; by default the one in the config.
            kwargs: Passed to `LLM2CLIPTextModel.from_pretrained`.

        Raises:
            ValueError: No repository is known, the adapter was trained with another LLM, or the model takes
                `llm_embeds` alone.
        """
        self.config.text_config.require_text_model()
        if name_or_path is None:
            name_or_path = self.config.text_model_name_or_path
            revision = revision or self.config.text_model_revision
        if name_or_path is None:
            raise ValueError("the config does not name the LLM's repository; pass it: model.load_text_model(repo).")
        if revision is not None:
            kwargs["revision"] = revision
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", "auto")
        text_model = LLM2CLIPTextModel.from_pretrained(name_or_path, default_config=self.config.text_config, **kwargs)
        if kwargs.get("device_map") is None and kwargs.get("quantization_config") is None:
            text_model.to(execution_device(self.vision_model))
        self.set_text_model(text_model, source=name_or_path)

    def set_text_model(self, text_model: LLM2CLIPTextModel, source: str | None = None) -> None:
        """Attach a text tower, after verifying that the adapter was trained with it.

        Args:
            source: The tower's origin, for error messages.

        Raises:
            TypeError: `text_model` is a plain decoder.
            ValueError: Its width or fingerprint differs from the one that the adapter was trained with.
        """
        config = self.config
        # By model_type, not by class: remote code can be imported under several module names.
        if text_model.config.model_type != LLM2CLIPTextConfig.model_type:
            raise TypeError(
                f"{type(text_model).__name__} is not a text tower; wrap it: "
                "LLM2CLIPTextModel(LLM2CLIPTextConfig(model.config), model)."
            )
        config.text_config.require_text_model()
        source = source or text_model.name_or_path or type(text_model.decoder).__name__
        known = config.text_model_name_or_path or "an unnamed LLM"
        width, expected_width = text_model.config.hidden_size, config.text_config.hidden_size
        if width != expected_width:
            raise ValueError(
                f"the adapter takes embeddings of width {expected_width} (it was trained with {known}), but {source} "
                f"gives {width}; load the LLM that belongs to this checkpoint."
            )
        expected, actual = config.text_model_fingerprint, text_model.identity()
        if expected is None:
            # No LLM has been recorded for the adapter: record this one.
            config.text_model_fingerprint = actual
            if source != config.text_model_name_or_path:
                config.text_model_name_or_path = absolute_path(text_model.name_or_path or "") or None
                config.text_model_revision = None
        elif actual is None:
            logger.warning(f"{source} cannot be compared with {known}: it has no record, and is quantised or rounded.")
        elif actual != expected:
            raise ValueError(
                f"the adapter was trained with {known} (fingerprint {expected}), but {source} has fingerprint "
                f"{actual}: other weights, prompt or pooling. Load the LLM that belongs to this checkpoint, or train "
                "an adapter for this one (stage 2)."
            )
        adopt_submodel(self, "text_model", text_model)
        self.config.text_config = text_model.config

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        *,
        save_text_model: bool | None = None,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model.

        Args:
            save_text_model: Whether to save the LLM's weights in the checkpoint. By default they are saved unless
                `config.text_model_name_or_path` names their repository.

        Raises:
            ValueError: The LLM's weights would not be saved anywhere, have an unmerged adapter, are quantised, or are
                offloaded.
        """
        elsewhere, takes_rows = self.config.text_model_name_or_path, bool(self.config.text_config.encoders)
        if save_text_model:
            self.config.text_config.require_text_model()
        bundle = elsewhere is None and not takes_rows if save_text_model is None else save_text_model
        if bundle and self.text_model is None:
            raise ValueError(
                "there is no LLM to save; attach one, or set config.text_model_name_or_path to its repository."
            )
        if not bundle and elsewhere is None and not takes_rows:
            raise ValueError(
                "to save the model without its LLM, set config.text_model_name_or_path to the LLM's repository."
            )
        state_dict = self.state_dict() if state_dict is None else state_dict
        if bundle:
            self._record_text_model(state_dict)
        else:
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith("text_model.")}
        if self._auto_class is not None:
            head = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
            known = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = {**known, "AutoModelForZeroShotImageClassification": head}
        try:
            self.config.text_model_name_or_path = None if bundle else elsewhere
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        finally:
            self.config.text_model_name_or_path = elsewhere

    def _record_text_model(self, state_dict: dict[str, Tensor]) -> None:
        """Write the fingerprint of the LLM, which is saved with the model, into the config."""
        if self.text_model.has_adapter:
            raise ValueError(
                "the LLM has an unmerged PEFT adapter; call model.text_model.merge_adapter() before saving."
            )
        prefix = "text_model."
        weights = {key.removeprefix(prefix): state_dict[key] for key in state_dict if key.startswith(prefix)}
        identity = self.text_model.fingerprint(weights)
        if identity is None:
            # transformers reads back what it offloaded itself, but nothing of an LLM that was loaded apart.
            if getattr(self, "hf_device_map", None) is None or getattr(self.text_model, "hf_device_map", None):
                raise ValueError(
                    "the LLM is quantised or offloaded, so its weights are not here to save; load it whole, or "
                    "save the model without it: save_pretrained(..., save_text_model=False)."
                )
            identity = self.text_model.config.fingerprint
        self.config.text_model_fingerprint = self.config.text_config.fingerprint = identity

    def get_input_embeddings(self) -> nn.Module:
        return (self.text_model or self.vision_model).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        (self.text_model or self.vision_model).set_input_embeddings(value)

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
            ValueError: Tokens are passed to a model without its LLM or beside embeddings, or these have another width.
        """
        states = None
        if llm_embeds is not None and input_ids is not None:
            raise ValueError("pass either input_ids or llm_embeds, cached embeddings of the captions.")
        if llm_embeds is None:
            if self.text_model is None:
                self.config.text_config.require_text_model()
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
        truncate_dim: int | None = None,
    ) -> Tensor:
        """Embed captions of any length, in evaluation mode.

        Args:
            processor: This model's processor, or its tokenizer; by default it is loaded from where the model was.
            batch_size: Largest number of captions in a batch; see [`LLM2CLIPTextModel.encode`].
            instruction: Text before every caption, as in stage 1; it is context and not pooled.
            truncate_dim: Number of values that are kept of each embedding, as for images; see `matryoshka_dims` of the
                training.

        Returns:
            Unit vectors, float32 `(len(texts), truncate_dim or projection_dim)` on the CPU, in input order.

        Raises:
            ValueError: A caption is empty, there is no tokenizer, or the model takes `llm_embeds` alone.
        """
        self.config.text_config.require_text_model()
        tokenizer = own_part(self, processor, "tokenizer")
        rows = encode_tokens(
            tokenize_captions(texts, tokenizer, self.config.text_config, instruction),
            tokenizer,
            lambda batch: unit_features(self.get_text_features(**batch)),
            model=self,
            device=execution_device(self if self.text_model is None else self.text_model),
            width=self.config.projection_dim,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
        )
        return shorten(rows, truncate_dim)

    def encode_image(
        self,
        images: Sequence[Any] | Any,
        processor: Any = None,
        batch_size: int = 64,
        show_progress_bar: bool = False,
        truncate_dim: int | None = None,
    ) -> Tensor:
        """Embed images, in evaluation mode.

        Args:
            images: Images of any kind that [`decode_image`] reads (PIL images, paths, URLs, bytes), arrays or tensors,
                or a single one. A column of `datasets` is a list.
            processor: This model's processor, or its image processor; by default as in `encode_text`.
            truncate_dim: See `encode_text`.

        Returns:
            Unit vectors, float32 `(len(images), truncate_dim or projection_dim)` on the CPU, in input order.

        Raises:
            DamagedImageError: An image cannot be decoded.
            FileNotFoundError: A file does not exist.
            ValueError: An embedding is NaN or infinite, or there is no image processor.
        """
        images = list(images) if is_list(images) else [images]
        for image in images:
            require_file(image, "encode_text()")
        prepare = own_part(self, processor, "image_processor")
        device = execution_device(self.vision_model)
        rows = torch.empty(len(images), self.config.projection_dim)
        starts = range(0, len(images), batch_size)
        for start in logging.tqdm(starts, desc="Encoding images", disable=not show_progress_bar):
            batch = slice(start, start + batch_size)
            inputs = prepare(images=decode_images(images[batch]), return_tensors="pt").to(device, self.dtype)
            with evaluating(self), torch.inference_mode():
                rows[batch] = unit_features(self.get_image_features(**inputs)).cpu()
        return shorten(require_finite(rows, "images"), truncate_dim)

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
            return_logits: `False` skips them and `pooler_output`, for a loss that is computed from the embeddings.
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
        scale = self.logit_scale.exp().to(image_embeds.device)
        bias = None if self.logit_bias is None else self.logit_bias.to(image_embeds.device)
        logits = loss = None
        if return_logits or return_loss:
            logits = scale * text_embeds @ image_embeds.t()
            if bias is not None:
                logits = logits + bias
            if return_loss and bias is not None:
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
            logit_scale=scale,
            logit_bias=bias,
            pooler_output=image_embeds + text_embeds
            if return_logits and len(image_embeds) == len(text_embeds)
            else None,
        )

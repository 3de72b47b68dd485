"""The text tower: any decoder, attending in both directions, pooled into one vector per caption."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import find_adapter_config_file, logging

from .configuration_llm2clip import LLM2CLIPTextConfig
from .processing_llm2clip import check_captions, count_cut_captions

logger = logging.get_logger(__name__)

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
FINGERPRINT_SAMPLES = 64


def pool(hidden_states: Tensor, attention_mask: Tensor, pooling_mask: Tensor, mode: str) -> Tensor:
    """Pool token states into one vector per caption.

    Args:
        hidden_states: `(batch, tokens, hidden)`.
        attention_mask: `(batch, tokens)`, 1 for real tokens.
        pooling_mask: `(batch, tokens)`, 1 for the tokens that are pooled.
        mode: `mean`; `weighted_mean` (the weight grows linearly along the pooled tokens); `last_token`;
            `eos_token` (the same token: the prompt ends in EOS then); `bos_token` (the first real token).

    Returns:
        `(batch, hidden)`, summed in float32 and returned in the states' dtype.
    """
    if mode in ("mean", "weighted_mean"):
        weights = pooling_mask.float()
        if mode == "weighted_mean":
            weights = weights * weights.cumsum(dim=1)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
        return (hidden_states.float() * weights[..., None]).sum(dim=1).to(hidden_states.dtype)
    if mode == "bos_token":
        index = attention_mask.long().argmax(dim=1)
    else:
        positions = torch.arange(pooling_mask.shape[1], device=pooling_mask.device)
        index = (positions * pooling_mask).argmax(dim=1)
    return hidden_states[torch.arange(len(index), device=index.device), index]


def encode_batches(
    texts: Sequence[str] | str,
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[Any], Tensor],
    *,
    num_prefix_tokens: int,
    width: int,
    batch_size: int,
    show_progress_bar: bool,
) -> Tensor:
    """Encode captions in batches of similar length and give the rows back in the order of the input.

    Args:
        texts: Captions; one string counts as a list of one.
        tokenizer: The tokenizer that was saved with the model: it holds the prompt.
        encode: Maps a tokenised batch to `(batch, width)`.
        num_prefix_tokens: The prompt's tokens before the caption, which the tokenizer must add.
        width: Columns of the result, also for no captions at all.
        batch_size: Captions per batch.
        show_progress_bar: Show a bar over the batches.

    Returns:
        float32 `(len(texts), width)` on the CPU.

    Raises:
        TypeError: An item is not a string (an image, say).
        ValueError: A caption is empty, or the tokenizer does not hold the model's prompt.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    check_captions(texts)
    if not texts:
        return torch.zeros(0, width)
    if len(tokenizer("")["input_ids"]) < num_prefix_tokens:
        raise ValueError(
            f"the tokenizer ({tokenizer.name_or_path or 'unnamed'}) does not add the {num_prefix_tokens} prompt "
            "tokens that this model was trained with; load it from the model's own folder with AutoTokenizer."
        )
    tokens = tokenizer(texts, truncation=True)["input_ids"]
    count = count_cut_captions(tokenizer, texts, [len(ids) for ids in tokens])
    if count:
        logger.warning(f"{count} of {len(texts)} captions were cut at {tokenizer.model_max_length} tokens.")
    order = sorted(range(len(texts)), key=lambda index: len(tokens[index]), reverse=True)
    result = torch.empty(len(texts), width)
    starts = range(0, len(texts), batch_size)
    for start in logging.tqdm(starts, desc="Encoding captions", disable=not show_progress_bar):
        rows = order[start : start + batch_size]
        batch = tokenizer.pad({"input_ids": [tokens[row] for row in rows]}, return_tensors="pt")
        with torch.inference_mode():
            result[rows] = encode(batch).float().cpu()
    return result


def adopt_submodel(parent: PreTrainedModel, name: str, child: PreTrainedModel) -> None:
    """Attach `child` after `parent` was built, with the bookkeeping that `post_init` does for its own children."""
    setattr(parent, name, child)
    no_split = getattr(child, "_no_split_modules", None) or []
    parent._no_split_modules = [*dict.fromkeys([*(parent._no_split_modules or []), *no_split])]
    tied = getattr(child, "all_tied_weights_keys", None) or {}
    if hasattr(parent, "all_tied_weights_keys"):
        parent.all_tied_weights_keys.update({f"{name}.{key}": f"{name}.{value}" for key, value in tied.items()})


def _avoid_sdpa_without_softcap(config: PretrainedConfig) -> None:
    """Gemma 2 caps its attention logits, which sdpa cannot: transformers raises, or before 5.24 leaves the cap out."""
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation in (None, "sdpa"):
        config._attn_implementation = "eager"


class LLM2CLIPTextModel(PreTrainedModel):
    """A decoder as caption encoder (LLM2CLIP stage 1): attention in both directions and pooling.

    `pooler_output` `(batch, hidden_size)` is the caption embedding, not normalised. It does not depend on the rest
    of the batch, on the padding side or on the attention implementation.
    """

    config_class = LLM2CLIPTextConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _keys_to_ignore_on_load_unexpected = [
        r"lm_head\.",
        r"^vision_model\.",
        r"^visual_projection\.",
        r"^text_adapter\.",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: LLM2CLIPTextConfig, decoder: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.decoder: Any = None
        if decoder is None:
            _avoid_sdpa_without_softcap(config.decoder_config)
            self.decoder = AutoModel.from_config(config.decoder_config)
        # A decoder that is given has its weights already; post_init must not initialise it again.
        self.post_init()
        if decoder is not None:
            adopt_submodel(self, "decoder", decoder)
            decoder.config.is_causal = not config.bidirectional
            _avoid_sdpa_without_softcap(decoder.config)
        config.decoder_config = self.decoder.config

    @classmethod
    def from_decoder(
        cls,
        decoder: str | os.PathLike[str] | PreTrainedModel,
        *,
        decoder_kwargs: dict[str, Any] | None = None,
        **config_fields: Any,
    ) -> LLM2CLIPTextModel:
        """Wrap a plain LLM.

        Args:
            decoder: Repo id, folder, or a base model (`AutoModel`, without a language-modelling head).
            decoder_kwargs: Passed to `AutoModel.from_pretrained`.
            config_fields: Fields of [`LLM2CLIPTextConfig`]: pooling, prompt, maximum length.
        """
        if isinstance(decoder, PreTrainedModel):
            model: Any = decoder
        else:
            model = AutoModel.from_pretrained(decoder, **(decoder_kwargs or {}))
        return cls(LLM2CLIPTextConfig(decoder_config=model.config, **config_fields), decoder=model)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: LLM2CLIPTextConfig | None = None,
        **kwargs: Any,
    ) -> LLM2CLIPTextModel:
        """Load a text tower.

        Args:
            pretrained_model_name_or_path: A folder or repo that holds one of: a saved [`LLM2CLIPTextModel`]; an
                LLM2CLIP model with its LLM inside; a PEFT adapter of an LLM (needs peft); a plain LLM.
            config: Prompt and pooling; needed only where the repo does not say (a plain LLM, a bare adapter).
        """
        name = os.fspath(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        has_adapter = find_adapter_config_file(name, **hub) is not None
        fields = {} if has_adapter and config is not None else PretrainedConfig.get_config_dict(name, **hub)[0]
        model_type = fields.get("model_type")
        if has_adapter:
            if config is None and model_type == cls.config_class.model_type:
                config = cls.config_class.from_dict(fields)
            return cls._from_adapter(name, config, kwargs)
        if model_type == cls.config_class.model_type:
            return super().from_pretrained(name, *model_args, config=config, **kwargs)
        if model_type == "llm2clip":
            if config is None:
                config = cls.config_class.from_dict(fields["text_config"])
            return super().from_pretrained(
                name, *model_args, config=config, key_mapping={r"^text_model\.": ""}, **kwargs
            )
        decoder = AutoModel.from_pretrained(name, **kwargs)
        if config is None:
            config = LLM2CLIPTextConfig(decoder_config=decoder.config)
        return cls(config, decoder=decoder)

    @classmethod
    def _from_adapter(cls, name: str, config: LLM2CLIPTextConfig | None, kwargs: dict[str, Any]) -> LLM2CLIPTextModel:
        # Not an import statement: transformers would demand peft of everyone who loads this code from a Hub repo.
        try:
            peft = importlib.import_module("peft")
        except ImportError as error:
            raise ImportError(f"{name} is a PEFT adapter; install peft to load it: pip install peft") from error
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        base = peft.PeftConfig.from_pretrained(name, **hub)
        base_kwargs = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
        decoder = AutoModel.from_pretrained(base.base_model_name_or_path, revision=base.revision, **base_kwargs)
        if config is None:
            config = LLM2CLIPTextConfig(decoder_config=decoder.config)
        model = cls(config, decoder=decoder)
        model.decoder = peft.PeftModel.from_pretrained(decoder, name, **hub)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as usual; a decoder that carries a PEFT adapter is saved as adapter, config and code."""
        if not self.has_adapter:
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        self.decoder.save_pretrained(os.fspath(save_directory))
        if self._auto_class is not None:
            custom_object_save(self, save_directory, config=self.config)  # type: ignore[arg-type]
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(save_directory)

    @property
    def has_adapter(self) -> bool:
        """Whether the decoder carries a PEFT adapter that is not merged."""
        return hasattr(self.decoder, "peft_config")

    def merge_adapter(self) -> None:
        """Merge the decoder's PEFT adapter into its weights, in place."""
        if self.has_adapter:
            self.decoder = self.decoder.merge_and_unload()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def fingerprint(self) -> str | None:
        """Identify this encoder by its weights, prompt and pooling.

        Equal for the same weights in float32 and bfloat16. `None` where the weights cannot be read: quantised, or
        offloaded to disk.

        Returns:
            32 hexadecimal digits.
        """
        digest = hashlib.sha256()
        config = self.config
        behaviour = [
            config.pooling,
            config.prompt_prefix,
            config.prompt_suffix,
            config.num_prefix_tokens,
            config.max_text_length,
            config.bidirectional,
        ]
        digest.update(json.dumps(behaviour).encode())
        for name, parameter in sorted(self.decoder.named_parameters()):
            if parameter.is_meta or not parameter.is_floating_point():
                return None
            values = parameter.detach().reshape(-1)
            step = max(1, values.numel() // FINGERPRINT_SAMPLES)
            sample = values[::step][:FINGERPRINT_SAMPLES].to(torch.bfloat16).view(torch.int16)
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(sample.cpu().numpy().tobytes())
        return digest.hexdigest()[:32]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pooling_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode captions.

        Args:
            input_ids: `(batch, tokens)`, from the tokenizer that was saved with this model.
            attention_mask: `(batch, tokens)`, 1 for real tokens; all are real when it is left out.
            pooling_mask: `(batch, tokens)`, 1 for the tokens to pool; the default is every real token after the
                prompt's prefix.
            inputs_embeds: `(batch, tokens, hidden_size)` instead of `input_ids`.
        """
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None:
            raise ValueError("give input_ids, from the tokenizer that was saved with this model.")
        if attention_mask is None:
            attention_mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
        order = attention_mask.long().cumsum(dim=1)
        if pooling_mask is None:
            pooling_mask = attention_mask.bool() & (order > self.config.num_prefix_tokens)
        output = self.decoder(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=self._decoder_mask(attention_mask),
            # Counted from the caption's own first token: nothing depends on the padding.
            position_ids=(order - 1).clamp(min=0),
            use_cache=False,
            **kwargs,
        )
        states = output.last_hidden_state
        pooled = pool(states, attention_mask.to(states.device), pooling_mask.to(states.device), self.config.pooling)
        return BaseModelOutputWithPooling(
            last_hidden_state=states,
            pooler_output=pooled,
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )

    def _decoder_mask(self, attention_mask: Tensor) -> Tensor:
        if not self.config.bidirectional:
            return attention_mask
        if self.decoder.config._attn_implementation in ("eager", "sdpa"):
            # An additive 4-D mask is taken as it is by every decoder on every transformers version. The flag
            # is_causal is not: 4.57 ignores it, and a sliding window would hide part of a long caption.
            dtype: Any = self.get_input_embeddings().weight.dtype
            if not dtype.is_floating_point:
                dtype = torch.get_default_dtype()
            padding = attention_mask[:, None, None, :] == 0
            row = torch.zeros_like(padding, dtype=dtype).masked_fill(padding, torch.finfo(dtype).min)
            return row.expand(-1, 1, attention_mask.shape[1], -1)
        version = tuple(int(part) for part in transformers_version.split(".")[:2])
        if version < (5, 2):
            raise ValueError(
                f"attn_implementation {self.decoder.config._attn_implementation!r} is causal on transformers "
                f"{transformers_version}; use 'sdpa' or 'eager', or transformers >= 5.2."
            )
        return attention_mask

    def encode(
        self,
        texts: Sequence[str] | str,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 64,
        show_progress_bar: bool = False,
    ) -> Tensor:
        """Embed captions: float32 `(len(texts), hidden_size)` on the CPU, not normalised, in input order."""
        device = self.get_input_embeddings().weight.device
        return encode_batches(
            texts,
            tokenizer,
            lambda batch: self(**batch.to(device)).pooler_output,
            num_prefix_tokens=self.config.num_prefix_tokens,
            width=self.config.hidden_size,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
        )


__all__ = ["LLM2CLIPTextModel"]

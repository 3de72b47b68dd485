"""The text tower: any decoder with bidirectional attention, or any encoder, pooled to one vector per caption.

Decoders are made to attend in both directions. Encoders and embedding models keep their own attention.
"""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import cached_file, find_adapter_config_file

# transformers 4.57 takes from a local folder only the modules that this one itself names.
from .compatibility_llm2clip import AttentionBackends
from .configuration_llm2clip import LLM2CLIPConfig, LLM2CLIPTextConfig, disable_sliding_window, output_width
from .identity_llm2clip import is_readable, merge_layers, merged_weights, text_fingerprint
from .image_decoding_llm2clip import decode_image  # noqa: F401
from .modeling_llm2clip_decoder import (
    DenseLayers,
    PackedBatch,
    argument_names,
    avoid_sdpa_without_softcap,
    may_pack,
    packed_mask,
    padded_mask,
    position_offset,
    refuse_other_layers,
    takes_additive_mask,
    text_model_class,
)
from .modeling_llm2clip_utils import (
    OWN_TEXT_MODEL,
    adopt_submodel,
    encode_tokens,
    execution_device,
    find_text_model,
    hub_arguments,
    load_complete,
    name_layers,
    pool,
)
from .tokenization_llm2clip import tokenize_captions

# Beside an adapter: the layers after pooling.
DENSE_FILE = "adapter_dense.safetensors"
COMPOSITE_TYPE = LLM2CLIPConfig.model_type


class LLM2CLIPTextModel(AttentionBackends, PreTrainedModel):
    """A text model (`decoder`) as caption encoder: attention, pooling, and what follows it.

    LLM2CLIP's stage 1 makes a decoder attend in both directions; encoders and embedding models keep their attention.

    `pooler_output` `(batch, hidden_size)` is the caption embedding, in float32, and of unit length only if the config
    says `normalize`. It does not depend on the other captions of the batch, the padding side or the attention
    implementation.

    Args:
        decoder: A base model (`AutoModel`, without a head) that is wrapped as it is; by default one is built. The
            function `llm2clip.open_text_tower` wraps a model with its tokenizer, its prompt and its own pooling.

    Raises:
        ValueError: It cannot be a text tower.
    """

    config_class = LLM2CLIPTextConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _keys_to_ignore_on_load_unexpected = [
        r"lm_head\.", r"^(vision_model|visual_\w+|text_adapter)\.", r"^logit_(scale|bias)$",
    ]  # fmt: skip

    def __init__(self, config: LLM2CLIPTextConfig, decoder: PreTrainedModel | None = None) -> None:
        config.require_text_model()
        super().__init__(config)
        self.decoder: Any = None
        if decoder is None:
            avoid_sdpa_without_softcap(config.decoder_config)
            auto, options = text_model_class(config.decoder_config)
            self.decoder = auto.from_config(config.decoder_config, **options)
        self.dense = DenseLayers(output_width(config.decoder_config), config.dense)
        # An existing decoder is attached after post_init(), which would initialise its weights again.
        self.post_init()
        name_layers(self)
        if decoder is not None:
            adopt_submodel(self, "decoder", decoder)
            if text_model_class(decoder.config)[1]:
                self.decoder.pooler = None
            self.dense.to(decoder.device, decoder.dtype)
            if config.bidirectional is not None:
                decoder.config.is_causal = not config.bidirectional
            avoid_sdpa_without_softcap(decoder.config)
        config.decoder_config = self.decoder.config
        self._arguments = argument_names(self.decoder, only_declared=config.bidirectional is None)
        self._first_position = position_offset(self.decoder)
        if config.bidirectional is not False:
            refuse_other_layers(self.decoder)
        if decoder is not None and config.bidirectional:
            # In flash attention no mask decides it.
            for holder in (decoder.config, *decoder.modules()):
                disable_sliding_window(holder)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: LLM2CLIPTextConfig | None = None,
        default_config: LLM2CLIPTextConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a text tower.

        Args:
            pretrained_model_name_or_path: Folder or repository of a saved [`LLM2CLIPTextModel`], which may be a PEFT
                adapter (requires peft); of an LLM2CLIP model that contains its LLM or names its repository; or, with
                `default_config`, of a plain text model.
            config: Prompt and pooling, instead of those in the repository.
            default_config: Prompt and pooling of a plain text model.

        Raises:
            ValueError: Weights of the LLM are missing, or it cannot be a text tower.
        """
        # AutoModel replaces the name of an adapter with that of its base model, which lacks the prompt.
        adapter_kwargs = kwargs.pop("adapter_kwargs", None) or {}
        kwargs.pop("_from_auto", None)  # from transformers 5.25 on, AutoModel passes it, and takes it from nobody
        name = os.fspath(adapter_kwargs.get("_adapter_model_path") or pretrained_model_name_or_path)
        _, name, inside = find_text_model(name)
        kwargs |= inside
        wants_info = kwargs.pop("output_loading_info", False)
        info: dict[str, Any] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        hub = hub_arguments(kwargs)
        is_adapter = find_adapter_config_file(name, **hub) is not None
        fields = PretrainedConfig.get_config_dict(name, **hub)[0]
        model_type, elsewhere = fields.get("model_type"), fields.get("text_model_name_or_path")
        is_tower, is_joint = model_type == cls.config_class.model_type, model_type == COMPOSITE_TYPE
        if is_adapter and not is_tower:
            raise ValueError(
                f"{name} is a PEFT adapter without the config of a text tower; merge it into its LLM: "
                f"llm2clip convert LLM OUTPUT --adapters {name}"
            )
        if is_adapter:
            model = cls._from_adapter(name, config or cls.config_class.from_dict(fields), kwargs)
        elif is_joint and elsewhere is not None:
            default_config = default_config or cls.config_class.from_dict(fields["text_config"])
            if elsewhere != OWN_TEXT_MODEL:
                kwargs["revision"] = fields.get("text_model_revision")
            elsewhere = find_text_model(elsewhere, name, **hub)[0]
            kwargs |= {"subfolder": "", "output_loading_info": wants_info}
            return cls.from_pretrained(elsewhere, config=config, default_config=default_config, **kwargs)
        elif is_tower or is_joint:
            if is_joint:
                config = config or cls.config_class.from_dict(fields["text_config"])
                kwargs["key_mapping"] = {r"^text_model\.": ""}
            model, info = load_complete(super().from_pretrained, name, *model_args, config=config, **kwargs)
        else:
            model = cls._from_plain(name, config or default_config, kwargs)
        return (model, info) if wants_info else model

    @classmethod
    def _from_plain(cls, name: str, config: LLM2CLIPTextConfig | None, kwargs: dict[str, Any]) -> LLM2CLIPTextModel:
        if config is None or config.dense:
            what = "a plain text model" if config is None else "an embedding model with Dense layers"
            raise ValueError(
                f"{name} is {what}, not a text tower. Save what llm2clip.open_text_tower({name!r}) returns, model and "
                "tokenizer, and load that folder."
            )
        trust = {key: kwargs[key] for key in ("trust_remote_code", "code_revision") if key in kwargs}
        auto, options = text_model_class(AutoConfig.from_pretrained(name, **hub_arguments(kwargs), **trust))
        decoder, _ = load_complete(auto.from_pretrained, name, **options, **kwargs)
        config = copy.deepcopy(config)
        config.fingerprint = None  # it is of the weights that the config was saved with
        return cls(config, decoder=decoder)

    @classmethod
    def _from_adapter(cls, name: str, config: LLM2CLIPTextConfig, kwargs: dict[str, Any]) -> LLM2CLIPTextModel:
        # Not an import statement: transformers would require peft of everyone who loads this code from the Hub.
        try:
            peft = importlib.import_module("peft")
        except ImportError as error:
            raise ImportError(f"{name} is a PEFT adapter; install peft to load it: pip install peft") from error
        hub = hub_arguments(kwargs)
        adapter = peft.PeftConfig.from_pretrained(name, **hub)
        base_kwargs = {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}
        if adapter.revision is not None:
            base_kwargs["revision"] = adapter.revision
        if kwargs.get("dtype", kwargs.get("torch_dtype")) in (None, "auto") and config.dtype is not None:
            # That in which the adapter was trained: in another one, its base would have other weights.
            base_kwargs["dtype"] = config.dtype
            base_kwargs.pop("torch_dtype", None)
        # The base model may be a text tower too, with its own weights or its own adapter.
        plain = copy.deepcopy(config)
        plain.dense = []
        base = cls.from_pretrained(adapter.base_model_name_or_path, default_config=plain, **base_kwargs)
        base.merge_adapter()
        model = cls(copy.deepcopy(config), decoder=base.decoder)
        if config.dense:
            model.dense.load_state_dict(load_file(str(cached_file(name, DENSE_FILE, **hub))))
        model.decoder = peft.PeftModel.from_pretrained(base.decoder, name, **hub)
        return model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the model with its fingerprint; if the decoder has a PEFT adapter, without its base's weights."""
        self.config.fingerprint = self.fingerprint(state_dict) or self.config.fingerprint
        if not self.has_adapter:
            super().save_pretrained(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
            return
        if kwargs.pop("push_to_hub", False):
            raise ValueError("an adapter is saved to a folder first; upload that folder.")
        dense = {
            key.removeprefix("dense."): value
            for key, value in (self.state_dict() if state_dict is None else state_dict).items()
            if key.startswith("dense.")
        }
        if state_dict is not None:
            state_dict = {key.removeprefix("decoder."): value for key, value in state_dict.items()}
        # Otherwise peft may save the embeddings too: it reads the size of a base's vocabulary at one place only.
        options = {"state_dict": state_dict, "is_main_process": is_main_process, "save_embedding_layers": False}
        self.decoder.save_pretrained(os.fspath(save_directory), **options)
        if is_main_process:
            if dense:
                save_file(dense, Path(save_directory, DENSE_FILE), metadata={"format": "pt"})
            if self._auto_class is not None:
                custom_object_save(self, save_directory, config=self.config)  # type: ignore[arg-type]
            self.config.architectures = [type(self).__name__]
            self.config.dtype = self.dtype
            self.config.save_pretrained(save_directory)

    @property
    def has_adapter(self) -> bool:
        """Whether the decoder has an unmerged PEFT adapter."""
        return hasattr(self.decoder, "peft_config")

    @property
    def has_readable_weights(self) -> bool:
        """Whether no weight is offloaded or quantised. No values are read."""
        return all(map(is_readable, self.state_dict().values()))

    def merge_adapter(self) -> None:
        """Merge the decoder's PEFT adapter into its weights, in place; every device gives the same result."""
        if self.has_adapter:
            self.decoder = merge_layers(self.decoder)

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def fingerprint(self, state_dict: Mapping[str, Tensor] | None = None) -> str | None:
        """Hash the weights, prompt and pooling; see [`text_fingerprint`].

        The weights are those after [`merge_adapter`], in float32 or bfloat16.

        Args:
            state_dict: The weights, if they are not in the model (sharded training).

        Returns:
            The hash, or `None` if the weights cannot be read because they are quantised or offloaded.
        """
        state = self.state_dict() if state_dict is None else state_dict
        if self.has_adapter:
            return text_fingerprint(self.config, merged_weights(self, state))
        # One weight at a time: the conversion of a large LLM passes a mapping that reads them from disk.
        return text_fingerprint(self.config, ((name, state[name]) for name in state))

    def identity(self) -> str | None:
        """Return the recorded fingerprint; without a record that of the weights, or `None` if they are not exact.

        They are not in float16 or quantised.
        """
        weight: Any = self.get_input_embeddings().weight
        exact = weight.dtype in (torch.float32, torch.bfloat16)
        return self.config.fingerprint or (self.fingerprint() if exact else None)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pooling_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode captions.

        Args:
            input_ids: `(batch, tokens)`, from the tokenizer that was saved with this model.
            attention_mask: `(batch, tokens)`, 1 for real tokens; by default all.
            pooling_mask: `(batch, tokens)`, 1 for the tokens to pool; by default all real tokens after the prefix.

        Short captions are packed into shared rows, so that padding costs little; the states at padding are then zero.
        Captions are not packed in types of text models that the tests do not compare, under FlexAttention, when
        compiling, or when hidden states or attention weights are requested.
        """
        if input_ids is None:
            raise ValueError("pass input_ids from the tokenizer that was saved with this model.")
        # Without padding there is nothing to pack.
        may_pack = attention_mask is not None
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids, dtype=torch.long)
        order = attention_mask.long().cumsum(dim=1)
        if pooling_mask is None:
            skipped = 0 if self.config.pool_prompt else self.config.num_prefix_tokens
            pooling_mask = attention_mask.bool() & (order > skipped)
        packed = self._pack(attention_mask, order, kwargs) if may_pack else None
        inputs: dict[str, Any]
        if packed is None:
            # Positions are counted from the caption's first token, so that nothing depends on the padding.
            positions = (order - 1).clamp(min=0)
            mask = padded_mask(self.decoder, attention_mask, self.config.bidirectional)
            inputs = {"input_ids": input_ids, "attention_mask": mask}
        else:
            positions = packed.position_ids
            inputs = {"input_ids": packed.pack(input_ids), **packed_mask(self.decoder, packed)}
        options = {"position_ids": positions + self._first_position, "use_cache": False}
        output = self.decoder(**inputs, **{name: options[name] for name in self._arguments}, **kwargs)
        states = output.last_hidden_state
        if packed is not None:
            states = packed.unpack(states)
        masks = attention_mask.to(states.device), pooling_mask.to(states.device)
        pooled = self.dense(pool(states, *masks, self.config.pooling))
        return BaseModelOutputWithPooling(
            last_hidden_state=states,
            pooler_output=F.normalize(pooled, dim=-1) if self.config.normalize else pooled,
            hidden_states=output.get("hidden_states"),
            attentions=output.get("attentions"),
        )

    def _pack(self, attention_mask: Tensor, order: Tensor, kwargs: dict[str, Any]) -> PackedBatch | None:
        """Pack a batch if attention can separate its captions and only the last states are requested."""
        decoder, options = self.decoder, ("output_hidden_states", "output_attentions")
        asked = any(kwargs.get(name, getattr(decoder.config, name, False)) for name in options)
        if asked or torch.compiler.is_compiling() or not may_pack(decoder, self.config.bidirectional):
            return None
        single_row = not takes_additive_mask(decoder)
        # The one time that a forward waits for the device.
        packed = PackedBatch(attention_mask, order, order[:, -1].tolist(), single_row)
        # Packing must save enough to make up for its larger mask.
        limit = attention_mask.numel() - 1 if single_row else 0.9 * attention_mask.numel()
        return packed if packed.num_tokens <= limit else None

    def encode(
        self,
        texts: Sequence[str] | str,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        instruction: str | None = None,
    ) -> Tensor:
        """Embed captions of any length, in evaluation mode.

        Args:
            tokenizer: The tokenizer that was saved with this model.
            batch_size: Largest number of captions in a batch. Captions are grouped by length, and a batch has at most
                512 tokens on a CPU and 16,384 on other devices.
            instruction: Text before every caption, as in stage 1; it is context and not pooled.

        Returns:
            float32 `(len(texts), hidden_size)` on the CPU, in input order.
        """
        return encode_tokens(
            tokenize_captions(texts, tokenizer, self.config, instruction),
            tokenizer,
            lambda batch: self(**batch).pooler_output,
            model=self,
            device=execution_device(self),
            width=self.config.hidden_size,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
        )

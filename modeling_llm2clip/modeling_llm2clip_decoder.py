"""The text model inside of a text tower: its class, what is known of its attention, masks, and packing.

Packing puts several short captions into a row of a batch, which then costs about as much as its tokens, not as its
padding.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForTextEncoding, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES

from .compatibility_llm2clip import IS_CAUSAL_COUNTS

# Attention implementations for sequences without padding, which need the lengths of the captions.
VARIABLE_LENGTHS = ("flash_attention_2", "flash_attention_3")
# Decoders whose states the tests compare with every attention implementation, packed and padded.
TESTED_TYPES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
# Encoders that the tests compare packed and padded; they attend in both directions by design.
TESTED_ENCODERS = ("bert", "roberta", "xlm-roberta")
# Kinds of layers that read no token but those that the mask shows.
MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


def is_encoder_half(config: PretrainedConfig) -> bool:
    """Return whether a type has an encoder and a decoder, and transformers has a class for its encoder alone (T5)."""
    return str(MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(config.model_type)).endswith("EncoderModel")


def text_model_class(config: PretrainedConfig) -> tuple[Any, dict[str, Any]]:
    """Return the auto class that builds or loads a text model, and the arguments for it.

    The layer that some encoders put on their first token is left out: published weights often lack it, and a text
    tower pools the states itself.

    Raises:
        ValueError: The model is no text model, or an encoder with a decoder that transformers cannot separate.
    """
    if not hasattr(config, "hidden_size"):
        raise ValueError(f"{config.model_type} has no hidden_size: it is not a text model, or consists of several.")
    if config.is_encoder_decoder and not is_encoder_half(config):
        raise ValueError(
            f"{config.model_type} is an encoder with a decoder, of which transformers has no class for the encoder "
            "alone; use a decoder, an encoder such as BERT, or T5."
        )
    auto: Any = AutoModelForTextEncoding if is_encoder_half(config) else AutoModel
    model_class: Any = auto._model_mapping.get(type(config), None)
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    has_pooler = model_class is not None and "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return auto, {"add_pooling_layer": False} if has_pooler else {}


def refuse_other_layers(text_model: Any) -> None:
    """Raise ValueError for a text model that by transformers' flags is not made of attention alone.

    Recurrent, convolutional and linear-attention layers carry states from token to token: from the padding into a
    caption, and never from its end to its beginning.
    """
    config = text_model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    # From transformers 5.25 on there is no such flag; RWKV names no layers either.
    is_stateful = getattr(text_model, "_is_stateful", config.model_type == "rwkv")
    # MobileBERT reads three tokens at once, padding too.
    if is_stateful or kinds - MASKED_LAYERS or getattr(config, "trigram_input", False):
        shown = f" (layers: {', '.join(sorted(kinds))})" if kinds else ""
        raise ValueError(
            f"{config.model_type}{shown} cannot be a text tower, whose layers are all attention and follow the mask "
            f"that they are given. Use another text model, such as {', '.join(TESTED_TYPES)}."
        )


def may_pack(text_model: Any, bidirectional: bool | None) -> bool:
    """Return whether captions may share rows of a text model: of tested types, under attention that separates them."""
    model_type, attention = text_model.config.model_type, text_model.config._attn_implementation
    if bidirectional is None:
        # In 4.57 encoders read no 4-D mask, and have no such flag.
        packs = model_type in TESTED_ENCODERS and text_model._supports_attention_backend
        return bool(packs and takes_additive_mask(text_model))
    separates = takes_additive_mask(text_model) or (attention in VARIABLE_LENGTHS and IS_CAUSAL_COUNTS)
    return bidirectional and model_type in TESTED_TYPES and separates


def argument_names(text_model: Any, only_declared: bool) -> tuple[str, ...]:
    """Return which of the arguments `position_ids` and `use_cache` a text model takes.

    Args:
        only_declared: Whether arguments that it would take as `**kwargs` do not count: T5 passes them on to layers.
    """
    inner = text_model.get_base_model() if hasattr(text_model, "get_base_model") else text_model  # inside of PEFT
    parameters = inspect.signature(type(inner).forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    anything = inspect.Parameter.VAR_KEYWORD in kinds and not only_declared
    return tuple(name for name in ("position_ids", "use_cache") if anything or name in parameters)


def position_offset(text_model: nn.Module) -> int:
    """Return the position of the first token: RoBERTa and its kind count on from the index of the padding token."""
    for module in text_model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            return padding + 1
    return 0


class DenseLayers(nn.ModuleList):
    """The linear layers after pooling, each with its activation: float32 `(batch, hidden)` to float32 `(batch, out)`.

    Args:
        width: Width of the pooled states.
        layers: `dense` of the text config.
    """

    def __init__(self, width: int, layers: Sequence[Mapping[str, Any]]) -> None:
        widths = [width, *(layer["out_features"] for layer in layers)]
        super().__init__(
            nn.Linear(before, layer["out_features"], bias=layer["bias"])
            for before, layer in zip(widths, layers, strict=False)
        )
        self.activations = [ACT2FN[layer["activation"]] for layer in layers]

    def forward(self, pooled: Tensor) -> Tensor:
        linear: Any
        for linear, activation in zip(self, self.activations, strict=True):
            pooled = activation(linear(pooled.to(linear.weight.dtype))).float()
        return pooled


def assign_rows(lengths: Sequence[int], capacity: int) -> tuple[list[int], list[int], int]:
    """Assign captions of these `lengths` to rows of `capacity` tokens by best-fit decreasing bin packing.

    Returns:
        The row of each caption, the position of its first token in that row, and the number of rows.
    """
    rows, starts = [0] * len(lengths), [0] * len(lengths)
    free: list[tuple[int, int]] = []  # (tokens left, row), ascending
    num_rows = 0
    for caption in sorted(range(len(lengths)), key=lambda index: lengths[index], reverse=True):
        fitting = bisect_left(free, (lengths[caption], 0))
        if fitting < len(free):
            left, row = free.pop(fitting)
        else:
            left, row = capacity, num_rows
            num_rows += 1
        rows[caption], starts[caption] = row, capacity - left
        if left > lengths[caption]:
            insort(free, (left - lengths[caption], row))
    return rows, starts, num_rows


class PackedBatch:
    """The positions of a padded batch's tokens in rows as long as its longest caption, or in a single row.

    What is on the device is made of the mask there, without waiting for it.

    Args:
        attention_mask: `(batch, tokens)`, 1 for real tokens.
        order: `(batch, tokens)`, the 1-based position of each real token in its caption.
        lengths: Number of real tokens of each caption.
        single_row: Whether all captions share one row, in their order.
    """

    def __init__(
        self, attention_mask: Tensor, order: Tensor, lengths: Sequence[int], single_row: bool = False
    ) -> None:
        self.ends = [0, *accumulate(lengths)]
        self.longest = max(lengths, default=0)
        if single_row:
            self.width, self.num_rows = max(1, self.ends[-1]), 1
            rows, starts = [0] * len(lengths), self.ends[:-1]
        else:
            self.width = max(1, self.longest)
            rows, starts, self.num_rows = assign_rows(lengths, self.width)
        self._first = [row * self.width + start for row, start in zip(rows, starts, strict=True)]
        self._mask, self._order = attention_mask, order

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, with those that are not full."""
        return self.num_rows * self.width

    @cached_property
    def target(self) -> Tensor:
        """The place of each token of the padded batch in the rows, `(batch * tokens,)`; that after them if padding."""
        first = torch.tensor(self._first, dtype=torch.long).to(self._order.device, non_blocking=True)
        return torch.where(self._mask.bool(), first[:, None] + self._order - 1, self.num_tokens).flatten()

    @cached_property
    def position_ids(self) -> Tensor:
        """`(rows, width)`, the 0-based position of each token in its caption."""
        return self.pack(self._order - 1)

    @cached_property
    def caption_ids(self) -> Tensor:
        """`(rows, width)`, from 1; 0 where a row is not full: such positions attend only to each other."""
        captions = torch.arange(1, len(self._first) + 1, device=self._order.device)
        return self.pack(captions[:, None].expand_as(self._order))

    def pack(self, values: Tensor) -> Tensor:
        """Rearrange `(batch, tokens, ...)` to `(rows, width, ...)`, zero where a row is not full."""
        rows = values.new_zeros(self.num_tokens + 1, *values.shape[2:])
        rows = rows.index_copy(0, self.target, values.flatten(0, 1))[:-1]
        return rows.unflatten(0, (self.num_rows, self.width))

    def unpack(self, states: Tensor) -> Tensor:
        """Rearrange `(rows, width, ...)` to `(batch, tokens, ...)`, zero at the padding."""
        target, flat = self.target.to(states.device), states.flatten(0, 1)
        is_padding = (target == self.num_tokens).view(-1, *(1 for _ in flat.shape[1:]))
        tokens = flat.index_select(0, target.clamp(max=self.num_tokens - 1)).masked_fill(is_padding, 0)
        return tokens.unflatten(0, self._mask.shape)

    def visible(self) -> Tensor:
        """Return the boolean mask `(rows, 1, width, width)` of the token pairs in the same caption."""
        return (self.caption_ids[:, :, None] == self.caption_ids[:, None, :])[:, None]


def avoid_sdpa_without_softcap(config: PretrainedConfig) -> None:
    """Select eager attention for Gemma 2: sdpa cannot cap the logits, which older transformers versions ignore."""
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation in (None, "sdpa"):
        config._attn_implementation = "eager"


def takes_additive_mask(decoder: Any) -> bool:
    """Return whether a decoder's attention adds a 4-D mask to its logits, as in every transformers version.

    The flag `is_causal` is less reliable: 4.57 ignores it, and a sliding window would hide part of a long caption.
    """
    return decoder.config._attn_implementation in ("eager", "sdpa")


def additive_mask(decoder: Any, visible: Tensor) -> Tensor:
    """Return 0 where a token is visible, and the smallest number of the decoder's dtype elsewhere."""
    dtype: Any = decoder.get_input_embeddings().weight.dtype
    if not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def padded_mask(decoder: Any, attention_mask: Tensor, bidirectional: bool | None) -> Tensor:
    """Return the decoder's mask for a padded batch; ValueError if attention may be causal."""
    if not bidirectional:
        return attention_mask
    if takes_additive_mask(decoder):
        row = additive_mask(decoder, attention_mask[:, None, None, :] != 0)
        return row.expand(-1, 1, attention_mask.shape[1], -1)
    attention, model_type = decoder.config._attn_implementation, decoder.config.model_type
    if not IS_CAUSAL_COUNTS:
        raise ValueError(
            f"attn_implementation {attention!r} is causal in this transformers version; use 'sdpa' or 'eager', or "
            "transformers >= 5.2."
        )
    if model_type not in TESTED_TYPES:
        # Some types ignore the mask there, or leave out attention sinks.
        raise ValueError(
            f"attn_implementation {attention!r} is not known to read captions right in {model_type}, only in "
            f"{', '.join(TESTED_TYPES)}; use 'sdpa' or 'eager'."
        )
    return attention_mask


def packed_mask(decoder: Any, packed: PackedBatch) -> dict[str, Any]:
    """Return the decoder's arguments that separate the captions of a row."""
    if takes_additive_mask(decoder):
        return {"attention_mask": additive_mask(decoder, packed.visible())}
    # Flash attention knows the captions of a single row by their boundaries.
    ends = torch.tensor(packed.ends, dtype=torch.int32).to(packed.target.device, non_blocking=True)
    lengths = {"max_length_q": packed.longest, "max_length_k": packed.longest}
    return {"attention_mask": None, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, **lengths}

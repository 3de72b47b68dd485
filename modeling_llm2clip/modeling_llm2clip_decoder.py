"""The text model inside of a text tower: its class, loading it, what is known of its attention, masks, and packing.

Packing puts several short captions into a row of a batch, which then costs about as much as its tokens, not as its
padding.
"""

from __future__ import annotations

import inspect
import json
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)

from .compatibility_llm2clip import IS_CAUSAL_COUNTS
from .configuration_llm2clip import WINDOW_FIELDS
from .modeling_llm2clip_utils import hub_arguments, load_complete

try:
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
except ImportError:  # before version 2
    get_cached_repo_tree = None  # type: ignore[assignment]

# Attention implementations for sequences without padding, which need the lengths of the captions.
VARIABLE_LENGTHS = ("flash_attention_2", "flash_attention_3")
# Types whose states the tests compare with every attention implementation.
TESTED_TYPES = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
# Kinds of layers that read no token but those that the mask shows.
MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# Total width of a window to both sides, in encoders.
TWO_SIDED_WINDOW_FIELDS = ("local_attention",)

# The usual limit of captions in tokens; encoders that have fewer positions get a lower one.
LENGTH = 512


def is_encoder_half(config: PretrainedConfig) -> bool:
    """Return whether a type has an encoder and a decoder, and transformers has a class for its encoder alone (T5)."""
    return str(MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(config.model_type)).endswith("EncoderModel")


def is_encoder(config: PretrainedConfig) -> bool:
    """Return whether a text model attends in both directions by its design: BERT and its kind, the encoder of T5."""
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    return is_encoder_half(config) or (masked and not config.is_encoder_decoder)


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


def encoder_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Return the fields of a text config by which an encoder differs from a decoder: none for a decoder."""
    if config.model_type in ("clip", "clip_text_model"):
        # As CLIPTextModelWithProjection: the state of the end token, projected.
        layer = {"out_features": config.projection_dim, "bias": False, "activation": "linear"}
        fields = {"bidirectional": None, "pool_prompt": True, "pooling": "eos_token", "dense": [layer]}
        return {**fields, "max_text_length": getattr(config, "text_config", config).max_position_embeddings}
    if not is_encoder(config):
        return {}
    fields = {"bidirectional": None, "pool_prompt": True}
    positions = getattr(config, "max_position_embeddings", None) or LENGTH
    return fields if positions >= LENGTH else {**fields, "max_text_length": positions}


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


def load_plain(name: str, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Load a plain text model: an LLM, an encoder, or an embedding model of sentence-transformers.

    Args:
        name: Repository id or folder.
        options: Arguments of `from_pretrained`.

    Returns:
        The text model, and the weights of the Dense layers after pooling, named as in a `ModuleList`.
    """
    hub = hub_arguments(options)
    trust = {key: options[key] for key in ("trust_remote_code", "code_revision") if key in options}
    config = AutoConfig.from_pretrained(name, **hub, **trust)
    if config.model_type == "clip":
        half, _ = load_complete(CLIPTextModel.from_pretrained, name, **options)
        half.config.projection_dim = config.projection_dim
        config.text_config.projection_dim = config.projection_dim  # which is the only one that CLIPModel reads
        load_projected = CLIPTextModelWithProjection.from_pretrained
        projected, _ = load_complete(load_projected, name, **{**options, "config": config.text_config})
        return half, {"0.weight": projected.text_projection.weight.detach()}
    auto, own_options = text_model_class(config)
    model, _ = load_complete(auto.from_pretrained, name, **own_options, **options)
    folders = [module["path"] for module in embedding_modules(name, **hub) if module["type"].endswith("Dense")]
    dense: dict[str, Tensor] = {}
    for number, folder in enumerate(folders):
        path = find_file(name, f"{folder}/model.safetensors", **hub)
        if path is None:
            raise ValueError(f"{folder} of {name} has no model.safetensors; save it again with sentence-transformers.")
        dense |= {f"{number}.{key.removeprefix('linear.')}": value for key, value in load_file(path).items()}
    return model, dense


def embedding_modules(name: str, **hub: Any) -> list[dict[str, Any]]:
    """Read `modules.json`, by which sentence-transformers describes an embedding model; empty if there is none."""
    modules: list[dict[str, Any]] = read_json_file(name, "modules.json", **hub) or []
    return modules if any(module["type"].endswith("Pooling") for module in modules) else []


def find_file(name: str, file: str, **hub: Any) -> str | None:
    """Return the path of a file of a repository or folder, downloaded if necessary; None if there is none.

    Raises:
        OSError: The Hub cannot be asked whether there is one, and its cache does not know; or there is no repository.
    """
    path = "/".join(filter(None, (hub.pop("subfolder", None), file)))
    if Path(name).is_dir():
        return str(Path(name, path)) if Path(name, path).is_file() else None
    try:
        return hf_hub_download(name, path, **hub)
    except LocalEntryNotFoundError as error:
        place = {key: hub.get(key) for key in ("cache_dir", "revision")}
        if _is_known_to_lack(name, path, **place):
            return None
        revision = "" if place["revision"] is None else f" --revision {place['revision']}"
        raise OSError(
            f"the Hub cannot be asked whether {name} has {path} (offline, or no connection), and the cache does not "
            f"have it. Go online once, or download all of it where there is a network: hf download {name}{revision}"
        ) from error
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise OSError(f"{name} is neither a folder here nor the id of a repository on the Hub: {error}") from error


def _is_known_to_lack(name: str, path: str, **place: Any) -> bool:
    """Whether the cache says that a repository has no such file: it was asked before, or is here as a whole."""
    if try_to_load_from_cache(name, path, **place) is _CACHED_NO_EXIST:
        return True
    if get_cached_repo_tree is not None:  # the list of files that such a download keeps
        with suppress(CachedRepoTreeNotFoundError):
            return path not in {entry.path for entry in get_cached_repo_tree(name, **place)}
    # A file of every repository, which only the download of an earlier version brings.
    return isinstance(try_to_load_from_cache(name, ".gitattributes", **place), str)


def read_json_file(name: str, file: str, **hub: Any) -> Any:
    """Read a JSON file of a repository or folder; None if there is none.

    Raises:
        ValueError: It is damaged.
        OSError: See [`find_file`].
    """
    path = find_file(name, file, **hub)
    try:
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); copy or download it again.") from None


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


def attention_kind(text_model: Any) -> str:
    """Return the name under which the config of a text tower records the attention implementation in use."""
    return "mask" if takes_additive_mask(text_model) else text_model.config._attn_implementation


def unknown_attention(text_model: Any, config: Any) -> str | None:
    """Say why a text model is not known to read a caption whole, and nothing but the caption; None if it is.

    Known is what `config`, the [`LLM2CLIPTextConfig`] of its tower, records, what the tests compare, and, with a mask,
    what is made of attention alone.
    """
    kind, model_type = attention_kind(text_model), config.decoder_config.model_type
    if config.bidirectional is False or kind in (config.verified_attention or ()) or model_type in TESTED_TYPES:
        return None
    if kind == "mask" and follows_masks(text_model):
        return None
    other = "" if kind == "mask" else ", or use attn_implementation='sdpa'"
    return (
        f"{model_type} with {text_model.config._attn_implementation} attention is not known to be a text tower, "
        "which has to read every caption whole and apart from its neighbours, and the config has no record of it "
        "(verified_attention). Probe it once (pip install llm2clip), and load the result: save what "
        "llm2clip.open_text_tower(FOLDER) returns, or of a whole model the folder that `llm2clip build` "
        f"writes{other}."
    )


def follows_masks(text_model: Any) -> bool:
    """Return whether by transformers' own flags a text model is made of attention that follows a 4-D mask."""
    # Wrappers (PEFT, FSDP) have the flags of what is inside.
    config, layers = text_model.config, set(getattr(text_model.config, "layer_types", None) or ())
    # MobileBERT reads three tokens at once, padding too.
    if text_model._is_stateful or layers - MASKED_LAYERS or getattr(config, "trigram_input", False):
        return False
    return bool(text_model._supports_sdpa and text_model._supports_attention_backend)


def packs_by_flags(text_model: Any) -> bool:
    """Return whether by those flags captions may share a row of a text model with attention of its own."""
    return takes_additive_mask(text_model) and is_encoder(text_model.config) and follows_masks(text_model)


def window_reach(config: PretrainedConfig) -> int | None:
    """Return how many tokens apart two tokens may be that no window separates; None if no layer has a window."""
    fields = config.to_dict()
    one_sided = [fields.get(name) for name in WINDOW_FIELDS]
    two_sided = [fields.get(name) for name in TWO_SIDED_WINDOW_FIELDS]
    reaches = [window // 2 for window in (*one_sided, *two_sided) if isinstance(window, int) and window > 0]
    if reaches:
        return min(reaches)
    kinds = set(fields.get("layer_types") or ())
    return None if kinds <= {"full_attention"} else 0


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
    """Return the decoder's mask for a padded batch; ValueError if attention is causal in this transformers version."""
    if not bidirectional:
        return attention_mask
    if takes_additive_mask(decoder):
        row = additive_mask(decoder, attention_mask[:, None, None, :] != 0)
        return row.expand(-1, 1, attention_mask.shape[1], -1)
    if not IS_CAUSAL_COUNTS:
        raise ValueError(
            f"attn_implementation {decoder.config._attn_implementation!r} is causal in this transformers version; "
            "use 'sdpa' or 'eager', or transformers >= 5.2."
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

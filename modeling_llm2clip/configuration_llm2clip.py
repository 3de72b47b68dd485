"""Configurations of LLM2CLIP: the EVA02 vision tower, the text tower (any text model) and their composition."""

from __future__ import annotations

import copy
import math
import os
import re
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .compatibility_llm2clip import with_version_4_rope, without_version_4_rope

# An integer, because transformers rejects layers with sliding attention that have no window.
WHOLE_CAPTION = 2**30
WINDOW_FIELDS = ("sliding_window", "sliding_window_size", "attention_chunk_size")
INITIALIZERS = ("original", "normal")
VISION_POOLINGS = ("cls", "mean", "cls_mean")
VISUAL_HEADS = ("linear", "gated", "residual")
TEXT_HEADS = ("adapter", "linear", "residual")
# Fields of text models that project their last states to another width (OPT, EmbeddingGemma 2).
OUTPUT_WIDTHS = ("word_embed_proj_dim", "embedding_dim")
POOLING_MODES = ("mean", "weighted_mean", "last_token", "eos_token", "bos_token")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(choices)}.")


def _require_layers(tower: PretrainedConfig, layers: list[int] | None) -> None:
    if layers is None:
        return
    count = getattr(tower, "num_hidden_layers", None)
    if count is None or hasattr(tower, "depths"):
        raise ValueError(
            f"vision_layers is {layers}, but a {tower.model_type} has no layers of one width; leave it unset."
        )
    if not layers or layers != sorted({*layers}) or not 1 <= layers[0] <= layers[-1] <= count:
        raise ValueError(
            f"vision_layers is {layers}, but the {tower.model_type} has layers 1 to {count}; name some of them in "
            "ascending order."
        )


def disable_sliding_window(holder: Any) -> None:
    """Let a config, or a layer of a decoder, attend to whole captions instead of a sliding window, in place."""
    for name in WINDOW_FIELDS:
        window = vars(holder).get(name)
        if isinstance(window, int) and window > 0:
            setattr(holder, name, WHOLE_CAPTION)


def output_width(config: Any) -> int:
    """Return the width of the last hidden states that a text model returns."""
    projected = (getattr(config, name, None) for name in OUTPUT_WIDTHS)
    return next((width for width in projected if width is not None), config.hidden_size)


def _as_config(config: PretrainedConfig | dict[str, Any] | None, default_type: str | None = None) -> Any:
    """Build a config from its JSON form: one of this module, or of any architecture that transformers supports."""
    if isinstance(config, PretrainedConfig):
        return config
    fields = dict(without_version_4_rope({"model_type": default_type, **(config or {})}))
    model_type = fields.pop("model_type")
    for config_class in (EVA02VisionConfig, LLM2CLIPTextConfig):
        if model_type == config_class.model_type:
            return config_class(**fields)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type {model_type!r} is not an architecture that this transformers version supports; "
            "use the config.json of a transformers model, or upgrade transformers."
        )
    return CONFIG_MAPPING[model_type](**fields)


class EVA02VisionConfig(PretrainedConfig):
    """Configuration of [`EVA02VisionModel`]; the defaults are EVA02-CLIP-L-14-336.

    The flags also describe the other EVA-CLIP towers: EVA01 (no rotary positions, GELU, layer scale) and
    EVA02-CLIP-bigE (no rotary positions, GELU, norms after the branches).

    Args:
        intermediate_size: Width of the MLP; for EVA02 the original's `int(hidden_size * 2.6667)`.
        rope_grid_size: Side length, in patches, of the pretraining grid. The rotary positions of any other grid are
            scaled to it. `None`: no rotary positions.
        swiglu: Whether the MLP is a SwiGLU; otherwise it uses GELU.
        sub_layer_norm: Whether a LayerNorm precedes the output projections of attention and MLP.
        post_norm: Whether the norms follow attention and MLP instead of preceding them.
        layer_scale_init_value: Initial layer scale of the residual branches; `None`: no layer scale.
        drop_path_rate: Stochastic depth in training, growing linearly from 0 to this rate at the last block.
        patch_dropout: Fraction of the patch tokens dropped in training (FLIP).
    """

    model_type = "eva02_vision_model"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 2730,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_channels: int = 3,
        image_size: int = 336,
        patch_size: int = 14,
        rope_grid_size: int | None = 16,
        swiglu: bool = True,
        sub_layer_norm: bool = True,
        post_norm: bool = False,
        layer_scale_init_value: float | None = None,
        layer_norm_eps: float = 1e-6,
        drop_path_rate: float = 0.0,
        patch_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}."
            )
        if rope_grid_size is not None and hidden_size % (4 * num_attention_heads):
            raise ValueError(
                f"hidden_size {hidden_size} and num_attention_heads {num_attention_heads}: 2-D rotary positions "
                "need a head width that is a multiple of 4."
            )
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.rope_grid_size = rope_grid_size
        self.swiglu = swiglu
        self.sub_layer_norm = sub_layer_norm
        self.post_norm = post_norm
        self.layer_scale_init_value = layer_scale_init_value
        self.layer_norm_eps = layer_norm_eps
        self.drop_path_rate = drop_path_rate
        self.patch_dropout = patch_dropout
        self.attention_dropout = attention_dropout
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


class _AbsoluteNames:
    """Makes names of local folders absolute when they are set, so that the form alone tells a Hub id later."""

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "_name_or_path":
            value = _absolute_name(value)
        elif isinstance(value, PretrainedConfig):
            value._name_or_path = _absolute_name(value._name_or_path)
        super().__setattr__(key, value)


class LLM2CLIPTextConfig(_AbsoluteNames, PretrainedConfig):
    """Configuration of [`LLM2CLIPTextModel`]: the text model's config, the prompt, the pooling and what follows it.

    Args:
        decoder_config: Config (or its JSON form) of the text model: any decoder or encoder that transformers supports.
        pooling: One of `POOLING_MODES`.
        prompt_prefix: Text before every caption, after BOS. It provides context and is not pooled.
        prompt_suffix: Text after every caption. It is pooled.
        num_prefix_tokens: Tokens before the caption (BOS and prefix). Without an explicit `pooling_mask` the model
            pools over the real tokens after those.
        pool_prompt: Whether BOS and prefix are pooled too, as most embedding models do.
        dense: Linear layers after pooling, each with `out_features`, `bias` and `activation` (a name in `ACT2FN`).
        normalize: Whether an embedding has unit length.
        encoders: Of a model that takes `llm_embeds` alone, the text encoders whose embeddings they are, side by side,
            each with its `name` and `width`; all other fields are without a meaning then.
        max_text_length: Longest input in tokens, prompt included; a longer caption is cut at its own end.
        prompt_token_ids: Tokens of an empty caption, used to verify that a tokenizer adds the prompt.
        fingerprint: Hash of the weights, prompt and pooling, written when the tower is saved.
        bidirectional: Whether every token attends to the whole caption; `False` for a causal baseline. `None`: as the
            text model does by itself, windows included, for encoders and embedding models.
    """

    model_type = "llm2clip_text_model"
    base_config_key = "text_config"
    sub_configs = {"decoder_config": AutoConfig}

    def __init__(
        self,
        decoder_config: PretrainedConfig | dict[str, Any] | None = None,
        pooling: str = "mean",
        prompt_prefix: str = "",
        prompt_suffix: str = "",
        num_prefix_tokens: int = 0,
        max_text_length: int = 512,
        prompt_token_ids: list[int] | None = None,
        fingerprint: str | None = None,
        bidirectional: bool | None = True,
        pool_prompt: bool = False,
        dense: list[dict[str, Any]] | None = None,
        normalize: bool = False,
        encoders: list[dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        _require_choice("pooling", pooling, POOLING_MODES)
        # Copied, because it is marked as bidirectional below and the caller's decoder may have to stay causal.
        self.decoder_config = copy.deepcopy(_as_config(decoder_config or {"model_type": "llama"}))
        # Respected by every attention implementation of transformers >= 5.2, and read from config.json by other tools.
        if bidirectional is not None:
            self.decoder_config.is_causal = not bidirectional
        self.decoder_config.use_cache = False
        if bidirectional:
            disable_sliding_window(self.decoder_config)
        self.pooling = pooling
        self.prompt_prefix = prompt_prefix
        self.prompt_suffix = prompt_suffix
        self.num_prefix_tokens = num_prefix_tokens
        self.max_text_length = max_text_length
        self.prompt_token_ids = prompt_token_ids
        self.fingerprint = fingerprint
        self.bidirectional = bidirectional
        self.pool_prompt = pool_prompt
        self.dense = dense or []
        self.normalize = normalize
        if any(set(encoder) != {"name", "width"} for encoder in encoders or ()):
            raise ValueError(f"encoders is {encoders}; each has a name and a width, and nothing else.")
        self.encoders = encoders
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of a caption embedding."""
        if self.encoders:
            return sum(encoder["width"] for encoder in self.encoders)
        return self.dense[-1]["out_features"] if self.dense else output_width(self.decoder_config)

    def require_text_model(self) -> None:
        """Raise a ValueError if this is of a model that takes `llm_embeds` alone."""
        if self.encoders:
            parts = " and ".join(f"{encoder['name']} ({encoder['width']})" for encoder in self.encoders)
            raise ValueError(
                f"this model takes llm_embeds alone, rows of width {self.hidden_size}: the embeddings of {parts} side "
                "by side, each of unit length, which llm2clip.PairedCache reads (llm2clip evaluate: --embedding-cache "
                "FIRST SECOND). It contains no text encoder."
            )

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["decoder_config"] = with_version_4_rope(output["decoder_config"])
        if output.get("encoders") is None:
            output.pop("encoders", None)
        return _without_local_names(output)


class LLM2CLIPConfig(_AbsoluteNames, PretrainedConfig):
    """Configuration of [`LLM2CLIPModel`].

    Args:
        vision_config: Config of the vision tower: EVA02, or any vision model that transformers knows.
        text_config: [`LLM2CLIPTextConfig`], its JSON form, or a decoder's config. Always present, even if
            the weights of the text tower are in another repository.
        text_model_name_or_path: Repository or folder with the text tower's weights (possibly a PEFT adapter);
            `./text_model`: in that folder of this repository; `None` if they are part of this checkpoint, or if the
            model takes `llm_embeds` alone (`encoders` of the text config).
        text_model_fingerprint: Fingerprint of the text tower that the adapter was trained with.
        projection_dim: Width of the shared space.
        visual_projection: Whether a linear layer maps the tower's pooled output to `projection_dim`.
        visual_projection_bias: Whether that layer has a bias (EVA02: yes; OpenAI CLIP: no).
        adapter_num_layers: Number of residual blocks in the text adapter (paper: 4).
        adapter_expansion: Hidden width of a block as a multiple of the embedding width.
        adapter_normalize: Whether the adapter first L2-normalises the LLM's embedding.
        logit_scale_init_value: Natural logarithm of the initial logit scale.
        logit_bias_init_value: Initial bias of the logits of a model trained with the sigmoid loss; `None`: no bias.
        initializer: How a new projection and adapter start. `original`: as in the original code, a gated head as
            torch's Linear; `normal`: weights from N(0, `initializer_range`²), biases 0.
        vision_pooling: The vision features. `cls`: the tower's own pooled output (class token or attention pooling);
            `mean`: the mean over the patches of its normalised last hidden state; `cls_mean`: both, side by side.
        vision_layers: The layers of the tower, from 1, whose outputs are the features, side by side. Each is
            normalised and pooled as the tower does it with the last one. `None`: the last layer.
        standardize_vision: Whether the features are standardised with the statistics of the training set.
        center_text: Whether the adapter first subtracts the mean of the training set from the LLM's embedding.
        visual_head: `linear`; `gated`: SAIL's head, see [`LLM2CLIPGatedHead`]; `residual`: a linear map plus a gated
            head times a learned factor.
        visual_head_expansion: Hidden width of a gated head as a multiple of the width of the features of one layer.
        text_head: `adapter`: the blocks, a LayerNorm and a linear map (paper); `linear`: the linear map alone;
            `residual`: a linear map plus the adapter times a learned factor.
        feature_dropout: Dropout of the (standardised) features in training.

    Raises:
        ValueError: A field has a value that is not possible.
    """

    model_type = "llm2clip"
    sub_configs = {"vision_config": AutoConfig, "text_config": LLM2CLIPTextConfig}

    def __init__(
        self,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        text_model_name_or_path: str | None = None,
        text_model_revision: str | None = None,
        text_model_fingerprint: str | None = None,
        projection_dim: int = 1280,
        visual_projection: bool = True,
        visual_projection_bias: bool = True,
        adapter_num_layers: int = 4,
        adapter_expansion: int = 2,
        adapter_normalize: bool = True,
        logit_scale_init_value: float = math.log(1 / 0.07),
        logit_bias_init_value: float | None = None,
        initializer: str = "original",
        initializer_range: float = 0.02,
        vision_pooling: str = "cls",
        vision_layers: list[int] | None = None,
        standardize_vision: bool = False,
        center_text: bool = False,
        visual_head: str = "linear",
        visual_head_expansion: int = 8,
        text_head: str = "adapter",
        feature_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        _require_choice("initializer", initializer, INITIALIZERS)
        _require_choice("vision_pooling", vision_pooling, VISION_POOLINGS)
        _require_choice("visual_head", visual_head, VISUAL_HEADS)
        _require_choice("text_head", text_head, TEXT_HEADS)
        if visual_head != "linear" and not visual_projection:
            raise ValueError(
                f"visual_head {visual_head!r} is a visual projection; do not set visual_projection to False."
            )
        if visual_head_expansion < 1:
            raise ValueError(f"visual_head_expansion must be at least 1, not {visual_head_expansion}.")
        if not 0 <= feature_dropout < 1:
            raise ValueError(f"feature_dropout must be at least 0 and below 1, not {feature_dropout}.")
        # Sub-configs are set before super().__init__(), which passes attn_implementation and dtype on to them.
        self.vision_config = _as_config(vision_config, EVA02VisionConfig.model_type)
        self.text_config = _as_config(text_config, LLM2CLIPTextConfig.model_type)
        # By model_type, not by class: remote code can be imported under several module names.
        if self.text_config.model_type != LLM2CLIPTextConfig.model_type:
            self.text_config = LLM2CLIPTextConfig(decoder_config=self.text_config)
        self.text_model_name_or_path = text_model_name_or_path
        self.text_model_revision = text_model_revision
        self.text_model_fingerprint = text_model_fingerprint
        self.projection_dim = projection_dim
        self.visual_projection = visual_projection
        self.visual_projection_bias = visual_projection_bias
        self.adapter_num_layers = adapter_num_layers
        self.adapter_expansion = adapter_expansion
        self.adapter_normalize = adapter_normalize
        self.logit_scale_init_value = logit_scale_init_value
        self.logit_bias_init_value = logit_bias_init_value
        self.initializer = initializer
        self.initializer_range = initializer_range
        self.vision_pooling = vision_pooling
        _require_layers(self.vision_config, vision_layers)
        self.vision_layers = vision_layers
        self.standardize_vision = standardize_vision
        self.center_text = center_text
        self.visual_head = visual_head
        self.visual_head_expansion = visual_head_expansion
        self.text_head = text_head
        self.feature_dropout = feature_dropout
        super().__init__(**kwargs)

    @property
    def vision_width(self) -> int:
        """Width of the vision features: that of one layer, times the number of `vision_layers`."""
        return self.layer_width * len(self.vision_layers or [None])

    @property
    def layer_width(self) -> int:
        """Width of the vision features of one layer: the tower's, twice that for `cls_mean`."""
        tower = self.vision_config
        # Convolutional towers have a width per stage.
        width = tower.hidden_size if hasattr(tower, "hidden_size") else tower.hidden_sizes[-1]
        return width * (2 if self.vision_pooling == "cls_mean" else 1)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        # A quantised LLM is never part of a checkpoint; its own folder records how it was quantised.
        output["text_config"].pop("quantization_config", None)
        for pipeline in output.get("custom_pipelines", {}).values():
            # transformers' pipeline() replaces the names by the classes, which are not JSON.
            pipeline["pt"] = [getattr(head, "__name__", head) for head in pipeline["pt"]]
        return _without_local_names(output)


def _without_local_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Remove the local folders that the parts were loaded from, and keep Hub ids."""
    kept = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            kept[key] = _without_local_names(value)
        elif key != "_name_or_path" or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value or ""):
            kept[key] = value
    return kept


def _absolute_name(name: str | None) -> str:
    return os.path.abspath(name) if name and os.path.exists(name) else name or ""

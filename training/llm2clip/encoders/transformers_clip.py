"""CLIP, SigLIP, SigLIP 2 and CLIP-like models of transformers as encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoProcessor,
    BatchFeature,
    BlipForImageTextRetrieval,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llm2clip.data import EvalTransform
from llm2clip.encoders.encoder import ClipEncoder, compared_lengths, dtype_for_device
from llm2clip.models.identity import preprocessing, tokenizer_fingerprint
from llm2clip.models.towers import loading_options
from modeling_llm2clip import with_pillow
from modeling_llm2clip.modeling_llm2clip_utils import load_complete
from modeling_llm2clip.tokenization_llm2clip import tokenize_and_cut

# Models that were trained with texts padded to their full length, whose repositories do not always say so.
FULL_LENGTH = ("siglip", "siglip2")
# `model_max_length` of a tokenizer that has none is a number of this order or larger.
NO_LENGTH = 10**9
METHODS = ("get_text_features", "get_image_features")
MEASURED = (
    "Models of transformers are measured by the vectors of get_text_features and get_image_features, such as those of "
    "CLIP, SigLIP or AltCLIP; give a repository of such a model."
)


class BlipRetrievalModel(BlipForImageTextRetrieval):
    """The published retrieval models of BLIP (`Salesforce/blip-itm-base-coco`), whose embeddings have no methods.

    They are those of its contrastive score (`use_itm_head=False`): the projected first token of each tower. The
    matching head, which reads an image and a text together, ranks no gallery and is not used.
    """

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor, **unused: Any
    ) -> BaseModelOutputWithPooling:
        """Compute `(texts, width)`, not normalised, as `pooler_output`."""
        output = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask)
        return BaseModelOutputWithPooling(pooler_output=self.text_proj(output.last_hidden_state[:, 0]))

    def get_vision_features(self, pixel_values: Tensor) -> Tensor:
        """Compute the first token before the projection, `(images, hidden)`; `pooler_output` is normalised twice."""
        return self.vision_model(pixel_values=pixel_values).last_hidden_state[:, 0]

    def get_image_features(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """Compute `(images, width)`, not normalised, as `pooler_output`."""
        return BaseModelOutputWithPooling(pooler_output=self.vision_proj(self.get_vision_features(pixel_values)))


# Models whose repositories say by their architecture alone that they embed images and texts.
BY_ARCHITECTURE: dict[str, Any] = {"BlipForImageTextRetrieval": BlipRetrievalModel}


class TransformersEncoder(ClipEncoder):
    """A model of transformers with `get_text_features` and `get_image_features`.

    Texts are padded as the model was trained. That is to full length if its processor does so by default, if its
    tokenizer makes no attention mask (the model then reads the padding), or if it is a SigLIP; and to the longest of a
    batch otherwise, which masks hide. They are cut at the least of the lengths that processor, tokenizer and
    positions allow. Case and punctuation are the tokenizer's matter.

    Args:
        name, device, dtype: See [`Encoder`].
        model: The model, in evaluation mode.
        processor: Its processor, with `image_processor` and `tokenizer`.

    Raises:
        ValueError: Embeddings of texts are not vectors.
    """

    library = f"transformers {transformers.__version__}"

    def __init__(self, name: str, model: Any, processor: Any, device: torch.device, dtype: str = "float32") -> None:
        super().__init__(name, model, 0, device, dtype)
        self.tokenizer = processor.tokenizer
        self.transform = EvalTransform(with_pillow(processor.image_processor))
        defaults = text_defaults(type(processor))
        tower = getattr(model.config, "text_config", model.config)
        positions = tower.max_position_embeddings - _unused_positions(model)
        limits = (defaults.get("max_length"), self.tokenizer.model_max_length, positions)
        self.max_length = min(limit for limit in limits if limit is not None and limit < NO_LENGTH)
        self.full_length = (
            defaults.get("padding") == "max_length"
            or "attention_mask" not in self.tokenizer.model_input_names
            or model.config.model_type in FULL_LENGTH
        )
        self.measure_width()

    @classmethod
    def load(
        cls, name: str, revision: str | None, dtype: str, device: torch.device, subfolder: str = ""
    ) -> TransformersEncoder:
        """Load a model with its processor.

        Args:
            name, revision, dtype, device: See [`load_encoder`](llm2clip.encoders.load.load_encoder).
            subfolder: Where it is in its folder or repository.

        Raises:
            OSError: There is no such model.
            ValueError: It does not embed images and texts, or a weight would be random.
        """
        where: dict[str, Any] = {"revision": revision, "subfolder": subfolder}
        config = AutoConfig.from_pretrained(name, **where)
        load = _model_class(name, config).from_pretrained
        model, _ = load_complete(load, name, **loading_options(dtype), **where)
        dtype_for_device(model, dtype, device)
        processor = AutoProcessor.from_pretrained(name, **where)
        dtype = str(model.dtype).removeprefix("torch.")
        encoder = cls(name, model.to(device).eval(), processor, device, dtype)
        encoder.revision = revision
        return encoder

    def settings(self) -> dict[str, Any]:
        return {
            "model": self.model.config.model_type,
            "preprocessing": preprocessing(self.image_transform().image_processor),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "text": [self.max_length, self.full_length],
        }

    def image_features(self, inputs: dict[str, Tensor]) -> Tensor:
        return self._vectors(self.model.get_image_features(**self._on_device(inputs)), "images")

    def pooled_features(self, inputs: dict[str, Tensor]) -> Tensor:
        if hasattr(self.model, "get_vision_features"):
            return self.model.get_vision_features(**self._on_device(inputs))
        tower = getattr(self.model, "vision_model", None)
        features = None if tower is None else tower(**self._on_device(inputs)).get("pooler_output")
        if features is None:
            raise ValueError(f"{type(self.model).__name__} has no pooled features before its projection.")
        return features.flatten(1)

    def _on_device(self, inputs: dict[str, Tensor]) -> BatchFeature:
        return BatchFeature(inputs).to(self.device, self.model.dtype)

    def _vectors(self, output: Any, what: str) -> Tensor:
        features = output if isinstance(output, Tensor) else output.pooler_output
        given = f"{self.name} ({type(self.model).__name__})"
        if features is None or features.ndim != 2:
            raise ValueError(f"{given} does not embed {what} as one vector each. {MEASURED}")
        if self.full_width not in (0, features.shape[1]):
            raise ValueError(
                f"{given} embeds {what} as vectors of {features.shape[1]} values, but texts of {self.full_width}: "
                f"they are in no common space. {MEASURED}"
            )
        return features

    def tokenize(self, texts: list[str]) -> tuple[Sequence[Any], list[int]]:
        encoded, _ = tokenize_and_cut(self.tokenizer, texts, self.max_length)
        rows = [{name: values[row] for name, values in encoded.items()} for row in range(len(texts))]
        return rows, [self.max_length if self.full_length else len(row["input_ids"]) for row in rows]

    def text_features(self, tokens: list[Any]) -> Tensor:
        options = {"padding": "max_length", "max_length": self.max_length} if self.full_length else {}
        padded = self.tokenizer.pad(tokens, return_tensors="pt", **options)
        return self._vectors(self.model.get_text_features(**padded.to(self.device)), "texts")

    def text_lengths(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens of each text before truncation, start and end included, and whether it is cut."""
        ids = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"] if texts else []
        return compared_lengths([len(row) for row in ids], self.max_length)


def _model_class(name: str, config: Any) -> Any:
    """Choose the class that loads a model.

    Raises:
        ValueError: There is none that embeds images and texts.
    """
    for architecture in config.architectures or ():
        if architecture in BY_ARCHITECTURE:
            return BY_ARCHITECTURE[architecture]
    kind = _base_class(type(config))
    missing = [method for method in METHODS if not hasattr(kind, method)]
    if missing:
        owner = getattr(kind, "__name__", "its class")
        videos = ", but get_video_features" if hasattr(kind, "get_video_features") else ""
        raise ValueError(
            f"{name} ({config.model_type}) is not a model of images and texts in one space: {owner} has no "
            f"{' and '.join(missing)}{videos}. {MEASURED}"
        )
    return AutoModel


def has_both_features(model_type: str | None) -> bool:
    """Tell whether models of a type have `get_text_features` and `get_image_features`."""
    kind = _base_class(CONFIG_MAPPING[model_type]) if model_type and model_type in CONFIG_MAPPING else None
    return all(hasattr(kind, method) for method in METHODS)


def _base_class(config_class: Any) -> Any:
    kind: Any = MODEL_MAPPING.get(config_class, None)
    return kind[0] if isinstance(kind, tuple) else kind


def _unused_positions(model: Any) -> int:
    """Return how many rows of a text tower's table of positions no token has.

    Towers of RoBERTa (AltCLIP) number tokens after the padding, which has a row of the table itself.
    """
    unused = 0
    for name, part in getattr(model, "text_model", model).named_modules():
        if name.endswith("position_embeddings") and getattr(part, "padding_idx", None) is not None:
            unused = part.padding_idx + 1
    return unused


def text_defaults(processor_class: type) -> dict[str, Any]:
    """Return the arguments of the tokenizer that a processor of transformers sets unless the caller does."""
    # Until transformers 5.22 in the class of its arguments, later in its own.
    earlier = getattr(getattr(processor_class, "valid_processor_kwargs", None), "_defaults", {})
    return {**earlier.get("text_kwargs", {}), **getattr(processor_class, "text_kwargs", {})}

"""Pair a model with its LLM: load the LLM, verify that the adapter was trained with it, save with or without it."""

from __future__ import annotations

import copy
import os
from functools import partial
from typing import Any

from torch import Tensor
from transformers.utils import logging

from .modeling_llm2clip_probe import change_attention, verify_decoder
from .modeling_llm2clip_text import LLM2CLIPTextModel
from .modeling_llm2clip_utils import HUB_ARGUMENTS, absolute_path, adopt_submodel, execution_device, hub_arguments
from .modeling_llm2clip_vision import LLM2CLIPPreTrainedModel

logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that also apply to an LLM in another repository.
SHARED_ARGUMENTS = {
    *HUB_ARGUMENTS, "device_map", "dtype", "max_memory", "offload_buffers", "offload_folder", "torch_dtype",
    "trust_remote_code",
} - {"revision", "subfolder"}  # fmt: skip


def split_arguments(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments of `from_pretrained` into those of the model without its LLM and the LLM's that differ."""
    own, text = dict(kwargs), {}
    # A vision tower is small and loses more accuracy, and no published checkpoint was trained with a quantised one.
    if own.get("quantization_config") is not None:
        text["quantization_config"] = own.pop("quantization_config")
    config: Any = own.get("config")
    if isinstance(getattr(config, "dtype", None), dict):
        # AutoModel moves it there in transformers 5.3 to 5.11.
        own["dtype"], own["config"] = config.dtype, copy.copy(config)
        own["config"].dtype = None
    for name in ("dtype", "torch_dtype"):
        parts = own.get(name)
        if isinstance(parts, dict):
            unknown = [part for part in parts if part not in ("", "vision_config", "text_config")]
            if unknown:
                raise ValueError(f"{name} names {unknown[0]!r}; its parts are 'vision_config' and 'text_config'.")
            rest = parts.get("", "auto")
            own[name], text[name] = parts.get("vision_config", rest), parts.get("text_config", rest)
    places = own.get("device_map")
    if isinstance(places, dict):
        inside = {key: place for key, place in places.items() if f"{key}.".startswith("text_model.")}
        if inside:
            own["device_map"] = {key: place for key, place in places.items() if key not in inside}
            text["device_map"] = {key[len("text_model.") :]: place for key, place in inside.items()}
        elif "" in places and len(places) > 1:
            text["device_map"] = {"": places[""]}
    return own, text


def text_attention(kwargs: dict[str, Any]) -> str | None:
    """Return the LLM's attention implementation in the arguments of `from_pretrained`, or None if not set."""
    asked = kwargs.get("attn_implementation")
    if asked is None and kwargs.get("config") is not None:  # where AutoModel moves it
        return kwargs["config"].text_config._attn_implementation
    return asked.get("text_config") if isinstance(asked, dict) else asked


class LLM2CLIPPairedModel(LLM2CLIPPreTrainedModel):
    """A model whose `text_model` is the LLM that `text_adapter` was trained with, or None if it is not loaded."""

    text_model: Any
    hub_arguments: dict[str, Any]

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
            kwargs: Arguments of transformers' `from_pretrained`. `dtype` and `attn_implementation` may be set by part,
                as `{"vision_config": ..., "text_config": ...}`; projection and adapter have the dtype of the vision
                tower. A `device_map` may place `text_model` elsewhere, such as on `"disk"`.
                `quantization_config` applies to the LLM only.

        Raises:
            ValueError: Weights are missing, or the adapter was trained with another LLM.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        own, different = split_arguments(kwargs)
        if not text_model and "quantization_config" in different:
            raise ValueError(
                "quantization_config applies to the LLM, which text_model=False does not load; drop one of the two."
            )
        different.update(text_model_kwargs or {})
        attention = text_attention(own)
        together = text_model and not different
        model, info = cls._load(pretrained_model_name_or_path, *args, text_model=together, **own)
        # For the processor. A token is left out, since a model may be pickled.
        model.hub_arguments = {name: value for name, value in hub_arguments(own).items() if name != "token"}
        bundled = model.config.text_model_name_or_path is None
        if text_model and model.text_model is None:
            if attention is not None:
                different.setdefault("attn_implementation", attention)
            if bundled:
                shared = {key: value for key, value in own.items() if key != "attn_implementation"}
                shared |= {"name_or_path": pretrained_model_name_or_path, "config": model.config.text_config}
            else:
                shared = {key: own[key] for key in SHARED_ARGUMENTS if own.get(key) is not None}
            model.load_text_model(**{**shared, **different})
        if together and model.text_model is not None:
            verify_decoder(model.text_model, saved=True)
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
            ValueError: No repository is known, or the adapter was trained with another LLM.
        """
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
        # By model_type, not by class: remote code can be imported under several module names.
        if text_model.config.model_type != LLM2CLIPTextModel.config_class.model_type:
            raise TypeError(
                f"{type(text_model).__name__} is not a text tower; wrap it: LLM2CLIPTextModel.from_decoder(model)."
            )
        source = source or text_model.name_or_path or type(text_model.decoder).__name__
        ours = self.config.text_model_name_or_path or "an unnamed LLM"
        width, expected_width = text_model.config.hidden_size, self.config.text_config.hidden_size
        if width != expected_width:
            raise ValueError(
                f"the adapter takes embeddings of width {expected_width} (it was trained with {ours}), but {source} "
                f"gives {width}; load the LLM that belongs to this checkpoint."
            )
        expected, actual = self.config.text_model_fingerprint, text_model.identity()
        if expected is None:
            # No LLM has been recorded for the adapter: record this one.
            self.config.text_model_fingerprint = actual
            if source != self.config.text_model_name_or_path:
                self.config.text_model_name_or_path = absolute_path(text_model.name_or_path or "") or None
                self.config.text_model_revision = None
        elif actual is None:
            logger.warning(
                f"the weights of {source} (quantised, offloaded or rounded) cannot be compared with {ours}."
            )
        elif actual != expected:
            exact = ""
            if text_model.has_rounded_base:
                exact = (
                    " Or the weights under its PEFT adapter were rounded when they were loaded: load the LLM in the "
                    "dtype of its files, with text_model_kwargs={'dtype': 'auto'}."
                )
            raise ValueError(
                f"the adapter was trained with {ours} (fingerprint {expected}), but {source} has fingerprint "
                f"{actual}: other weights, prompt or pooling, or other settings of the decoder. Load the LLM that "
                f"belongs to this checkpoint, or train an adapter for this one (stage 2).{exact}"
            )
        adopt_submodel(self, "text_model", text_model)
        self.config.text_config = text_model.config

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Change the attention implementations; ValueError, as from the LLM itself, if it cannot use its one."""
        change_attention(self, self.text_model, partial(super().set_attn_implementation, *args, **kwargs))

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
        elsewhere = self.config.text_model_name_or_path
        bundle = elsewhere is None if save_text_model is None else save_text_model
        if bundle and self.text_model is None:
            raise ValueError(
                "there is no LLM to save; attach one, or set config.text_model_name_or_path to its repository."
            )
        if not bundle and elsewhere is None:
            raise ValueError(
                "to save the model without its LLM, set config.text_model_name_or_path to the LLM's repository."
            )
        if bundle and self.text_model.has_adapter:
            raise ValueError(
                "the LLM has an unmerged PEFT adapter; call model.text_model.merge_adapter() before saving."
            )
        if state_dict is None:
            state_dict = self.state_dict()
        if bundle:
            prefix = "text_model."
            text_state = {key.removeprefix(prefix): state_dict[key] for key in state_dict if key.startswith(prefix)}
            identity = self.text_model.fingerprint(text_state)
            if identity is None:
                # transformers reads back what it offloaded itself, but nothing of an LLM that was loaded apart.
                if getattr(self, "hf_device_map", None) is None or getattr(self.text_model, "hf_device_map", None):
                    raise ValueError(
                        "the LLM is quantised or offloaded, so its weights are not here to save; load it whole, or "
                        "save the model without it: save_pretrained(..., save_text_model=False)."
                    )
                identity = self.text_model.config.fingerprint
            self.config.text_model_fingerprint = self.config.text_config.fingerprint = identity
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

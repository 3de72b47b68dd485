"""Which LLM belongs to a joint model: what it is loaded with, whether it is the right one, and where it is saved."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.utils import logging

from .configuration_llm2clip import LLM2CLIPTextConfig
from .identity_llm2clip import changed_settings, decoder_settings
from .modeling_llm2clip_utils import HUB_ARGUMENTS, absolute_path

logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that also apply to an LLM in another repository.
SHARED_ARGUMENTS = {
    *HUB_ARGUMENTS, "device_map", "dtype", "max_memory", "offload_buffers", "offload_folder", "torch_dtype",
    "trust_remote_code",
} - {"revision", "subfolder"}  # fmt: skip


def split_arguments(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments of `from_pretrained` into those of the model without its LLM and the LLM's that differ."""
    model_kwargs, llm_kwargs = dict(kwargs), {}
    # A vision tower is small and loses more accuracy, and no published checkpoint was trained with a quantised one.
    if model_kwargs.get("quantization_config") is not None:
        llm_kwargs["quantization_config"] = model_kwargs.pop("quantization_config")
    # AutoModel moves it to the config in transformers 5.3 to 5.11.
    given = (kwargs.get("dtype"), kwargs.get("torch_dtype"), getattr(kwargs.get("config"), "dtype", None))
    if any(isinstance(dtype, dict) for dtype in given):
        raise ValueError("dtype is one for all parts; give the LLM its own by text_model_kwargs={'dtype': ...}.")
    device_map = model_kwargs.get("device_map")
    if isinstance(device_map, dict):
        inside = {key: device for key, device in device_map.items() if f"{key}.".startswith("text_model.")}
        if inside:
            model_kwargs["device_map"] = {key: device for key, device in device_map.items() if key not in inside}
            llm_kwargs["device_map"] = {key[len("text_model.") :]: device for key, device in inside.items()}
        elif "" in device_map and len(device_map) > 1:
            llm_kwargs["device_map"] = {"": device_map[""]}
    return model_kwargs, llm_kwargs


def text_attention(kwargs: dict[str, Any]) -> str | None:
    """Return the LLM's attention implementation in the arguments of `from_pretrained`, or None if not set."""
    asked = kwargs.get("attn_implementation")
    if asked is None and kwargs.get("config") is not None:  # where AutoModel moves it
        return kwargs["config"].text_config._attn_implementation
    return asked.get("text_config") if isinstance(asked, dict) else asked


def match_text_model(config: Any, text_model: Any, source: str | None) -> None:
    """Verify that an adapter was trained with a text tower; if the config records none, record this one.

    Args:
        config: Of the joint model.
        source: The tower's origin, for error messages.

    Raises:
        TypeError, ValueError: See [`LLM2CLIPModel.set_text_model`].
    """
    # By model_type, not by class: remote code can be imported under several module names.
    if text_model.config.model_type != LLM2CLIPTextConfig.model_type:
        raise TypeError(
            f"{type(text_model).__name__} is not a text tower; wrap it: LLM2CLIPTextModel.from_decoder(model)."
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
        logger.warning(f"the weights of {source} (quantised, offloaded or rounded) cannot be compared with {known}.")
    elif actual != expected:
        raise ValueError(
            f"the adapter was trained with {known} (fingerprint {expected}), but {source} has fingerprint "
            f"{actual}: other weights, prompt or pooling. Load the LLM that belongs to this checkpoint, or train an "
            f"adapter for this one (stage 2)."
        )
    if expected is not None:
        ours, theirs = config.text_config, text_model.config
        trained_with = decoder_settings(ours.decoder_config, theirs.bidirectional)
        if changed := changed_settings(trained_with, theirs.decoder_config, theirs.bidirectional):
            logger.warning(
                f"{source} has the weights that the adapter was trained with, but other settings: "
                f"{', '.join(changed)}."
            )


def weights_to_save(
    model: Any, save_text_model: bool | None, state_dict: dict[str, Tensor] | None
) -> tuple[bool, dict[str, Tensor]]:
    """Return whether a joint model is saved with its LLM, and the weights, after recording the LLM's fingerprint.

    Raises:
        ValueError: See [`LLM2CLIPModel.save_pretrained`].
    """
    elsewhere, has_none = model.config.text_model_name_or_path, bool(model.config.text_config.encoders)
    if save_text_model:
        model.config.text_config.require_text_model()
    bundle = elsewhere is None and not has_none if save_text_model is None else save_text_model
    if bundle and model.text_model is None:
        raise ValueError(
            "there is no LLM to save; attach one, or set config.text_model_name_or_path to its repository."
        )
    if not bundle and elsewhere is None and not has_none:
        raise ValueError(
            "to save the model without its LLM, set config.text_model_name_or_path to the LLM's repository."
        )
    if bundle and model.text_model.has_adapter:
        raise ValueError("the LLM has an unmerged PEFT adapter; call model.text_model.merge_adapter() before saving.")
    if state_dict is None:
        state_dict = model.state_dict()
    if bundle:
        prefix = "text_model."
        text_state = {key.removeprefix(prefix): state_dict[key] for key in state_dict if key.startswith(prefix)}
        identity = model.text_model.fingerprint(text_state)
        if identity is None:
            # transformers reads back what it offloaded itself, but nothing of an LLM that was loaded apart.
            if getattr(model, "hf_device_map", None) is None or getattr(model.text_model, "hf_device_map", None):
                raise ValueError(
                    "the LLM is quantised or offloaded, so its weights are not here to save; load it whole, or "
                    "save the model without it: save_pretrained(..., save_text_model=False)."
                )
            identity = model.text_model.config.fingerprint
        model.config.text_model_fingerprint = model.config.text_config.fingerprint = identity
    else:
        state_dict = {key: value for key, value in state_dict.items() if not key.startswith("text_model.")}
    return bundle, state_dict

"""Merge PEFT adapters with a result that does not depend on the device or the number of threads.

Products are computed in float64 and rounded once to float32, then to the dtype of the weight. Sums in float32 differ
between devices in their last bits, and a tower that was merged twice would be two towers.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .identity_llm2clip import is_readable

# Layers that were trained as a whole, beside the adapter, are copies of the original ones.
SAVED = re.compile(r"\.modules_to_save\.[^.]+\.")


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers of a PEFT adapter (LoRA and its kin) by name."""
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_base_layer")}


def merge_layers(decoder: Any) -> Any:
    """Merge the adapter of a PEFT model into its weights, in place; returns the decoder without adapter.

    Quantised weights are merged as PEFT does it.
    """
    for layer in adapter_layers(decoder).values():
        base = layer.get_base_layer()
        if all(map(is_readable, base.parameters())):
            merged = _merged_state(layer)
            for name, value in base.state_dict().items():
                value.copy_(merged[name])
            layer.merged_adapters.extend(name for name in layer.active_adapters if name not in layer.merged_adapters)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        merged = decoder.merge_and_unload()
    # PEFT 0.18 leaves it, by which an adapter would still be seen.
    vars(merged).pop("peft_config", None)
    return merged


def merged_weights(model: nn.Module, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that a text tower would have after its adapter is merged, one layer at a time.

    Args:
        model: The tower, which is not changed.
        state: Its weights.
    """
    layers = adapter_layers(model)
    for layer_name, layer in layers.items():
        prefix = f"{layer_name}."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if not all(is_readable(value) for value in own.values()):
            yield next((name, value) for name, value in own.items() if not is_readable(value))
            return
        for name, value in _merged_state(layer, own).items():
            yield _plain_name(prefix + name), value
    for name, value in state.items():
        if not any(name.startswith(f"{layer}.") for layer in layers) and ".original_module." not in name:
            yield _plain_name(name), value


def _merged_state(layer: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the merged weights of a layer in float32; `state` replaces the layer's own weights."""
    exact = copy.deepcopy(layer)
    if state is not None:
        # Assigned, since a sharded layer cannot take values of whole tensors.
        exact.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    if next(exact.parameters()).device.type == "mps":  # which has no float64
        exact.cpu()
    with torch.no_grad():
        exact.double().merge()
    return {name: value.float() for name, value in exact.get_base_layer().state_dict().items()}


def _plain_name(name: str) -> str:
    return SAVED.sub(".", name.replace("base_model.model.", ""))

"""The identity of a text tower: a hash of its merged weights, prompt and pooling, written when it is saved.

So PEFT adapters are merged here, with a result that does not depend on the device or the number of threads: products
are computed in float64 and rounded once to float32, then to the dtype of the weight. Sums in float32 differ between
devices in their last bits, and a tower that was merged twice would be two.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

# The rule that a fingerprint was made by.
RULE = "3-"
FIELDS = (
    "pooling", "prompt_prefix", "prompt_suffix", "num_prefix_tokens", "max_text_length", "bidirectional",
)  # fmt: skip
# Left out where they are off.
OPTIONAL_FIELDS = ("pool_prompt", "dense", "normalize")
# Words per sum of `digest_weight`; a word is four values in bfloat16.
WORDS = 2**15
# Sums per step: on a CPU one, so that the words stay in its caches.
DEVICE_ROWS = 64
# Values that a CPU rounds at once: fewer than torch distributes over threads, which wait for each other at every piece
# where other programs run: two threads on two busy cores were 20 times slower than one.
CPU_PIECE = 2**14
# Layers that were trained as a whole, beside an adapter, are copies of the original ones.
SAVED = re.compile(r"\.modules_to_save\.[^.]+\.")


def text_fingerprint(config: PretrainedConfig, weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """Hash the weights, prompt and pooling of a text tower.

    Weights are rounded to bfloat16, so that a tower in float32 and its copy in bfloat16 have the same fingerprint. The
    order of the weights and their distribution over files do not matter.

    Args:
        config: An [`LLM2CLIPTextConfig`].
        weights: All weights with their names in the tower, without an adapter.

    Returns:
        `3-` and 32 hexadecimal digits, or `None` if a weight cannot be read because it is quantised or offloaded.
    """
    digests = {}
    for name, weight in weights:
        if not is_readable(weight):
            return None
        digests[name] = digest_weight(weight)
    set_fields = {name: getattr(config, name) for name in OPTIONAL_FIELDS if getattr(config, name)}
    content = {
        "tower": {name: getattr(config, name) for name in FIELDS} | set_fields,
        "decoder": config.decoder_config.model_type,
        "weights": {name.removeprefix("decoder."): value for name, value in digests.items()},
    }
    return RULE + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def is_readable(weight: Tensor) -> bool:
    """Return whether a weight is in memory as a plain tensor: neither offloaded nor quantised."""
    return not weight.is_meta and weight.is_floating_point() and type(weight.data) is Tensor


def digest_weight(weight: Tensor) -> str:
    """Hash the shape and every value of a weight, rounded to bfloat16, on the device of the weight.

    Each run of 131,072 values becomes two 64-bit sums of products with odd numbers, which any change of a single value
    changes; the sums are hashed. That is as fast as the memory, and does not protect against forgery.
    """
    values = weight.detach().reshape(-1)
    on_cpu = values.device.type == "cpu"
    factors = _factors(values.device)
    pieces = CPU_PIECE if on_cpu else 4 * DEVICE_ROWS * WORDS
    buffer = torch.zeros((1 if on_cpu else DEVICE_ROWS, WORDS), dtype=torch.int64, device=values.device)
    sums: tuple[list[Tensor], list[Tensor]] = ([], [])
    for part in values.split(4 * buffer.numel()):
        if part.dtype == torch.bfloat16 and len(part) == 4 * buffer.numel() and part.storage_offset() % 4 == 0:
            words = part.view(torch.int64).view_as(buffer)
        else:
            padded = buffer.view(torch.bfloat16).view(-1)
            for piece, target in zip(part.split(pieces), padded.split(pieces), strict=False):
                target[: len(piece)] = piece
            padded[len(part) :] = 0
            words = buffer
        # A product keeps the lowest 64 bits, and so little of a difference in a word's upper half.
        words = words[: math.ceil(len(part) / (4 * WORDS))]
        if on_cpu:
            # Integer products are several times faster in numpy.
            for kind, half in zip(sums, (words.numpy(), words.numpy() >> 32), strict=True):
                kind.append(torch.from_numpy(half @ factors.numpy()))
        else:
            for kind, half in zip(sums, (words, words >> 32), strict=True):
                kind.append((half * factors).sum(dim=1))
    content = torch.cat([*sums[0], *sums[1]]).cpu().numpy().astype("<i8").tobytes()
    return hashlib.sha256(f"{tuple(weight.shape)}".encode() + content).hexdigest()[:32]


@lru_cache(maxsize=8)
def _factors(device: torch.device) -> Tensor:
    """Return `WORDS` odd numbers that are well mixed (the finaliser of splitmix64, modulo 2**64)."""
    number = torch.arange(1, WORDS + 1, dtype=torch.int64, device=device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        number = (number ^ ((number >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return number | 1


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
        layer_state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        if not all(is_readable(value) for value in layer_state.values()):
            yield next((name, value) for name, value in layer_state.items() if not is_readable(value))
            return
        for name, value in _merged_state(layer, layer_state).items():
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

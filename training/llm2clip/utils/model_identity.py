"""The identity of a model of any library: its commit on the Hub, and a checksum of its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers.utils import CONFIG_NAME

from modeling_llm2clip.identity_llm2clip import RULE, digest_weight


def hub_commit(name: str, revision: str | None = None) -> str | None:
    """Return the commit of a model on the Hub, from its config, which is downloaded; None for a local folder."""
    if Path(name).is_dir():
        return None
    # The folder of a download is named after its commit.
    return Path(hf_hub_download(name, CONFIG_NAME, revision=revision)).parent.name


def weights_checksum(model: nn.Module) -> str:
    """Hash every weight of a model, rounded to bfloat16, so that a model and its copy in bfloat16 are equal.

    Returns:
        `2-` and 32 hexadecimal digits.

    Raises:
        ValueError: A weight is offloaded or quantised.
    """
    digests = {}
    for name, weight in sorted(model.state_dict().items()):
        if weight.is_meta or type(weight.data) is not Tensor:
            raise ValueError(
                f"{name} cannot be read to identify the model: it is offloaded or quantised. Load it whole, onto one "
                "device and in float32 or bfloat16."
            )
        if weight.is_floating_point():
            digests[name] = digest_weight(weight)
        else:
            content = weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digests[name] = hashlib.sha256(f"{tuple(weight.shape)}".encode() + content).hexdigest()[:32]
    return RULE + hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:32]

"""The weights of two models on a line: both are loaded, compared, and mixed (WiSE-FT, arXiv 2109.01903)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, AutoTokenizer, PretrainedConfig

from llm2clip.hub.cards.facts import JOINT_TASK, TEXT_TASK
from llm2clip.utils.repos import Repo, RepoKind
from llm2clip.utils.text_identity import read_fingerprint, tokenizer_fingerprint
from llm2clip.utils.towers import open_text_tower
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPTextModel
from modeling_llm2clip.identity_llm2clip import FIELDS, OPTIONAL_FIELDS, decoder_identity
from modeling_llm2clip.modeling_llm2clip_vision import load_vision_tower

logger = logging.getLogger(__name__)

MAX_NAMED = 4
HEAD_FIELDS = (
    "projection_dim", "visual_projection", "visual_projection_bias", "adapter_num_layers", "adapter_expansion",
    "adapter_normalize", "vision_pooling", "standardize_vision", "center_text", "visual_head", "visual_head_expansion",
    "text_head",
)  # fmt: skip
# Fields of the config of a vision tower that are about the heads of its model.
TOWER_HEAD_FIELDS = ("projection_dim", "logit_scale_init_value")
# Beginnings of the names of weights.
TRUNK = "vision_model."
HEADS = ("visual_standardization.", "visual_projection.", "text_adapter.", "logit_scale", "logit_bias")


@dataclass
class Mixture:
    """The model B, some of whose weights [`mix`] replaces by those between A and B.

    Args:
        model: B as it was loaded: a joint model, or a text tower. Its weights get a dtype that holds both models.
        processor: Its processor or tokenizer.
        task: Pipeline tag of its card.
        names: Those of A and B.
        first, second: The weights of A and B that are mixed, by their names in B; the other weights stay those of B.

    Raises:
        ValueError: Names or shapes of weights differ.
    """

    model: Any
    processor: Any
    task: str
    names: tuple[str, str]
    first: dict[str, Tensor]
    second: dict[str, Tensor]

    def __post_init__(self) -> None:
        shapes = [{name: tuple(weight.shape) for name, weight in side.items()} for side in (self.first, self.second)]
        _refuse_differences("weights", self.names, *shapes)
        holders = {**dict(self.model.named_buffers()), **dict(self.model.named_parameters(remove_duplicate=False))}
        for name, weight in self.second.items():
            # Wide enough for both, so that the ends of the line are A and B.
            holders[name].data = holders[name].data.to(torch.promote_types(self.first[name].dtype, weight.dtype))
        self.second = {name: weight.clone() for name, weight in self.second.items()}

    def mix(self, alpha: float) -> None:
        """Give the model `(1 - alpha) * A + alpha * B`, computed in float64 and rounded once."""
        weights = self.model.state_dict()
        for name, first in self.first.items():
            weights[name].copy_(interpolated(first, self.second[name], alpha))


def interpolated(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """Compute `(1 - alpha) * first + alpha * second` in float64; at 0 and 1 it is one of the two, bit for bit."""
    if alpha in (0, 1):
        return second if alpha else first
    return (1 - alpha) * first.double() + alpha * second.double()


def mix_text_towers(first: Repo, second: Repo) -> Mixture:
    """Load two text towers, or a plain LLM and a text tower that was trained from it.

    Raises:
        ValueError: Their decoders, prompts, pooling or tokenizers differ.
    """
    names = first.name, second.name
    plain = RepoKind.OTHER, RepoKind.EMBEDDING_MODEL
    first.require(RepoKind.TEXT_TOWER, RepoKind.ADAPTER, *plain, hint=f"{second.name} is a text tower.")
    tower, tokenizer = open_text_tower(second.name, revision=second.revision)
    if first.kind in plain:
        types = {"model_type": first.model_type}, {"model_type": tower.config.decoder_config.model_type}
        _refuse_differences("settings", names, *types)
    options: dict[str, Any] = {"revision": first.revision, "dtype": "auto", "default_config": tower.config}
    other = LLM2CLIPTextModel.from_pretrained(first.name, **options)
    other.merge_adapter()
    decoders = other.config.decoder_config, tower.config.decoder_config
    settings = _architectures(*decoders, bidirectional=tower.config.bidirectional)
    for config, fields in zip((other.config, tower.config), settings, strict=True):
        fields |= {name: getattr(config, name) for name in (*FIELDS, *OPTIONAL_FIELDS)}
    if first.kind is RepoKind.TEXT_TOWER:
        tokenizers = AutoTokenizer.from_pretrained(first.name, revision=first.revision), tokenizer
        for fingerprint, fields in zip(map(tokenizer_fingerprint, tokenizers), settings, strict=True):
            fields["tokenizer"] = fingerprint
    _refuse_differences("settings", names, *settings)
    return Mixture(tower.eval(), tokenizer, TEXT_TASK, names, _weights(other), _weights(tower))


def mix_vision(first: Repo, second: Repo, with_llm: bool) -> Mixture:
    """Load a vision tower, or a model that has one, and an LLM2CLIP model whose projection and adapter stay.

    Raises:
        ValueError: The vision towers differ.
    """
    names = first.name, second.name
    first.require(*(RepoKind.JOINT, RepoKind.VISION_HALF, RepoKind.OTHER), hint=f"{second.name} is an LLM2CLIP model.")
    model, processor = _load_joint(second, with_llm)
    tower = load_vision_tower(first.name, {"revision": first.revision, "dtype": "auto"})
    _refuse_differences("vision towers", names, *_architectures(tower.config, model.config.vision_config))
    first_weights = {f"{TRUNK}{name}": weight for name, weight in _weights(tower).items()}
    return Mixture(model, processor, JOINT_TASK, names, first_weights, _weights(model, TRUNK))


def mix_joint(first: Repo, second: Repo, with_llm: bool) -> Mixture:
    """Load two LLM2CLIP models, all of whose weights are mixed except those of their LLM.

    Raises:
        ValueError: Their vision towers, heads or LLMs differ.
    """
    names = first.name, second.name
    model, processor = _load_joint(second, with_llm)
    other = LLM2CLIPModel.from_pretrained(first.name, text_model=False, revision=first.revision, dtype="auto")
    configs: Any = other.config, model.config
    _refuse_differences("vision towers", names, *_architectures(*(config.vision_config for config in configs)))
    heads = [{name: getattr(config, name) for name in HEAD_FIELDS} for config in configs]
    for fields, side in zip(heads, (other, model), strict=True):
        fields["loss"] = "softmax" if side.logit_bias is None else "sigmoid"
    llms: list[str | None] = [config.text_model_fingerprint for config in configs]
    if None in llms or llms[0] != llms[1]:
        # Of the same LLM, a model may have recorded none, or that of an adapter merged in another dtype.
        llms = [_read_fingerprint(repo, config) for repo, config in zip((first, second), configs, strict=True)]
    try:
        _refuse_differences("heads", names, *heads)
        _refuse_differences("LLMs", names, *({"fingerprint": llm} for llm in llms))
    except ValueError as error:
        raise ValueError(f"{error} With --parts vision only the vision towers are merged.") from error
    parts = _weights(other, TRUNK, *HEADS), _weights(model, TRUNK, *HEADS)
    return Mixture(model, processor, JOINT_TASK, names, *parts)


def _weights(model: nn.Module, *beginnings: str) -> dict[str, Tensor]:
    """The floating-point weights of a model whose names have one of the beginnings, or all."""
    state = model.state_dict()
    return {key: x for key, x in state.items() if x.is_floating_point() and key.startswith(beginnings or "")}


def _refuse_differences(
    what: str, names: tuple[str, str], first: Mapping[str, Any], second: Mapping[str, Any]
) -> None:
    """Raise ValueError if two mappings differ; the message names both sides and their values."""
    differing = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    if differing:
        shown = "; ".join(f"{name}: {first.get(name)} and {second.get(name)}" for name in differing[:MAX_NAMED])
        more = f"; and {len(differing) - MAX_NAMED} more" if len(differing) > MAX_NAMED else ""
        raise ValueError(f"{names[0]} and {names[1]} cannot be merged: their {what} differ ({shown}{more}).")


def _architectures(*configs: PretrainedConfig, bidirectional: bool | None = False) -> list[dict[str, Any]]:
    """Of two towers, the settings that change their states and that differ."""
    identities = [decoder_identity(config, bidirectional) for config in configs]
    names = [name for name in {**identities[0], **identities[1]} if name not in TOWER_HEAD_FIELDS]
    differing = [name for name in names if identities[0].get(name) != identities[1].get(name)]
    # An identity leaves out defaults, and the config shows them, unless it has another name for the setting.
    shown = [{name: getattr(config, name, None) for name in differing} for config in configs]
    return [
        {name: fields[name] if shown[0][name] != shown[1][name] else identity.get(name) for name in differing}
        for fields, identity in zip(shown, identities, strict=True)
    ]


def _load_joint(repo: Repo, with_llm: bool) -> tuple[LLM2CLIPModel, Any]:
    """Load a joint model: with its LLM if it is stored in the model, since the result then stores it too."""
    bundled = repo.config.get("text_model_name_or_path") is None
    options: dict[str, Any] = {"text_model": bundled or with_llm, "dtype": "auto"}
    model = LLM2CLIPModel.from_pretrained(repo.name, revision=repo.revision, **options)
    return model.eval(), AutoProcessor.from_pretrained(repo.name, revision=repo.revision)


def _read_fingerprint(repo: Repo, config: LLM2CLIPConfig) -> str | None:
    elsewhere = repo.config.get("text_model_name_or_path")
    revision: Any = repo.revision if elsewhere is None else repo.config.get("text_model_revision")
    try:
        return read_fingerprint(elsewhere or repo.name, revision, config.text_config)
    except OSError as error:
        logger.warning("the LLM of %s cannot be read to compare it: %s", repo.name, error)
        return config.text_model_fingerprint

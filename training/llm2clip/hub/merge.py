"""`llm2clip merge`: the weights between two models, (1 - alpha) * A + alpha * B (WiSE-FT, arXiv 2109.01903)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoProcessor, AutoTokenizer

from llm2clip.command_line.settings import build_config, setting
from llm2clip.files.folders import atomic_folder, refuse_existing, refuse_nested
from llm2clip.files.manifests import refuse_damaged
from llm2clip.hub.cards.card import as_list, read_card, write_card
from llm2clip.hub.cards.facts import JOINT_TASK, TEXT_TASK, CardFacts, public_name, summary
from llm2clip.hub.licenses import bases_of, strictest
from llm2clip.hub.source_model import SourceModel
from llm2clip.models.identity import text_tower_fingerprint, tokenizer_fingerprint
from llm2clip.models.new_model import load_vision_tower
from llm2clip.models.plain_models import load_as_tower
from llm2clip.models.repos import LLM, Repo, RepoKind, hub_ids, inspect_repo, referred_folders
from llm2clip.models.towers import open_text_tower
from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.identity_llm2clip import FIELDS, OPTIONAL_FIELDS

MAX_NAMED = 4
TRUNK, HEADS = "vision_model.", ("visual_standardization.", "visual_projection.", "text_adapter.", "logit_")
HEAD_FIELDS = (
    "projection_dim", "visual_projection", "visual_projection_bias", "adapter_num_layers", "adapter_expansion",
    "adapter_normalize", "vision_pooling", "vision_layers", "standardize_vision", "center_text", "visual_head",
    "visual_head_expansion", "text_head",
)  # fmt: skip
# Fields of towers; what else differs is seen in their weights.
TOWER_FIELDS = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "image_size", "patch_size")


@dataclass
class MergeConfig:
    """Settings of `llm2clip merge`."""

    first: str = setting(
        "",
        "Model A: an LLM2CLIP model or a vision tower if B is an LLM2CLIP model; a text tower or its LLM if B is one.",
    )
    second: str = setting("", "Model B: an LLM2CLIP model, or a text tower. The result has its processor.")
    destination: str = setting("", "Folder to write.")
    alpha: float = setting(0.5, "Share of B, from 0 (A) to 1 (B).")
    first_revision: str | None = setting(None, "Branch, tag or commit of A on the Hub.")
    second_revision: str | None = setting(None, "Branch, tag or commit of B on the Hub.")
    name: str | None = setting(None, "Title of the card. Default: name of the folder.")
    overwrite: bool = setting(False, "Replace a destination that an earlier merge wrote and that holds nothing else.")

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is {self.alpha}, but the share of B has to be from 0 (A) to 1 (B).")


def merge_models(
    first: str | Path, second: str | Path, destination: str | Path, alpha: float = 0.5, **settings: Any
) -> dict[str, Any]:
    """Write the model whose weights are `(1 - alpha) * A + alpha * B`, of two LLM2CLIP models or two text towers.

    Args:
        first: A: an LLM2CLIP model, or a vision tower, of which only the vision tower is merged; or a text tower, or
            the plain LLM that one was trained from. A Hub id or folder.
        second: B, an LLM2CLIP model or a text tower, with equal architecture and LLM.
        destination: Folder to write.
        alpha: Share of B, from 0 to 1.
        settings: Other fields of [`MergeConfig`].

    Returns:
        `written`, the destination; `alpha`.

    Raises:
        FileExistsError: The destination exists and `overwrite` is off, or it holds what a merge did not write.
        ValueError: A setting is wrong, or the models do not fit; the message names both.
    """
    fields = {"first": first, "second": second, "destination": destination, "alpha": alpha, **settings}
    return run(build_config(MergeConfig, fields, "MergeConfig"))


def run(config: MergeConfig) -> dict[str, Any]:
    """Run `llm2clip merge`; see [`merge_models`]."""
    if not config.first or not config.second or not config.destination:
        raise ValueError("give two models and a destination: llm2clip merge A B DESTINATION")
    destination = Path(config.destination)
    for source in (config.first, config.second):
        refuse_damaged(source)
        for needed in (Path(source), *referred_folders(source)):
            refuse_nested(needed, destination)
    refuse_existing(destination, "merge", config.overwrite)
    second = inspect_repo(config.second, config.second_revision).require(
        RepoKind.JOINT, RepoKind.TEXT_TOWER, hint="B gives the result its projection, adapter and processor."
    )
    first = inspect_repo(config.first, config.first_revision)
    merged, weights = _load(first, second)
    interpolate(merged.model, weights, config.alpha)
    with atomic_folder(destination, "merge", config.overwrite) as folder:
        merged.save(folder)
        _write_card(config, merged, folder, first.kind is RepoKind.JOINT)
    return {"written": str(destination), "alpha": config.alpha}


def interpolate(model: nn.Module, first: Mapping[str, Tensor], alpha: float) -> None:
    """Set the weights of a model that `first` has too to `(1 - alpha) * first + alpha * weight`.

    They are computed in float64 and rounded once, to a dtype that holds both; at 0 and 1 they are one of the two, bit
    for bit.
    """
    for name, holder in [*model.named_parameters(), *model.named_buffers()]:
        if (other := first.get(name)) is not None:
            dtype = torch.promote_types(other.dtype, holder.dtype)
            ends = {0: other, 1: holder.data}
            mixed = ends[int(alpha)] if alpha in ends else (1 - alpha) * other.double() + alpha * holder.data.double()
            holder.data = mixed.to(dtype)


def _load(first: Repo, second: Repo) -> tuple[SourceModel, dict[str, Tensor]]:
    """Load B, and the weights of A that are merged with its own, by their names in B.

    Raises:
        ValueError: Architectures, settings, LLMs or tokenizers differ.
    """
    load = _load_text_towers if second.kind is RepoKind.TEXT_TOWER else _load_joint_models
    merged, parts, other, settings = load(first, second)
    for what, fields in settings.items():
        require_equal(what, (first.name, second.name), *fields)
    weights, own = (
        {key: x for key, x in model.state_dict().items() if x.is_floating_point() and key.startswith(parts)}
        for model in (other, merged.model)
    )
    shapes = ({key: tuple(x.shape) for key, x in side.items()} for side in (weights, own))
    require_equal("weights", (first.name, second.name), *shapes)
    return merged, weights


# B; the beginnings of the names of weights that are merged; A with these weights; and what has to be equal.
Loaded = tuple[SourceModel, tuple[str, ...], nn.Module, dict[str, list[dict[str, Any]]]]


def _load_text_towers(first: Repo, second: Repo) -> Loaded:
    plain = RepoKind.OTHER, RepoKind.EMBEDDING_MODEL
    first.require(RepoKind.TEXT_TOWER, *plain, hint=f"{second.name} is a text tower.")
    tower, tokenizer = open_text_tower(second.name, revision=second.revision)
    if first.kind in plain:
        types = {"model_type": first.model_type}, {"model_type": tower.config.decoder_config.model_type}
        require_equal("settings", (first.name, second.name), *types)
    other = load_as_tower(first.name, tower.config, first.revision)
    settings = [
        _form(config.decoder_config) | {name: getattr(config, name) for name in (*FIELDS, *OPTIONAL_FIELDS)}
        for config in (other.config, tower.config)
    ]
    if first.kind is RepoKind.TEXT_TOWER:
        own = AutoTokenizer.from_pretrained(first.name, revision=first.revision)
        for fields, each in zip(settings, (own, tokenizer), strict=True):
            fields["tokenizer"] = tokenizer_fingerprint(each)
    return SourceModel(tower.eval(), tokenizer, TEXT_TASK, False), ("",), other, {"settings": settings}


def _load_joint_models(first: Repo, second: Repo) -> Loaded:
    """B is loaded with its LLM if that is in the model, since the result then has it too."""
    first.require(RepoKind.JOINT, RepoKind.VISION_HALF, RepoKind.OTHER, hint=f"{second.name} is an LLM2CLIP model.")
    options: dict[str, Any] = {"revision": second.revision, "text_model": second.config.get(LLM) is None}
    model = LLM2CLIPModel.from_pretrained(second.name, dtype="auto", **options).eval()
    processor = AutoProcessor.from_pretrained(second.name, revision=second.revision)
    merged = SourceModel(model, processor, JOINT_TASK, False)
    if first.kind is not RepoKind.JOINT:
        tower = load_vision_tower(first.name, {"revision": first.revision, "dtype": "auto"})
        settings = {"vision towers": [_form(x) for x in (tower.config, model.config.vision_config)]}
        return merged, (TRUNK,), nn.ModuleDict({TRUNK.rstrip("."): tower}), settings
    other = LLM2CLIPModel.from_pretrained(first.name, text_model=False, revision=first.revision, dtype="auto")
    configs: Any = other.config, model.config
    heads = [{name: getattr(config, name) for name in HEAD_FIELDS} for config in configs]
    for fields, side in zip(heads, (other, model), strict=True):
        fields["loss"] = "softmax" if side.logit_bias is None else "sigmoid"
    llms = [config.text_model_fingerprint for config in configs]
    if None in llms:
        # A model of a plain LLM may have recorded none.
        llms = [_llm_fingerprint(repo, config) for repo, config in zip((first, second), configs, strict=True)]
    return (
        merged,
        (TRUNK, *HEADS),
        other,
        {
            "vision towers": [_form(config.vision_config) for config in configs],
            "heads": heads,
            "LLMs": [{"fingerprint": llm} for llm in llms],
        },
    )


def _llm_fingerprint(repo: Repo, config: Any) -> str | None:
    elsewhere = repo.config.get(LLM)
    revision: Any = repo.revision if elsewhere is None else repo.config.get("text_model_revision")
    return text_tower_fingerprint(elsewhere or repo.name, revision, config.text_config)


def _form(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name, None) for name in TOWER_FIELDS}


def require_equal(what: str, names: tuple[str, str], first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Raise a `ValueError` if two mappings differ; the message names both models and the values."""
    differing = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    if differing:
        shown = "; ".join(f"{name}: {first.get(name)} and {second.get(name)}" for name in differing[:MAX_NAMED])
        raise ValueError(f"{names[0]} and {names[1]} cannot be merged: their {what} differ ({shown}).")


def _write_card(config: MergeConfig, merged: SourceModel, folder: Path, is_whole: bool) -> None:
    """Write card and license; parents that ask for different licenses leave it to whoever builds the folder."""
    sources = config.first, config.second
    cards = [read_card(Path(name))[0] for name in sources]
    license, alpha = strictest(bases_of(folder, sources)), config.alpha
    words = (
        f"Merged, not trained: the weights are {1 - alpha:g} × A + {alpha:g} × B (WiSE-FT, arXiv 2109.01903), where A "
        f"is {public_name(config.first)} and B is {public_name(config.second)}."
    )
    if merged.task == JOINT_TASK:
        words += " Both have the same LLM." if is_whole else " Beside the vision tower, everything is that of B."
    facts = CardFacts(
        name=config.name or Path(config.destination).name,
        task=merged.task,
        repo=config.destination,
        summary=summary(merged.model, merged.processor),
        base_models=hub_ids(*sources),
        datasets=list(dict.fromkeys(value for card in cards for value in as_list(card.get("datasets")))),
        languages=list(dict.fromkeys(value for card in cards for value in as_list(card.get("language")))),
        merged=words,
        **license.facts(),
    )
    write_card(folder, facts)
    license.write_files(folder, folder)

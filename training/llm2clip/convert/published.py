"""The models in `hub_configs/`: their configs, and the front matter of their cards."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from llm2clip.utils.files import read_json
from llm2clip.utils.yaml_text import load_yaml
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPTextConfig, LLM2CLIPTextModel

FOLDER = Path(str(files("llm2clip.hub_configs"))).resolve()


@dataclass(frozen=True)
class Published:
    """A folder of `hub_configs/`: its name, config.json, and the front matter of its model card."""

    name: str
    config: Any
    card: dict[str, Any]

    @property
    def is_joint(self) -> bool:
        """Whether this is a joint model; otherwise it is an LLM."""
        return self.config.model_type == LLM2CLIPConfig.model_type

    def build(self) -> LLM2CLIPModel | LLM2CLIPTextModel:
        """Instantiate the model on the meta device, without an external LLM."""
        with torch.device("meta"):
            return LLM2CLIPModel(self.config) if self.is_joint else LLM2CLIPTextModel(self.config)


@functools.cache
def published_models() -> dict[str, Published]:
    """Read every folder of `hub_configs/`, by name."""
    models = {}
    for path in sorted(FOLDER.glob("*/config.json")):
        fields = read_json(path)
        joint = fields["model_type"] == LLM2CLIPConfig.model_type
        config = (LLM2CLIPConfig if joint else LLM2CLIPTextConfig).from_dict(fields)
        card = (path.parent / "README.md").read_text(encoding="utf-8").split("---\n")[1]
        models[path.parent.name] = Published(path.parent.name, config, load_yaml(card))
    return models


def published_like(vision: Mapping[str, Any], llm_width: int | None = None) -> LLM2CLIPConfig | None:
    """Return the published config whose vision tower has these fields, and whose LLM has this width."""
    for published in published_models().values():
        if published.is_joint and llm_width in (None, published.config.text_config.hidden_size):
            tower = published.config.vision_config
            if all(getattr(tower, name, None) == value for name, value in vision.items()):
                return published.config
    return None

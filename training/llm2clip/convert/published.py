"""The models in `hub_configs/`: their configs, and what `models.yaml` there says about them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from llm2clip.command_line.yaml_text import load_yaml
from llm2clip.files.atomic import read_json
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPTextConfig, LLM2CLIPTextModel

FOLDER = Path(str(files("llm2clip.hub_configs"))).resolve()


@dataclass(frozen=True)
class Published:
    """A folder of `hub_configs/`.

    Attributes:
        name: Name of the folder.
        config: Its `config.json`.
        license: License of the weights, by its id on the Hub.
        base: The vision tower or LLM that was trained: Hub id, and name of its file.
        checkpoint: Hub id of the published weights; None if there are none.
    """

    name: str
    config: Any
    license: str
    base: str
    checkpoint: str | None = None

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
    for name, about in load_yaml((FOLDER / "models.yaml").read_text(encoding="utf-8")).items():
        fields = read_json(FOLDER / name / "config.json")
        joint = fields["model_type"] == LLM2CLIPConfig.model_type
        models[name] = Published(name, (LLM2CLIPConfig if joint else LLM2CLIPTextConfig).from_dict(fields), **about)
    return models


def published_like(vision: Mapping[str, Any], llm_width: int | None = None) -> LLM2CLIPConfig | None:
    """Return the published config whose vision tower has these fields, and whose LLM has this width."""
    for published in published_models().values():
        if published.is_joint and llm_width in (None, published.config.text_config.hidden_size):
            tower = published.config.vision_config
            if all(getattr(tower, name, None) == value for name, value in vision.items()):
                return published.config
    return None

"""The models in `hub_configs/`: their configs, and the tables that are generated from them.

`python -m llm2clip.convert.published` rewrites the tables in `hub_configs/README.md` and `docs/models.md`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from llm2clip.utils.files import read_json, write_text
from llm2clip.utils.tables import markdown_table
from llm2clip.utils.yaml_text import load_yaml
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPTextConfig, LLM2CLIPTextModel

FOLDER = Path(str(files("llm2clip.hub_configs"))).resolve()
MARKS = ("<!-- checkpoints: made by python -m llm2clip.convert.published -->", "<!-- /checkpoints -->")


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


def joint_configs() -> dict[str, LLM2CLIPConfig]:
    """Configs of the joint models, by name."""
    return {name: model.config for name, model in published_models().items() if model.is_joint}


def parameters(module: nn.Module) -> int:
    """Count the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def joint_table() -> str:
    """A table of the joint models: parameters by part, sizes, LLM, license."""
    rows = []
    for name, published in published_models().items():
        if published.is_joint:
            config, model = published.config, cast(LLM2CLIPModel, published.build())
            parts = (model.vision_model, model.visual_projection, model.text_adapter, model)
            image = f"{config.vision_config.image_size} px, patch {config.vision_config.patch_size}"
            counts = [f"{parameters(part):,}" for part in parts]
            llm = (config.text_model_name_or_path, config.text_config.hidden_size)
            rows.append((f"[{name}]({name})", image, *counts, config.projection_dim, *llm, published.card["license"]))
    return _table(
        "model | image | tower | projection | adapter | total | shared width | LLM | LLM width | license", rows
    )


def text_table() -> str:
    """A table of the text towers."""
    rows = []
    for name, published in published_models().items():
        if not published.is_joint:
            config, count = published.config, f"{parameters(published.build()):,}"
            prompt = (
                f"`{config.prompt_prefix!r}` caption `{config.prompt_suffix!r}`" if config.prompt_suffix else "none"
            )
            sizes = (count, config.hidden_size, config.decoder_config.num_hidden_layers)
            rows.append((f"[{name}]({name})", *sizes, prompt, published.card["license"]))
    return _table("model | parameters | width | layers | prompt | license", rows)


def command_table() -> str:
    """A table of the published checkpoints: conversion command, requirements and result."""
    rows = []
    for name, published in published_models().items():
        card = published.card
        if source := card.get("original_checkpoint"):
            rows.append((f"`llm2clip convert {source} {name}`", card["needs"], card["gives"]))
    return _table("command | needs | gives", rows)


def _table(header: str, rows: Sequence[Sequence[object]]) -> str:
    columns = header.split(" | ")
    return markdown_table(columns, rows, range(len(columns)))


def with_table(text: str, table: str) -> str:
    """Replace the table between the marks of a document."""
    start, end = MARKS
    return re.sub(f"{re.escape(start)}.*{re.escape(end)}", lambda _: f"{start}\n{table}\n{end}", text, flags=re.DOTALL)


def documents() -> dict[Path, str]:
    """The documents with tables, and their up-to-date content."""
    overview, page = FOLDER / "README.md", FOLDER.parent / "docs" / "models.md"
    tables = {overview: f"{joint_table()}\n\n{text_table()}", page: command_table()}
    return {path: with_table(path.read_text(encoding="utf-8"), table) for path, table in tables.items()}


def main() -> None:
    for path, text in documents().items():
        write_text(path, text)
        print(path)


if __name__ == "__main__":
    main()

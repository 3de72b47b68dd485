"""Write the tables of the published models, in hub_configs/README.md and docs/models.md.

python docs/make_checkpoints.py
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from llm2clip.convert.published import FOLDER, Published, published_models
from llm2clip.utils.tables import markdown_table
from modeling_llm2clip import LLM2CLIPModel

TABLE = re.compile(
    r"(?<=<!-- checkpoints: made by docs/make_checkpoints\.py -->\n).*?(?=<!-- /checkpoints -->)", re.DOTALL
)


SETS = "Flickr30k | COCO | ShareGPT4V-1k | Urban-1k | DOCCI"


def joint_table() -> str:
    """A table of the joint models: vision tower, parameters by part, sizes, LLM, license."""
    rows = []
    for published in published_models().values():
        if published.is_joint:
            config, model = published.config, cast(LLM2CLIPModel, published.build())
            parts = (model.vision_model, model.visual_projection, model.text_adapter, model)
            image = f"{config.vision_config.image_size} px, patch {config.vision_config.patch_size}"
            counts = [f"{sum(weight.numel() for weight in part.parameters()):,}" for part in parts]
            llm = (config.text_model_name_or_path, config.text_config.hidden_size)
            sizes = (*counts, config.projection_dim, *llm)
            rows.append((_link(published), published.base, image, *sizes, published.license))
    return _table(
        "model | base | image | tower | projection | adapter | total | shared width | LLM | LLM width | license",
        rows,
    )


def text_table() -> str:
    """A table of the text towers."""
    rows = []
    for published in published_models().values():
        if not published.is_joint:
            config, count = published.config, f"{published.build().num_parameters():,}"
            prompt = (
                f"`{config.prompt_prefix!r}` caption `{config.prompt_suffix!r}`" if config.prompt_suffix else "none"
            )
            sizes = (count, config.hidden_size, config.decoder_config.num_hidden_layers)
            rows.append((_link(published), published.base, *sizes, prompt, published.license))
    return _table("model | base | parameters | width | layers | prompt | license", rows)


def score_table() -> str:
    """A table of the paper's scores."""
    rows = [(_link(found), found.table, *found.scores) for found in published_models().values() if found.scores]
    return _table(f"model | table | {SETS}", rows)


def use_table() -> str:
    """A table of the configs without published weights: what they are for."""
    rows = [(_link(found), found.use) for found in published_models().values() if found.checkpoint is None]
    return _table("config without a published checkpoint | for", rows)


def command_table() -> str:
    """A table of the published checkpoints: conversion command, requirements and result."""
    rows = []
    for name, published in published_models().items():
        if published.checkpoint is not None:
            gives = "a caption encoder: `LLM2CLIPTextModel` and its tokenizer"
            if published.is_joint:
                llm = published.config.text_model_name_or_path.rpartition("/")[2]
                gives = f"`LLM2CLIPModel`, which reads captions with {llm}"
            rows.append((f"`llm2clip convert {published.checkpoint} {name}`", published.needs, gives))
    return _table("command | needs | gives", rows)


def _link(published: Published) -> str:
    return f"[{published.name}]({published.name}/config.json)"


def _table(header: str, rows: Sequence[Sequence[object]]) -> str:
    columns = header.split(" | ")
    return markdown_table(columns, rows, range(len(columns)))


def documents() -> dict[Path, str]:
    """The documents with tables, and their up-to-date content."""
    tables = {
        FOLDER / "README.md": "\n\n".join((joint_table(), text_table(), score_table(), use_table())),
        Path(__file__).with_name("models.md"): command_table(),
    }
    return {
        path: TABLE.sub(lambda _, table=table: f"{table}\n", path.read_text(encoding="utf-8"))  # type: ignore[misc]
        for path, table in tables.items()
    }


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text, encoding="utf-8")

"""Packaged recipes: YAML files of a stage's settings."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of a recipe that comes with this package.

    Raises:
        FileNotFoundError: There is neither; the message lists the packaged recipes.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder = Path(str(resources.files("llm2clip.recipes")))
    packaged = folder / f"{path.stem}.yaml"
    if path.parent == Path() and packaged.is_file():
        return packaged
    known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise FileNotFoundError(
        f"the recipe {name} does not exist; give a YAML file, or one of the packaged recipes: {known}."
    )


def load_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe.

    Raises:
        ValueError: The file is no YAML mapping.
    """
    try:
        fields = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} has to hold `field: value` lines, but it holds {type(fields).__name__}.")
    return fields

"""Recipes: YAML files with the settings of a command, some of which are part of this package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from llm2clip.utils.yaml_text import MAX_CHARACTERS, key_lines, load_yaml


def find_recipe(name: str) -> Path:
    """Find the file of a recipe.

    Args:
        name: Path of a YAML file, or name of a packaged recipe.

    Raises:
        FileNotFoundError: There is no such recipe; the message lists the packaged ones.
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
        f"the recipe {name} does not exist; give the path of a YAML file or one of the packaged recipes: {known}."
    )


def load_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe.

    Raises:
        ValueError: The file is not a YAML mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            fields = load_yaml(file.read(MAX_CHARACTERS + 1), unique_keys=True)
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} has to be a mapping of `field: value` lines, but is a {type(fields).__name__}.")
    return fields


def field_places(path: Path) -> dict[str, str]:
    """The file and line of each field of a recipe that [`load_recipe`] has read, for error messages."""
    return {name: f"{path} (line {line})" for name, line in key_lines(path.read_text(encoding="utf-8")).items()}

"""The demo as a Space: a folder that runs on the Hub as it is."""

from __future__ import annotations

import shutil
from importlib import resources
from pathlib import Path

from transformers import AutoConfig

from llm2clip.utils.files import atomic_folder
from llm2clip.utils.repos import RepoKind, inspect_repo

FILES = ("README.md", "requirements.txt", "app.py")
PACKAGES = ("modeling_llm2clip", "llm2clip")
DATA = ("__init__.py", "README.md", "concepts/test.parquet")


def write_space(destination: Path, model: str, overwrite: bool = False) -> None:
    """Write a Space: its card and entry, this package, the bundled images, and the model if that is a local folder.

    Args:
        destination: The folder.
        model: Hub id, or a folder, which is copied.
        overwrite: Replace a Space that exists.

    Raises:
        FileExistsError: The destination exists.
        ValueError: The model is a folder of something else than an LLM2CLIP model, or its LLM lies in another folder.
    """
    bundled = Path(model).is_dir()
    if bundled:
        inspect_repo(model).require(RepoKind.JOINT)
        _refuse_divided_model(model)
    with atomic_folder(destination, overwrite, marks=("app.py",)) as folder:
        for name in FILES:
            template = _packaged("llm2clip.hub_configs") / "space" / name
            text = template.read_text(encoding="utf-8").replace("{model}", "model" if bundled else model)
            (folder / name).write_text(text, encoding="utf-8")
        skipped = shutil.ignore_patterns("__pycache__", "hub_configs", "example_data")
        for package in PACKAGES:
            shutil.copytree(_packaged(package), folder / package, ignore=skipped)
        for name in DATA:
            target = folder / "llm2clip" / "example_data" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_packaged("llm2clip.example_data") / name, target)
        if bundled:
            shutil.copytree(model, folder / "model", ignore=shutil.ignore_patterns("checkpoint-*"))


def _refuse_divided_model(model: str) -> None:
    llm = AutoConfig.from_pretrained(model).text_model_name_or_path
    if llm is not None and Path(llm).is_dir():
        raise ValueError(
            f"the LLM of {model} lies in another folder ({llm}), which a Space would not have; save the model with "
            "its LLM inside, or push both to the Hub and give the model's Hub id."
        )


def _packaged(package: str) -> Path:
    return Path(str(resources.files(package))).resolve()

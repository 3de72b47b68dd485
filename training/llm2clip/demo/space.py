"""Writing the demo as a Space: a folder that runs on the Hub without changes."""

from __future__ import annotations

import logging
import shutil
from importlib import resources
from pathlib import Path

from llm2clip.command_line.logs import shortened
from llm2clip.files.atomic import write_text
from llm2clip.files.bundled import bundled_data
from llm2clip.files.folders import atomic_folder, refuse_nested
from llm2clip.files.manifests import refuse_damaged
from llm2clip.hub.upload_files import model_files
from llm2clip.models.repos import RepoKind, inspect_repo, needed_llm

logger = logging.getLogger(__name__)

FILES = ("README.md", "requirements.txt", "app.py")
PACKAGES = ("modeling_llm2clip", "llm2clip")
WHOLE_MODEL = "The demo needs a whole model with its LLM; `llm2clip convert` converts checkpoints of other code."
DATA = ("README.md", "concepts/test.parquet")


def write_space(destination: Path, model: str, overwrite: bool = False) -> None:
    """Write a Space: its card and entry point, the two packages, the bundled images, and a local model.

    Args:
        destination: The folder.
        model: Hub id, or a folder, of which the files of the model are copied.

    Raises:
        FileExistsError: The destination exists, and `overwrite` is off or it holds what this function did not write.
        FileNotFoundError: This is a wheel, which has no bundled images.
        ValueError: The folder does not contain an LLM2CLIP model, or its LLM is in another folder, or a file of it is
            damaged.
    """
    bundled = Path(model).is_dir()
    if bundled:
        refuse_damaged(model)
        llm = needed_llm(inspect_repo(model).require(RepoKind.JOINT, hint=WHOLE_MODEL))
        if llm and Path(llm).is_dir():
            raise ValueError(
                f"the LLM of {model} is in another folder ({llm}), which the Space would not contain; "
                "save the model with its LLM, or push both to the Hub and give the Hub id of the model."
            )
    data = {name: bundled_data(name, "copy a Space that a checkout wrote") for name in DATA}
    refuse_nested(model, destination)
    # As with a push: what lies beside the model may not be meant for the public.
    files = model_files(Path(model)) if bundled else None
    if files is not None and files.others:
        logger.warning("not copied, as no model needs them: %s", shortened(files.others))
    with atomic_folder(destination, "demo", overwrite) as folder:
        for name in FILES:
            template = _packaged("llm2clip.hub_configs") / "space" / name
            text = template.read_text(encoding="utf-8").replace("{model}", "model" if bundled else model)
            write_text(folder / name, text)
        skipped = shutil.ignore_patterns("__pycache__", "hub_configs", "example_data")
        for package in PACKAGES:
            shutil.copytree(_packaged(package), folder / package, ignore=skipped)
        for name in DATA:
            target = folder / "llm2clip" / "example_data" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data[name], target)
        for name, path in {} if files is None else files.uploaded.items():
            (folder / "model" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / "model" / name)


def _packaged(package: str) -> Path:
    return Path(str(resources.files(package))).resolve()

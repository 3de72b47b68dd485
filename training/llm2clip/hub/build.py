"""`llm2clip build`: write a self-contained folder for the Hub, which loads without this package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from llm2clip.command_line.settings import build_config, refuse
from llm2clip.data import decode_image
from llm2clip.files.atomic import write_json
from llm2clip.files.folders import atomic_folder, refuse_existing, refuse_nested
from llm2clip.files.manifests import QUERY_ENCODER, refuse_damaged
from llm2clip.hub.build_card import copy_curves, read_results, source_card, source_folder, write_built_card
from llm2clip.hub.build_config import BuildConfig
from llm2clip.hub.cards.card import LICENSE_FIELDS
from llm2clip.hub.cards.facts import EXAMPLE, Evaluation
from llm2clip.hub.licenses import bases_of, choose_license
from llm2clip.hub.source_model import SourceModel
from llm2clip.models.repos import OUR_MODELS, RepoKind, inspect_repo, referred_folders
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPTextConfig, LLM2CLIPTextModel


def build_folder(model: str | Path, destination: str | Path, **settings: Any) -> dict[str, Any]:
    """Write a self-contained folder for the Hub: weights, code, processor, card and license.

    A new process without this package loads the folder and compares its outputs before the folder appears.

    Args:
        model: Output folder of a stage, another saved model, or a Hub id.
        destination: Folder to write.
        settings: Other fields of [`BuildConfig`].

    Returns:
        `written`, the destination; `megabytes`; `difference`, the largest difference of an output in the new process.

    Raises:
        FileExistsError: The destination exists and `overwrite` is off, or it holds what a build did not write.
        RuntimeError: The folder does not load in the new process, or its outputs differ; nothing is written.
        ValueError: A setting is wrong, or `model` is not a model of this package, or is damaged; or the license is
            not one that the models that it was made from allow.
    """
    return run(build_config(BuildConfig, {"model": model, "destination": destination, **settings}, "BuildConfig"))


def run(config: BuildConfig, evaluations: list[Evaluation] | None = None) -> dict[str, Any]:
    """Run `llm2clip build`; see [`build_folder`]. `evaluations` is added to the results on the card."""
    if config.config_only:
        return count_parameters(config.model, config.revision)
    if not config.model or not config.destination:
        raise ValueError("give a model and a destination: llm2clip build MODEL DESTINATION")
    destination = Path(config.destination)
    refuse_nested(config.model, destination)
    refuse_existing(destination, "build", config.overwrite)
    results = [*(evaluations or []), *read_results([Path(path) for path in config.results])]
    refuse_damaged(config.model)
    repo = inspect_repo(config.model, config.revision).require(*OUR_MODELS)
    if repo.encoders:
        names = ["text_model", "bundle_text_model", "merge_adapter"]
        refuse(config, names, f"{config.model} takes llm_embeds alone")
    elif repo.kind is not RepoKind.JOINT:
        refuse(config, ["text_model", "bundle_text_model"], f"{config.model} is {repo.kind.with_article}")
        if not repo.is_adapter:
            refuse(config, ["merge_adapter"], f"{config.model} has no adapter")
    for needed in referred_folders(config.model):
        refuse_nested(needed, destination)
    llm = config.text_model or repo.config.get("text_model_name_or_path")
    if llm and config.text_model is None:
        refuse_damaged(llm)
    folder_of_source = source_folder(config)
    config, card = source_card(config, folder_of_source)
    bases = bases_of(folder_of_source, [*([llm] if llm else []), *config.base_models])
    given = {name: value for name in LICENSE_FIELDS if (value := getattr(config, name))}
    license = choose_license(given, card[0], bases)
    example = decode_image(path, path) if (path := config.example_image) is not None else None
    source = SourceModel.load(repo, config.text_model, config.bundle_text_model, config.merge_adapter)
    with atomic_folder(destination, "build", config.overwrite) as folder:
        source.save(folder)
        if (folder_of_source / QUERY_ENCODER).is_dir():
            shutil.copytree(folder_of_source / QUERY_ENCODER, folder / QUERY_ENCODER)
        difference = source.compare(folder, example, config.example_captions)
        if example is not None:
            example.save(folder / EXAMPLE)
        copy_curves(folder_of_source, folder)
        write_built_card(config, source, card, results, folder, license)
        if config.code_repo is not None:
            _refer_to_code(folder, config.code_repo)
        license.write_files(folder, folder_of_source)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"written": str(destination), "megabytes": round(size / 1e6, 1), "difference": f"{difference:.1e}"}


def count_parameters(model: str, revision: str | None) -> dict[str, Any]:
    """Instantiate a config without weights; returns the number of parameters of each part and of the whole."""
    repo = inspect_repo(model, revision).require(*OUR_MODELS)
    is_text = repo.kind is RepoKind.TEXT_TOWER
    classes: Any = (LLM2CLIPTextConfig, LLM2CLIPTextModel) if is_text else (LLM2CLIPConfig, LLM2CLIPModel)
    with torch.device("meta"):
        built: Any = classes[1](classes[0].from_dict(repo.config))
    parts = {**dict(built.named_children()), "parameters": built}
    return {name: sum(value.numel() for value in part.parameters()) for name, part in parts.items()}


def _refer_to_code(folder: Path, repo: str) -> None:
    """Remove the code from a folder and refer to the repo that contains it."""

    def refer(fields: dict[str, Any]) -> dict[str, Any]:
        if "auto_map" in fields:
            fields["auto_map"] = {name: f"{repo}--{target}" for name, target in fields["auto_map"].items()}
        if "impl" in fields:  # the class of a custom pipeline
            fields["impl"] = f"{repo}--{fields['impl']}"
        return fields

    for path in folder.glob("*config.json"):
        # Configs of parts are objects in it.
        write_json(path, json.loads(path.read_text(encoding="utf-8"), object_hook=refer))
    for path in folder.glob("*.py"):
        path.unlink()

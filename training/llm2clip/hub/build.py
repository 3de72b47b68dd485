"""`llm2clip build`: write a self-contained folder for the Hub, which loads without this package."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from llm2clip.data import decode_image
from llm2clip.hub.build_card import copy_curves, read_results, source_card, source_folder, write_built_card
from llm2clip.hub.cards.card import LICENSE_FIELDS
from llm2clip.hub.cards.facts import EXAMPLE, Evaluation
from llm2clip.hub.licenses import bases_of, license_model, write_license_files
from llm2clip.hub.source_model import SourceModel
from llm2clip.hub.upload_files import PICTURES, model_files
from llm2clip.utils.files import write_json
from llm2clip.utils.folders import atomic_folder, refuse_existing, refuse_nested
from llm2clip.utils.manifests import refuse_damaged, write_model_manifest
from llm2clip.utils.repos import OUR_MODELS, RepoKind, inspect_repo, is_hub_id, names_of, referred_folders
from llm2clip.utils.settings import build_config, setting
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPTextConfig, LLM2CLIPTextModel
from modeling_llm2clip.query_encoder_llm2clip import FOLDER as QUERY_ENCODER


@dataclass
class BuildConfig:
    """Settings of `llm2clip build`."""

    model: str = setting("", "Model to build from: output folder of a stage, another saved model, or a Hub id.")
    destination: str = setting("", "Folder to write; not used with --config-only.")
    revision: str | None = setting(None, "Branch, tag or commit of the model on the Hub.")
    bundle_text_model: bool | None = setting(
        None, "Store the LLM's weights in the folder. Default: only if the LLM is not on the Hub."
    )
    text_model: str | None = setting(
        None, "Hub id of the LLM, if it is or will be published separately; it is then not bundled."
    )
    merge_adapter: bool | None = setting(
        None, "Merge the LoRA adapter of a stage-1 model into its LLM (default), or keep it (false)."
    )
    code_repo: str | None = setting(
        None, "Hub id of a repo with the model code; the folder refers to it and contains no code."
    )
    name: str | None = setting(None, "Title of the card. Default: name of the folder.")
    repo_id: str | None = setting(
        None, "Hub id in the code examples of the card. Default: the folder; push replaces it."
    )
    license: str | None = setting(
        None,
        "License of the weights as the Hub spells it, such as apache-2.0; it has to keep those of the models that it "
        "was made from. Default: that on the card of the model, else the strictest of those.",
    )
    license_name: str | None = setting(None, "Name of the license, with --license other.")
    license_link: str | None = setting(None, "URL of the license, or its file in the folder, with --license other.")
    base_models: list[str] = setting(
        [], "Hub ids of the models that this one was trained from. Default: those that its card and config name."
    )
    datasets: list[str] = setting([], "Hub ids of the training data.")
    languages: list[str] = setting([], "ISO 639 codes of the caption languages.")
    results: list[str] = setting([], "Results for the card: JSON files of `llm2clip evaluate`.")
    example_image: str | None = setting(None, "Example image for the card.")
    example_captions: list[str] = setting([], "Captions for the card; the first one describes the example image.")
    config_only: bool = setting(False, "Write nothing; only count the parameters of the model's config.")
    overwrite: bool = setting(False, "Replace a destination that an earlier build wrote and that holds nothing else.")

    def __post_init__(self) -> None:
        if self.text_model is not None and self.bundle_text_model:
            raise ValueError(
                "text_model excludes the LLM from the folder, and bundle_text_model includes it; drop one."
            )
        for name in ("text_model", "code_repo", "repo_id"):
            value = getattr(self, name)
            if value is not None and not is_hub_id(value):
                raise ValueError(f"{name} {value!r} is not a Hub id (OWNER/NAME).")
        if not all(caption.strip() for caption in self.example_captions):
            raise ValueError(f"an example caption is empty: {self.example_captions}.")
        named = (self.license_name, self.license_link)
        if not all(named) if self.license == "other" else any(named):
            raise ValueError("license_name and license_link require license: other, which requires both.")
        for name in ("datasets", "base_models"):
            for value in getattr(self, name):
                try:
                    validate_repo_id(value)
                except HFValidationError as error:
                    raise ValueError(f"{name}: {error}") from error


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
    for needed in referred_folders(config.model):
        refuse_nested(needed, destination)
    llms = names_of(config.text_model or repo.config.get("text_model_name_or_path"))
    for llm in llms if config.text_model is None else ():
        refuse_damaged(llm)
    folder_of_source = source_folder(config)
    config, card = source_card(config, folder_of_source)
    bases = bases_of(folder_of_source, [*llms, *config.base_models])
    given = {name: value for name in LICENSE_FIELDS if (value := getattr(config, name))}
    license = license_model(given, card[0], bases)
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
        write_built_card(config, source, card, results, folder, license, bases)
        if config.code_repo is not None:
            _refer_to_code(folder, config.code_repo)
        write_license_files(folder, folder_of_source, license, bases)
        # Which pictures are uploaded depends on the card, which people edit.
        uploaded = model_files(folder).uploaded
        write_model_manifest(folder, [name for name in uploaded if Path(name).suffix.lower() not in PICTURES])
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

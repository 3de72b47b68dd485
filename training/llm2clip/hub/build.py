"""`llm2clip build`: a self-contained folder, ready for the Hub, that loads without this package."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PretrainedConfig

from llm2clip.data import DamagedImageError, decode_image
from llm2clip.hub.build_card import LICENCE, copy_curves, read_results, source_card, source_folder, write_built_card
from llm2clip.hub.cards import EXAMPLE, JOINT_TASK, TEXT_TASK, VISION_TASK, Evaluation, check_metadata
from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from llm2clip.hub.validation import CAPTIONS, compare_with_stranger, sample_llm_embeds, sample_picture
from llm2clip.utils.files import atomic_folder, refuse_existing, write_json, write_license
from llm2clip.utils.repos import hub_ids, is_hub_id
from llm2clip.utils.settings import build_config
from llm2clip.utils.towers import save_text_tower
from modeling_llm2clip import (
    LLM2CLIPConfig,
    LLM2CLIPModel,
    LLM2CLIPTextConfig,
    LLM2CLIPTextModel,
    LLM2CLIPVisionModelWithProjection,
)

logger = logging.getLogger(__name__)


@dataclass
class BuildConfig:
    """Settings of `llm2clip build`."""

    model: str = field(
        default="",
        metadata={"help": "Checkpoint of a stage, or another saved model or text tower: folder or Hub id."},
    )
    destination: str = field(default="", metadata={"help": "Folder to write; not needed with --config-only."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the model."})
    bundle_text_model: bool | None = field(
        default=None,
        metadata={"help": "Put the LLM's weights into the folder; unset: unless a Hub id says where they are."},
    )
    text_model: str | None = field(
        default=None,
        metadata={"help": "Hub id under which the LLM is, or will be; it is not bundled then."},
    )
    merge_adapter: bool | None = field(
        default=None,
        metadata={"help": "Merge a stage-1 LoRA adapter into its LLM (the default), or keep it: false."},
    )
    code_repo: str | None = field(
        default=None, metadata={"help": "Hub id of a repo that holds the code; the folder then has none of its own."}
    )
    name: str | None = field(default=None, metadata={"help": "Title of the card; unset: the folder's name."})
    repo_id: str | None = field(
        default=None, metadata={"help": "Hub id in the card's snippets; unset: the folder, until `llm2clip push`."}
    )
    license: str | None = field(default=None, metadata={"help": "Licence of the weights, in the Hub's spelling."})
    license_name: str | None = field(default=None, metadata={"help": "Name of the licence, with --license other."})
    license_link: str | None = field(
        default=None, metadata={"help": "Address of that licence, or its file in the folder."}
    )
    base_models: list[str] = field(default_factory=list, metadata={"help": "Hub ids of what the model was made of."})
    datasets: list[str] = field(default_factory=list, metadata={"help": "Hub ids of the training data."})
    languages: list[str] = field(default_factory=list, metadata={"help": "ISO codes of the captions' languages."})
    results: list[str] = field(
        default_factory=list, metadata={"help": "Results for the card: JSON files of `llm2clip evaluate --output`."}
    )
    example_image: str | None = field(default=None, metadata={"help": "A picture for the card."})
    example_captions: list[str] = field(
        default_factory=list, metadata={"help": "Captions for the card; the first is that of the picture."}
    )
    config_only: bool = field(default=False, metadata={"help": "Only instantiate the config and count parameters."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a destination that exists."})

    def __post_init__(self) -> None:
        if self.text_model is not None and self.bundle_text_model:
            raise ValueError("text_model says that the LLM is elsewhere, bundle_text_model that it is here; drop one.")
        for name in ("text_model", "code_repo", "repo_id"):
            value = getattr(self, name)
            if value is not None and not is_hub_id(value):
                raise ValueError(f"{name} {value!r} is no Hub id (OWNER/NAME).")
        if not all(caption.strip() for caption in self.example_captions):
            raise ValueError(f"an example caption is empty: {self.example_captions}.")
        if (self.license_name or self.license_link) and self.license != "other":
            raise ValueError("license_name and license_link go with license: other.")
        check_metadata(
            {
                **{name: getattr(self, name) for name in LICENCE},
                "language": self.languages,
                "datasets": self.datasets,
                "base_model": self.base_models,
            }
        )


@dataclass
class Loaded:
    """A model to build from.

    Attributes:
        model: A joint model, a vision half or a text tower.
        processor: Its processor, image processor or tokenizer.
        task: The card's task.
        with_captions: Whether its captions can be checked: the LLM is in the folder or at hand.
    """

    model: Any
    processor: Any
    task: str
    with_captions: bool


def build_folder(model: str | Path, destination: str | Path, **settings: Any) -> dict[str, Any]:
    """Write a self-contained folder for the Hub: weights, code, processor, card and license.

    A new process without this package loads the folder and compares its outputs before the folder appears.

    Args:
        model: Checkpoint of a stage, or another saved model or text tower: folder or Hub id.
        destination: Folder to write.
        settings: Other fields of [`BuildConfig`].

    Returns:
        `written`, the destination; `megabytes`; `difference`, the largest difference of an output in the new process.

    Raises:
        FileExistsError: The destination exists and `overwrite` is off.
        RuntimeError: The folder does not load in the new process, or its outputs differ; nothing is written.
        ValueError: A setting is wrong, or `model` is not a model of this package.
    """
    return run(build_config(BuildConfig, {"model": model, "destination": destination, **settings}, "BuildConfig"))


def run(config: BuildConfig, evaluations: list[Evaluation] | None = None) -> dict[str, Any]:
    """Build a folder, and load it in a new process before it appears.

    Args:
        config: The settings.
        evaluations: Results for the card, besides those of `config.results`.

    Raises:
        FileExistsError: The destination exists and `overwrite` is off.
        RuntimeError: What was written does not load, or gives other outputs. Nothing is kept then.
        ValueError: The source is no model of this package, or would not load elsewhere.
    """
    if config.config_only:
        return count_parameters(config.model, config.revision)
    if not config.model or not config.destination:
        raise ValueError("give a model and a destination: llm2clip build MODEL DESTINATION")
    destination = Path(config.destination)
    refuse_existing(destination, config.overwrite)
    results = [*(evaluations or []), *(read_results(Path(path)) for path in config.results)]
    example = _open_picture(config.example_image)
    fields = _fields(config)
    source = source_folder(config)
    card = source_card(config, source)
    loaded = _load(config, fields)
    with atomic_folder(destination, config.overwrite) as folder:
        _save(loaded, config, folder)
        picture = example or sample_picture()
        captions = config.example_captions or list(CAPTIONS)
        difference = _validate(loaded, folder, picture, captions)
        if example is not None:
            example.save(folder / EXAMPLE)
        write_built_card(config, loaded, card, results, copy_curves(source, folder), folder)
        write_license(folder)
        if config.code_repo is not None:
            _refer_to_code(folder, config.code_repo)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"written": str(destination), "megabytes": round(size / 1e6, 1), "difference": f"{difference:.1e}"}


def count_parameters(model: str, revision: str | None = None) -> dict[str, Any]:
    """Instantiate a config without weights; returns the number of parameters by part."""
    fields, _ = PretrainedConfig.get_config_dict(model, revision=revision)
    with torch.device("meta"):
        if _model_type(model, fields) == LLM2CLIPTextConfig.model_type:
            built: Any = LLM2CLIPTextModel(LLM2CLIPTextConfig.from_dict(fields))
            parts = {"decoder": built.decoder}
        else:
            built = LLM2CLIPModel(LLM2CLIPConfig.from_dict(fields))
            parts = {name: module for name, module in built.named_children() if module is not None}
    counts = {name: sum(value.numel() for value in module.parameters()) for name, module in parts.items()}
    return {**counts, "parameters": sum(value.numel() for value in built.parameters())}


def _model_type(name: str, fields: dict[str, Any]) -> str:
    model_type = fields.get("model_type")
    if model_type not in (LLM2CLIPConfig.model_type, LLM2CLIPTextConfig.model_type):
        raise ValueError(
            f"{name} is neither an LLM2CLIP model nor a text tower (its model_type is {model_type!r}); "
            "`llm2clip convert` makes one of a checkpoint of other code."
        )
    return str(model_type)


def _fields(config: BuildConfig) -> dict[str, Any]:
    """The source's config.json, after a look at what it is."""
    fields, _ = PretrainedConfig.get_config_dict(config.model, revision=config.revision)
    _model_type(config.model, fields)
    return fields


def _load(config: BuildConfig, fields: dict[str, Any]) -> Loaded:
    options: dict[str, Any] = {"revision": config.revision}
    if fields["model_type"] == LLM2CLIPTextConfig.model_type:
        model: Any = LLM2CLIPTextModel.from_pretrained(config.model, **options).eval()
        if _merges(config, model):
            model.merge_adapter()
        return Loaded(model, AutoTokenizer.from_pretrained(config.model, **options), TEXT_TASK, True)
    if fields.get("architectures") == [LLM2CLIPVisionModelWithProjection.__name__]:
        half = LLM2CLIPVisionModelWithProjection.from_pretrained(config.model, **options).eval()
        return Loaded(half, AutoImageProcessor.from_pretrained(config.model, **options), VISION_TASK, False)
    elsewhere = config.text_model or fields.get("text_model_name_or_path")
    on_the_hub = config.text_model is not None or bool(hub_ids(elsewhere))
    bundle = not on_the_hub if config.bundle_text_model is None else config.bundle_text_model
    if not bundle and not on_the_hub:
        raise ValueError(
            f"the LLM is in {elsewhere!r}, where others cannot load it from; bundle it (the default), or say with "
            "--text-model under which Hub id it is."
        )
    model = LLM2CLIPModel.from_pretrained(config.model, text_model=bundle, **options).eval()
    if bundle:
        model.text_model.merge_adapter()
        model.config.text_model_name_or_path = model.config.text_model_revision = None
    elif config.text_model is not None:
        model.config.text_model_name_or_path, model.config.text_model_revision = config.text_model, None
    return Loaded(model, AutoProcessor.from_pretrained(config.model, **options), JOINT_TASK, bundle)


def _merges(config: BuildConfig, model: Any) -> bool:
    if not model.has_adapter:
        return False
    base = model.decoder.peft_config[model.decoder.active_adapter].base_model_name_or_path
    if config.merge_adapter is False and not hub_ids(base):
        raise ValueError(f"the adapter's LLM is in {base!r}, where others cannot load it from; merge it.")
    return config.merge_adapter is not False


def _save(loaded: Loaded, config: BuildConfig, folder: Path) -> None:
    if loaded.task == TEXT_TASK:
        save_text_tower(loaded.model, loaded.processor, folder)
    else:
        loaded.model.save_pretrained(folder)
        loaded.processor.save_pretrained(folder)
    if loaded.task == JOINT_TASK or (loaded.task == TEXT_TASK and not loaded.model.has_adapter):
        write_sentence_transformers_files(folder)


def validate(folder: Path) -> float:
    """Load a built folder here and in a new process without this package.

    Returns:
        The largest difference of their outputs, relative to the largest entry.

    Raises:
        RuntimeError: It does not load there, or gives other outputs.
    """
    config = BuildConfig(model=str(folder), merge_adapter=False)
    loaded = _load(config, _fields(config))
    return _validate(loaded, folder, sample_picture(), list(CAPTIONS))


def _validate(loaded: Loaded, folder: Path, picture: Image.Image, captions: list[str]) -> float:
    model, processor, expected = loaded.model, loaded.processor, dict[str, Tensor]()
    texts = captions if loaded.with_captions else []
    embeds, loading = None, dict[str, Any]()
    takes_pictures = loaded.task != TEXT_TASK
    image_processor = getattr(processor, "image_processor", processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    with torch.inference_mode():
        if takes_pictures:
            pixels = image_processor(images=[picture], return_tensors="pt").to(model.dtype)
            expected["image"] = model(**pixels).pooler_output
        if texts:
            batch = tokenizer(texts, padding=True, return_tensors="pt")
            expected["text"] = model(**batch).pooler_output
        if texts and takes_pictures:
            expected["logits"] = model(**pixels, **batch).logits_per_image
        if loaded.task == JOINT_TASK and not texts:
            # The adapter is checked without its LLM.
            embeds = sample_llm_embeds(model.config.text_config.hidden_size)
            expected["text"] = model.get_text_features(llm_embeds=embeds).pooler_output
            loading["text_model"] = False
    return compare_with_stranger(folder, expected, picture if takes_pictures else None, texts, embeds, **loading)


def _open_picture(path: str | None) -> Image.Image | None:
    if path is None:
        return None
    try:
        return decode_image(path, path)
    except DamagedImageError as error:
        raise ValueError(f"the example picture {path} cannot be read: {error.reason}.") from error


def _refer_to_code(folder: Path, repo: str) -> None:
    """Take the code out of a folder and name the repo that holds it."""
    for path in folder.glob("*.json"):
        fields = json.loads(path.read_text(encoding="utf-8"))
        referring = _with_code_repo(copy.deepcopy(fields), repo)
        if referring != fields:
            write_json(path, referring)
    for path in folder.glob("*.py"):
        path.unlink()


def _with_code_repo(fields: Any, repo: str) -> Any:
    if not isinstance(fields, dict):
        return fields
    return {
        key: {name: f"{repo}--{target}" for name, target in value.items()}
        if key == "auto_map"
        else _with_code_repo(value, repo)
        for key, value in fields.items()
    }


__all__ = ["BuildConfig", "build_folder", "count_parameters", "run", "validate"]

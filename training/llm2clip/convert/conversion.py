"""`llm2clip convert`: convert checkpoints of other code to this format, and models back to the original format."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPImageProcessor

from llm2clip.command_line.settings import build_config, refuse
from llm2clip.convert.checkpoint import Checkpoint, is_torch_file, open_checkpoint
from llm2clip.convert.convert_config import ConvertConfig
from llm2clip.convert.convert_text import contains_decoder, convert_text_tower
from llm2clip.convert.joint import plan_joint
from llm2clip.convert.joint_plan import JointPlan, print_report
from llm2clip.convert.original import to_original
from llm2clip.files.atomic import atomic_file, read_json
from llm2clip.files.folders import atomic_folder, refuse_existing, refuse_nested
from llm2clip.files.library_errors import wrap_read_errors
from llm2clip.files.manifests import refuse_damaged
from llm2clip.hub.cards.card import license_fields, read_card, write_card
from llm2clip.hub.cards.facts import JOINT_TASK, TEXT_TASK, VISION_TASK, CardFacts
from llm2clip.hub.licenses import ModelLicense, bases_of, strictest
from llm2clip.models.repos import RepoKind, hub_ids, inspect_repo
from llm2clip.models.towers import describe_text_tower
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor

logger = logging.getLogger(__name__)

# Settings by what is converted.
LLM_SETTINGS = ("adapters", "prompt_name")
TOWER_OPTIONS = (
    *("model_config", "text_model", "image_size", "projection_dim", "quick_gelu"),
    *("reset_heads", "initializer", "seed"),
)


def convert_checkpoint(source: str | Path, destination: str | Path, **settings: Any) -> dict[str, Any]:
    """Convert a checkpoint of other code to a folder that `from_pretrained` loads, or a model back to the original.

    Args:
        source: Checkpoint: a file, a folder or a Hub id.
        destination: Folder to write; with `to="original"`, a `.pt` file.
        settings: Other fields of [`ConvertConfig`].

    Returns:
        `written`, the destination, and what was recognized.

    Raises:
        FileExistsError: The destination exists and `overwrite` is off, or it holds what a conversion did not write.
        ValueError: A setting is wrong, or the checkpoint is damaged or not fully recognized; nothing is written.
    """
    return run(
        build_config(ConvertConfig, {"source": source, "destination": destination, **settings}, "ConvertConfig")
    )


def run(config: ConvertConfig) -> dict[str, Any]:
    """Run `llm2clip convert`, which prints what happens to every tensor; see [`convert_checkpoint`]."""
    if not config.source or not config.destination:
        raise ValueError("give a source and a destination: llm2clip convert SOURCE DESTINATION")
    destination = Path(config.destination)
    if config.text_model is None:
        refuse(config, ["text_model_revision"], "it is that of a text_model")
    if config.to == "original":
        refuse(config, [*LLM_SETTINGS, *TOWER_OPTIONS], "the original format is written of the model as it is")
        return _to_original(config, destination)
    for needed in (config.source, config.text_model, config.model_config, *config.adapters):
        if needed is not None:
            refuse_nested(needed, destination)
    refuse_existing(destination, "convert", config.overwrite)
    checkpoint = open_checkpoint(config.source)
    with atomic_folder(destination, "convert", config.overwrite) as folder:
        if contains_decoder(checkpoint):
            refuse(config, TOWER_OPTIONS, f"{config.source} is an LLM")
            result = convert_text_tower(checkpoint, folder, config.source, config.adapters, config.prompt_name)
            task, made_from = TEXT_TASK, config.adapters
        else:
            refuse(config, LLM_SETTINGS, f"{config.source} is no LLM")
            plan = _convert_joint(checkpoint, folder, config)
            result = {"recognized": plan.recognized, "tensors": len(plan.tensors)}
            task = JOINT_TASK if plan.model_class is LLM2CLIPModel else VISION_TASK
            made_from = [plan.text_model] if plan.text_model else []
        is_local = checkpoint.folder is not None and not hub_ids(config.source)
        bases = bases_of(folder, [str(checkpoint.folder) if is_local else config.source, *made_from])
        stated = license_fields(read_card(checkpoint.folder)[0]) if checkpoint.folder else {}
        is_kept = all(base.allows(stated.get("license")) for base in bases)
        license = ModelLicense(stated, bases) if is_kept else strictest(bases)
        facts = CardFacts(
            name=folder.name,
            task=task,
            repo=folder.name,
            summary=f"Converted from {config.source} ({result['recognized']}) with llm2clip.",
            base_models=hub_ids(config.source, *made_from),
            **license.facts(),
        )
        write_card(folder, facts)
        license.write_files(folder, folder)
    return {**result, "written": str(destination)}


def _convert_joint(checkpoint: Checkpoint, folder: Path, config: ConvertConfig) -> JointPlan:
    plan = plan_joint(checkpoint, config)
    print_report(plan)
    with wrap_read_errors(checkpoint.path):
        model = plan.build(config.seed)
    model.save_pretrained(folder)
    _write_processor(plan, checkpoint, folder)
    with wrap_read_errors(checkpoint.path), torch.inference_mode():
        model = plan.model_class.from_pretrained(folder, **plan.loading)
        size = plan.vision_config.image_size
        output = model(pixel_values=torch.zeros(1, 3, size, size, dtype=model.dtype)).pooler_output
    state = model.state_dict()
    if changed := [name for name, tensor in plan.tensors.items() if not state[name].float().equal(tensor.float())]:
        raise RuntimeError(f"{changed[0]} changed when it was saved; please report this.")
    if not output.isfinite().all():
        raise ValueError(f"{checkpoint.path}: the outputs of the converted model for a gray image are not finite.")
    return plan


def _write_processor(plan: JointPlan, checkpoint: Checkpoint, folder: Path) -> None:
    processor: Any = _image_processor(plan, checkpoint)
    if plan.text_model is not None:
        try:
            _, tokenizer = describe_text_tower(plan.text_model, plan.config.text_model_revision)
            processor = LLM2CLIPProcessor(processor, tokenizer)
        except OSError:
            logger.warning(
                "the tokenizer of %s is not available, so the folder has an image processor but no tokenizer: load "
                "the tokenizer from that repo, or convert again with --text-model FOLDER, a folder with the LLM's "
                "config and tokenizer; weights are not needed.",
                plan.text_model,
            )
    processor.save_pretrained(folder)


def _image_processor(plan: JointPlan, checkpoint: Checkpoint) -> CLIPImageProcessor:
    size = plan.vision_config.image_size
    saved = checkpoint.folder / "preprocessor_config.json" if checkpoint.folder else None
    fields = read_json(saved) if saved is not None and saved.is_file() else {}
    statistics: dict[str, Any] = {name: fields[name] for name in ("image_mean", "image_std") if name in fields}
    # By default, they are those of OpenAI's CLIP.
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **statistics)


def _to_original(config: ConvertConfig, destination: Path) -> dict[str, Any]:
    if destination.is_dir():
        raise FileExistsError(
            f"{destination} is a folder; the original format is a file: give a name such as model.pt."
        )
    if destination.exists():
        # A file of the model itself is never replaced.
        refuse_nested(config.source, destination)
        if not config.overwrite:
            raise FileExistsError(f"{destination} exists; add --overwrite to replace it, or choose another file.")
        if not is_torch_file(destination):
            raise FileExistsError(
                f"{destination} is not replaced, because no conversion wrote it: it is no checkpoint of torch; "
                "choose another file, or delete it yourself."
            )
    refuse_damaged(config.source)
    inspect_repo(config.source).require(RepoKind.JOINT, hint="Only such a model has the parts of the original.")
    model = LLM2CLIPModel.from_pretrained(config.source, text_model=False)
    state = to_original(model.config, model.state_dict())
    with atomic_file(destination.resolve()) as file:
        torch.save(state, file)
    return {"written": str(destination), "tensors": len(state)}

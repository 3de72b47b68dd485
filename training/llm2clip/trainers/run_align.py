"""Align two frozen towers in closed form: the command `llm2clip align`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import set_seed
from transformers.utils import CONFIG_NAME

from llm2clip.command_line.processes import on_main_process, process_state
from llm2clip.data import CaptionImageDataset, CaptionSource
from llm2clip.encoders.image_features import ImageFeatures
from llm2clip.evaluation.data import RetrievalData
from llm2clip.files.atomic import write_json
from llm2clip.files.locks import run_lock
from llm2clip.files.manifests import FOLDER_MANIFEST
from llm2clip.hub.cards.facts import JOINT_TASK
from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from llm2clip.trainers import keep_images
from llm2clip.trainers.align_recipe import AlignRecipe
from llm2clip.trainers.alignment import align
from llm2clip.trainers.checkpoints import SETTINGS, register_model
from llm2clip.trainers.closed_form import DEFAULT_WIDTH
from llm2clip.trainers.joint_model import (
    describe_text_model,
    make_model,
    measure_retrieval,
    open_retrieval,
    store_images,
)
from llm2clip.trainers.kept_space import align_texts, drawn_captions, take_vision_side
from llm2clip.trainers.model_card import latest_evaluations, write_model_card
from llm2clip.trainers.run_context import compare_finished
from llm2clip.trainers.stage2_captions import Stage2Captions, open_captions
from llm2clip.trainers.teacher import Teacher
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.compatibility_llm2clip import make_readable_by_version_4

# In the folder of the model: the text embeddings of the model whose space is kept.
TEACHER = "teacher"


def run(config: AlignRecipe) -> dict[str, Any]:
    """Solve for the heads of two towers, and save the model in `config.output_dir`.

    The same command goes on where it was stopped: the features of the images are stored, and the rest takes seconds.

    Returns:
        The ridge and the width, and the metrics of retrieval with the prefix `eval_`.
    """
    if config.keep_images is not None:
        return keep_images.run(config)
    config.validate_sources()
    with run_lock(config.output_dir):
        on_main_process(partial(_take_folder, config))
        return _run(config)


def _take_folder(config: AlignRecipe) -> None:
    """Write the settings into the folder, before anything else: the same command goes on there, and no other one.

    Raises:
        ValueError: The folder was made with other settings.
        FileExistsError: It contains another model.
    """
    folder = Path(config.output_dir)
    if (folder / SETTINGS).is_file():
        compare_finished(config, folder)
    elif (folder / CONFIG_NAME).exists():
        raise FileExistsError(f"{folder} already contains a model; choose another output_dir, or delete this one.")
    (folder / FOLDER_MANIFEST).unlink(missing_ok=True)
    write_json(folder / SETTINGS, asdict(config))


def _run(config: AlignRecipe) -> dict[str, Any]:
    set_seed(config.seed)
    retrieval = open_retrieval(config)
    solve = _keep_space if config.keep_space_of else _align_both
    model, processor, metrics, measured = solve(config, retrieval)
    metrics |= {f"eval_{name}_{key}": value for name, of_set in measured().items() for key, value in of_set.items()}
    if process_state().is_main_process:
        _save(config, model, processor, metrics, [*retrieval])
    process_state().wait_for_everyone()
    return metrics


Measured = Callable[[], Mapping[str, Mapping[str, float | int]]]
Solved = tuple[LLM2CLIPModel, Any, dict[str, Any], Measured]


def open_model(config: AlignRecipe) -> tuple[LLM2CLIPModel, Any]:
    """Make the model whose maps are solved for, and its processor."""
    fields: dict[str, Any] = {"projection_dim": config.projection_dim or DEFAULT_WIDTH, "standardize_vision": True}
    fields |= {"vision_pooling": config.vision_pooling} if config.vision_pooling else {}
    fields |= {"vision_layers": config.vision_layers} if config.vision_layers else {}
    fields |= {"adapter_num_layers": config.adapter_num_layers} if config.adapter_num_layers is not None else {}
    # What residual heads add to the maps begins near 0.
    model, processor = make_model(config, initializer="normal", **fields)
    describe_text_model(model)
    return model, processor


def _align_both(config: AlignRecipe, retrieval: Mapping[str, RetrievalData]) -> Solved:
    """Solve for the maps of both towers."""
    model, processor = open_model(config)
    captions, images = _open(config, model, processor, retrieval)
    pairs = store_images(config, model, _image_processor(processor), images, captions.cache, retrieval)
    # Storing draws random numbers, and is not repeated.
    set_seed(config.seed)
    model.to(process_state().device)
    measured = _measurement(config, model, processor, captions, retrieval, pairs.features)
    mean_recall = _mean_recall(measured) if retrieval else None
    metrics = align(model, pairs, config.heads, config.ridge, config.projection_dim, mean_recall)
    return model, processor, metrics, measured


def _keep_space(config: AlignRecipe, retrieval: Mapping[str, RetrievalData]) -> Solved:
    """Solve for the map of texts into the space of another model."""
    name = str(config.keep_space_of)
    teacher = Teacher(name, Path(config.output_dir, TEACHER))
    model, processor = make_model(config, projection_dim=teacher.width)
    describe_text_model(model)
    model.to(process_state().device)
    take_vision_side(model, _image_processor(processor), teacher.encoder, name)
    captions, images = _open(config, model, processor, retrieval)
    texts = drawn_captions(images, captions.cache, config.on_error)
    measured = _measurement(config, model, processor, captions, retrieval, None)
    mean_recall = _mean_recall(measured) if retrieval else None
    metrics = align_texts(model, texts, captions.cache, teacher.texts(texts), config.ridge, mean_recall)
    return model, processor, metrics, measured


def _open(
    config: AlignRecipe, model: LLM2CLIPModel, processor: Any, retrieval: Mapping[str, RetrievalData]
) -> tuple[Any, CaptionImageDataset]:
    """Open the embeddings of the captions, and the captioned images."""
    captions = open_captions(config, model, processor, retrieval)
    if captions.cache is None:
        raise ValueError("align reads one random-access cache; embed the captions with store: cache.")
    sources = [CaptionSource.from_dict(source) for source in config.sources]
    return captions, CaptionImageDataset(sources)


def _image_processor(processor: Any) -> Any:
    return getattr(processor, "image_processor", processor)


def _measurement(
    config: AlignRecipe,
    model: LLM2CLIPModel,
    processor: Any,
    captions: Stage2Captions,
    retrieval: Mapping[str, RetrievalData],
    features: ImageFeatures | None,
) -> Measured:
    def measured() -> dict[str, dict[str, float | int]]:
        return {
            name: measure_retrieval(
                model,
                processor,
                captions.embed,
                data,
                features,
                batch_size=config.per_device_eval_batch_size,
                num_workers=config.dataloader_num_workers,
                on_error=config.on_error,
            )
            for name, data in retrieval.items()
        }

    return measured


def _mean_recall(measured: Measured) -> Callable[[], float]:
    """Return a function that measures the mean of R@1, 5 and 10 in both directions over the retrieval sets."""
    return lambda: fmean(value for of_set in measured().values() for key, value in of_set.items() if "recall@" in key)


def _save(config: AlignRecipe, model: LLM2CLIPModel, processor: Any, metrics: dict[str, Any], sets: list[str]) -> None:
    folder = Path(config.output_dir)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    make_readable_by_version_4(folder)
    if isinstance(processor, LLM2CLIPProcessor):
        write_sentence_transformers_files(folder)
    log = [{**metrics, "step": 0}]
    evaluations = latest_evaluations(sets, log, config.eval_sources, "image-text retrieval", None, wait=True)
    write_model_card(config, model, processor, task=JOINT_TASK, evaluations=evaluations, history=log)
    register_model(folder)

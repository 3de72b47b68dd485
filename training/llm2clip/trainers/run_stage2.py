"""Run stage 2 from its settings, the command `llm2clip stage2`: model, caption embeddings, training set."""

from __future__ import annotations

import math
from typing import Any

from transformers import set_seed

from llm2clip.command_line.settings import require
from llm2clip.data import Stage2Collator
from llm2clip.evaluation.data import RetrievalData
from llm2clip.models.attention_probe import probe_on_main_process
from llm2clip.models.towers import loading_options
from llm2clip.trainers.joint_model import (
    describe_text_model,
    load_trained_model,
    make_model,
    open_retrieval,
    store_images,
)
from llm2clip.trainers.lora import add_lora, lora_arguments
from llm2clip.trainers.parts import run_parts
from llm2clip.trainers.pushing import check_pushing
from llm2clip.trainers.run_context import RunContext
from llm2clip.trainers.run_trainer import run_trainer
from llm2clip.trainers.stage2_captions import Stage2Captions, open_captions
from llm2clip.trainers.stage2_config import NEW_MODEL_FIELDS, Stage2Recipe
from llm2clip.trainers.stage2_data import build_dataset
from llm2clip.trainers.stage2_trainer import Stage2Trainer
from modeling_llm2clip import LLM2CLIPModel

# Fields of a new model for the sigmoid loss (SigLIP).
SIGMOID = {"logit_scale_init_value": math.log(10), "logit_bias_init_value": -10.0}


def run(config: Stage2Recipe, resume: bool = False) -> dict[str, Any]:
    """Train a model with stage 2, part by part, or resume from the newest checkpoint; save it in `config.output_dir`.

    Returns:
        The metrics of training, and those of retrieval with the prefix `eval_`.
    """
    require(config, ["sources"])
    return run_parts(config, _train, resume)


def _train(config: Stage2Recipe, context: RunContext, history: list[dict[str, Any]]) -> dict[str, Any]:
    if bool(config.caches) == config.runs_text_model or None in config.caches:
        raise ValueError(
            "give either embedding_cache (from `llm2clip embed`), for all sources, or online_text_model: true, or "
            "lora_rank."
        )
    _check_pushing(config, config.text_model_name_or_path)
    trainer = build_trainer(config)
    trainer.earlier_history = history
    return run_trainer(trainer, context)


def build_trainer(config: Stage2Recipe) -> Stage2Trainer:
    """Load all that a run needs: model, captions, images and retrieval sets; and store what a frozen tower computes.

    Raises:
        ValueError: Settings do not fit the model or the data.
    """
    set_seed(config.seed)
    model, processor = open_model(config)
    # A model that was trained before names its LLM in its config.
    _check_pushing(config, model.config.text_model_name_or_path)
    retrieval = open_retrieval(config)
    captions = open_captions(config, model, processor, retrieval)
    image_processor = getattr(processor, "image_processor", processor)
    rows = open_rows(config, model, image_processor, captions, retrieval)
    if config.lora_rank:
        add_lora(model, **lora_arguments(config))
    images: dict[str, Any] = {"crop_scale": config.crop_scale, "image_backend": config.image_backend}
    return Stage2Trainer(
        model=model,
        args=config,
        data_collator=Stage2Collator(captions.cache, processor, config.on_error, **images),
        train_dataset=rows,
        processing_class=processor,
        retrieval=retrieval,
        cache=captions.cache,
        embed=captions.embed,
    )


def open_model(config: Stage2Recipe) -> tuple[LLM2CLIPModel, Any]:
    """Load the model of a run, with its trained parts in float32, and its processor; the LLM only if it runs."""
    if config.model_name_or_path is not None:
        model, processor = load_trained_model(config.model_name_or_path, config.attn_implementation)
    else:
        fields = {name: getattr(config, name) for name in NEW_MODEL_FIELDS if getattr(config, name) is not None}
        model, processor = make_model(config, **{**(SIGMOID if config.loss == "sigmoid" else {}), **fields})
    if config.runs_text_model:
        model.load_text_model(**loading_options(config.text_model_dtype))
        probe_on_main_process(model.text_model)
    else:
        describe_text_model(model)
    return model, processor


def open_rows(
    config: Stage2Recipe,
    model: LLM2CLIPModel,
    image_processor: Any,
    captions: Stage2Captions,
    retrieval: dict[str, RetrievalData],
) -> Any:
    """Open the training set: images, or what a frozen tower makes of them, which is computed once."""
    dataset = build_dataset(config, captions)
    if config.freeze_vision != "all":
        return dataset
    config.check_length(len(dataset))
    views, cache = (config.feature_views, config.crop_scale), captions.cache
    return store_images(config, model, image_processor, dataset, cache, retrieval, *views)


def _check_pushing(config: Stage2Recipe, llm: str | None) -> None:
    check_pushing(config, llm, config.lora_rank == 0 or config.save_format == "adapter", True)

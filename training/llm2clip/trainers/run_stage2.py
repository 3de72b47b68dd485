"""Run stage 2 from its settings, the command `llm2clip stage2`: model, caption embeddings, training set."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, set_seed

from llm2clip.data import (
    CaptionSource,
    SkipLog,
    Stage2Collator,
)
from llm2clip.encoders.cache_of_model import describe_text_tower_of_cache
from llm2clip.evaluation import ImageTextRetrieval
from llm2clip.trainers.checkpoints import resume_point
from llm2clip.trainers.closed_form import DEFAULT_WIDTH
from llm2clip.trainers.frozen_towers import open_stored_pairs
from llm2clip.trainers.pushing import check_pushing
from llm2clip.trainers.run_folder import stage_command
from llm2clip.trainers.sharding import undivided_building
from llm2clip.trainers.stage2_captions import open_captions
from llm2clip.trainers.stage2_config import NEW_MODEL_FIELDS, Stage2Config
from llm2clip.trainers.stage2_data import build_dataset
from llm2clip.trainers.stage2_trainer import Stage2Trainer
from llm2clip.trainers.stored_pairs import collate_stored
from llm2clip.trainers.warm_start import first_history, run_first_part, second_part
from llm2clip.utils.attention_probe import probe_from_disk, verify_on_main_process
from llm2clip.utils.locks import run_lock
from llm2clip.utils.processes import on_main_process
from llm2clip.utils.settings import require
from llm2clip.utils.text_identity import read_fingerprint
from llm2clip.utils.towers import loading_options
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.modeling_llm2clip_decoder import TESTED_TYPES

logger = logging.getLogger(__name__)

# The fields of the model's config that one setting stands for.
CONFIG_FIELDS = {"standardize_features": ("standardize_vision", "center_text")}
SIGMOID_BIAS = -10.0


def load_model(config: Stage2Config) -> tuple[LLM2CLIPModel, LLM2CLIPProcessor]:
    """Load the model of a run, with its trained parts in float32, and its processor; the LLM only if it runs online.

    Raises:
        ValueError: Settings of a new model are given for a trained one.
    """
    options = loading_options("float32", config.attn_implementation)
    fields = {name: getattr(config, name) for name in NEW_MODEL_FIELDS if getattr(config, name) is not None}
    if config.alignment != "train":
        # The bias of a linear map centres the captions; `set_heads` makes the heads when their width is chosen.
        fields.pop("standardize_features", None)
        fields |= {"standardize_vision": True, "projection_dim": config.projection_dim or DEFAULT_WIDTH}
    if config.loss == "sigmoid" and config.model_name_or_path is None:
        fields = {"logit_scale_init_value": math.log(10), "logit_bias_init_value": SIGMOID_BIAS, **fields}
    if config.model_name_or_path is not None:
        if fields:
            raise ValueError(f"{config.model_name_or_path} is already trained; leave {', '.join(fields)} unset.")
        image_processor_name = config.model_name_or_path
        model = LLM2CLIPModel.from_pretrained(config.model_name_or_path, text_model=False, **options)
        if (model.logit_bias is not None) != (config.loss == "sigmoid"):
            raise ValueError(
                f"{config.model_name_or_path} was trained with the "
                f"{'softmax' if model.logit_bias is None else 'sigmoid'} loss; set loss to that."
            )
        tokenizer: Any = AutoTokenizer.from_pretrained(config.model_name_or_path)
    else:
        require(config, ["vision_model_name_or_path", "text_model_name_or_path"])
        image_processor_name = config.vision_model_name_or_path
        text_config, tokenizer = describe_text_tower_of_cache(
            config.text_model_name_or_path, config.text_model_revision, next(iter(config.caches), None)
        )
        model = LLM2CLIPModel.from_vision_text_pretrained(
            config.vision_model_name_or_path,
            config.text_model_name_or_path,
            text_config=text_config,
            text_model_revision=config.text_model_revision,
            vision_model_kwargs={**options, "revision": config.vision_model_revision},
            **{name: value for key, value in fields.items() for name in CONFIG_FIELDS.get(key, (key,))},
        )
    if config.feature_dropout is not None:
        model.config.feature_dropout = config.feature_dropout
    if config.online_text_model:
        model.load_text_model(**loading_options(config.text_model_dtype))
        verify_on_main_process(model.text_model)
    elif model.config.text_model_name_or_path is not None:
        text = model.config.text_model_name_or_path, model.config.text_model_revision, model.config.text_config
        if model.config.text_model_fingerprint is None:
            model.config.text_model_fingerprint = on_main_process(partial(read_fingerprint, *text))
        text_config = model.config.text_config
        if text_config.decoder_config.model_type not in TESTED_TYPES and not text_config.verified_attention:
            # For those who load the model without this package, whose code has no probe.
            text_config.verified_attention = on_main_process(partial(probe_from_disk, *text))
    if config.patch_dropout is not None:
        vision = model.vision_model
        if not hasattr(vision.config, "patch_dropout"):
            raise ValueError(f"patch_dropout is for EVA02 towers; {type(vision).__name__} has none. Leave it unset.")
        vision.config.patch_dropout = model.config.vision_config.patch_dropout = config.patch_dropout
    image_processor = AutoImageProcessor.from_pretrained(config.image_processor_name_or_path or image_processor_name)
    return model, LLM2CLIPProcessor(image_processor, tokenizer)


def run(config: Stage2Config, resume: bool = False) -> dict[str, Any]:
    """Train a model with stage 2, or resume from the newest checkpoint, and save it in `config.output_dir`.

    With `warm_start`, a first part with frozen towers comes before it; its metrics have the prefix `warm_start_`.

    Returns:
        The metrics of training, and those of retrieval with the prefix `eval_`.
    """
    require(config, ["sources"])
    if not config.warm_start:
        return _run(config, resume)["metrics"]
    with run_lock(config.output_dir):
        # Refuses the folder of another run before the first part.
        resume_point(config, resume)
        first = run_first_part(config, resume, _run)
        metrics = _run(second_part(config), resume)["metrics"]
    return {f"warm_start_{name}": value for name, value in first["metrics"].items()} | metrics


@stage_command("sources")
def _run(config: Stage2Config, checkpoint: str | None) -> dict[str, Any]:
    """Run one part; return its `metrics` and its log, `history`."""
    if bool(config.caches) == config.online_text_model or None in config.caches:
        raise ValueError("give either embedding_cache (from `llm2clip embed`) or online_text_model: true.")
    check_pushing(config, config.text_model_name_or_path, not config.bundle_text_model, True)
    trainer = build_trainer(config)
    trainer.earlier_history = first_history(config)
    return {"metrics": trainer.fit(checkpoint), "history": trainer.state.log_history}


def build_trainer(config: Stage2Config) -> Stage2Trainer:
    """Load all that a run needs: model, captions, images and retrieval sets; with frozen towers, also their features.

    Raises:
        ValueError: Settings do not fit the model or the data.
    """
    set_seed(config.seed)
    with undivided_building(config):
        model, processor = load_model(config)
    # A model that was trained before names its LLM in its config.
    check_pushing(config, model.config.text_model_name_or_path, not config.bundle_text_model, True)
    image_processor = processor.image_processor
    retrieval = {
        name: ImageTextRetrieval(CaptionSource.from_dict(source), image_processor, config.on_error, config.max_pixels)
        for name, source in config.eval_sources.items()
    }
    captions = open_captions(config, model, processor, retrieval)
    online = processor if config.online_text_model else None
    collator: Any = Stage2Collator(captions.cache, online, config.on_error)
    if config.freeze_vision == "all":
        dataset: Any = open_stored_pairs(config, model, image_processor, captions.require_cache(), retrieval.values())
        collator, frozen = collate_stored, None
    else:
        dataset, frozen = build_dataset(config, model, image_processor, captions)
    return Stage2Trainer(
        model=model,
        args=config,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
        frozen=frozen,
        retrieval=retrieval,
        embed=captions.embed,
        skip_log=SkipLog(Path(config.output_dir) / f"skipped-{config.process_index}.jsonl"),
    )

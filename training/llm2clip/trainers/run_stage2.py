"""Run stage 2 from its settings, the command `llm2clip stage2`: model, caption embeddings, training set."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any, cast

from transformers import AutoImageProcessor, AutoTokenizer, set_seed

from llm2clip.data import CaptionSource
from llm2clip.encoders.cache_of_model import describe_text_tower_of_cache
from llm2clip.evaluation.data import RetrievalData
from llm2clip.store import PairedCache
from llm2clip.trainers.closed_form import DEFAULT_WIDTH
from llm2clip.trainers.pushing import check_pushing
from llm2clip.trainers.run_context import RunContext, stage_command
from llm2clip.trainers.sharding import undivided_building
from llm2clip.trainers.stage2_captions import open_captions
from llm2clip.trainers.stage2_config import NEW_MODEL_FIELDS, Stage2Recipe
from llm2clip.trainers.stage2_data import build_dataset
from llm2clip.trainers.stage2_trainer import Stage2Trainer
from llm2clip.trainers.warm_start import first_part
from llm2clip.utils.attention_probe import probe_from_disk, verify_on_main_process
from llm2clip.utils.manifests import refuse_changed_model
from llm2clip.utils.processes import on_main_process
from llm2clip.utils.repos import refuse_revision
from llm2clip.utils.settings import refuse, require
from llm2clip.utils.text_identity import read_fingerprint
from llm2clip.utils.towers import loading_options
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor, LLM2CLIPTextConfig, with_pillow
from modeling_llm2clip.modeling_llm2clip_decoder import TESTED_TYPES

logger = logging.getLogger(__name__)

# The fields of the model's config that one setting stands for.
CONFIG_FIELDS = {"standardize_features": ("standardize_vision", "center_text")}
SIGMOID_BIAS = -10.0


def load_model(config: Stage2Recipe, run: Stage2Recipe | None = None) -> tuple[LLM2CLIPModel, Any]:
    """Load the model of a run, with its trained parts in float32, and its processor; the LLM only if it runs.

    The processor of a model that takes `llm_embeds` alone is its image processor.

    Args:
        run: The settings that say whether it does, and in which dtype; by default the same.

    Raises:
        ValueError: A trained model was trained with another loss, or a revision is given for a local folder.
    """
    options = loading_options("float32", config.attn_implementation)
    given = {name: getattr(config, name) for name in NEW_MODEL_FIELDS}
    fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    tokenizer: Any = None
    if config.alignment != "train":
        # The bias of a linear map centres the captions; `set_heads` makes the heads when their width is chosen.
        fields.pop("standardize_features", None)
        fields |= {"standardize_vision": True, "projection_dim": config.projection_dim or DEFAULT_WIDTH}
    if config.loss == "sigmoid" and config.model_name_or_path is None:
        fields = {"logit_scale_init_value": math.log(10), "logit_bias_init_value": SIGMOID_BIAS, **fields}
    if config.model_name_or_path is not None:
        image_processor_name = config.model_name_or_path
        refuse_changed_model(image_processor_name)
        model = LLM2CLIPModel.from_pretrained(config.model_name_or_path, text_model=False, **options)
        if (model.logit_bias is not None) != (config.loss == "sigmoid"):
            raise ValueError(
                f"{config.model_name_or_path} was trained with the "
                f"{'softmax' if model.logit_bias is None else 'sigmoid'} loss; set loss to that."
            )
        if not model.config.text_config.encoders:
            tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    else:
        pair = next((folder for folder in config.caches if isinstance(folder, tuple)), None)
        require(config, ["vision_model_name_or_path", *(() if pair else ["text_model_name_or_path"])])
        refuse_revision(config.vision_model_name_or_path, config.vision_model_revision)
        image_processor_name = config.vision_model_name_or_path
        refuse_changed_model(image_processor_name)
        text_name: Any = config.text_model_name_or_path
        if pair:
            names = ["text_model_name_or_path", "text_model_revision", "bundle_text_model"]
            refuse(config, names, "a model of two embedding caches takes llm_embeds alone")
            cache = PairedCache.of_folders(pair, verify=False)
            text_name, text_config = None, LLM2CLIPTextConfig(encoders=cache.encoders)
            fields["text_model_fingerprint"] = cache.manifest.fingerprint
        else:
            path: Any = next(iter(config.caches), None)
            text_config, tokenizer = describe_text_tower_of_cache(text_name, config.text_model_revision, path)
        model = LLM2CLIPModel.from_vision_text_pretrained(
            config.vision_model_name_or_path,
            text_name,
            text_config=text_config,
            text_model_revision=config.text_model_revision,
            vision_model_kwargs={**options, "revision": config.vision_model_revision},
            **{name: value for key, value in fields.items() for name in CONFIG_FIELDS.get(key, (key,))},
        )
    if (run or config).runs_text_model:
        model.load_text_model(**loading_options((run or config).text_model_dtype))
        verify_on_main_process(model.text_model)
    elif model.config.text_model_name_or_path is not None:
        text = model.config.text_model_name_or_path, model.config.text_model_revision, model.config.text_config
        if model.config.text_model_fingerprint is None:
            model.config.text_model_fingerprint = on_main_process(partial(read_fingerprint, *text))
        name, revision, text_config = text
        if text_config.decoder_config.model_type not in TESTED_TYPES and not text_config.verified_attention:
            # For those who load the model without this package, whose code has no probe.
            text_config.verified_attention = on_main_process(partial(probe_from_disk, name, revision, text_config))
    image_processor = AutoImageProcessor.from_pretrained(config.image_processor_name_or_path or image_processor_name)
    if tokenizer is None:
        return model, with_pillow(image_processor)
    return model, LLM2CLIPProcessor(image_processor, tokenizer)


@stage_command("sources")
def run(config: Stage2Recipe, context: RunContext) -> dict[str, Any]:
    """Train a model with stage 2, or resume from the newest checkpoint, and save it in `config.output_dir`.

    With `warm_start`, a first part with frozen towers comes before it; its metrics have the prefix `warm_start_`.

    Returns:
        The metrics of training, and those of retrieval with the prefix `eval_`.
    """
    if bool(config.caches) == (config.runs_text_model and not config.warm_start) or None in config.caches:
        raise ValueError(
            "give either embedding_cache (from `llm2clip embed`) or online_text_model: true, or lora_rank; warm_start "
            "needs the first."
        )
    _check_pushing(config, config.text_model_name_or_path)
    return build_trainer(config).fit(context)


def build_trainer(config: Stage2Recipe) -> Stage2Trainer:
    """Load all that a run needs: model, captions, images and retrieval sets.

    Raises:
        ValueError: Settings do not fit the model or the data.
    """
    set_seed(config.seed)
    # A first part brings the fields of a new model.
    new = cast(Stage2Recipe, first_part(config)) if config.warm_start else config
    with undivided_building(config):
        model, processor = load_model(new, config)
    # A model that was trained before names its LLM in its config.
    _check_pushing(config, model.config.text_model_name_or_path)
    image_processor = getattr(processor, "image_processor", processor)
    retrieval = {
        name: RetrievalData.from_source(CaptionSource.from_dict(source), max_pixels=config.max_pixels)
        for name, source in config.eval_sources.items()
    }
    captions = open_captions(config, model, processor, retrieval)
    return Stage2Trainer(
        model=model,
        args=config,
        train_dataset=build_dataset(config, image_processor, captions),
        processing_class=processor,
        retrieval=retrieval,
        cache=captions.cache,
        # That of an LLM that trains is asked for when it is needed.
        embed=None if config.lora_rank and not config.caches else captions.embed,
    )


def _check_pushing(config: Stage2Recipe, llm: Any) -> None:
    bundled = config.save_format == "merged" if config.lora_rank else config.bundle_text_model
    check_pushing(config, llm, not bundled, True)

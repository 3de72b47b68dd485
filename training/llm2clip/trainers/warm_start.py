"""The first part of a run of stage 2 with `warm_start`, in which both towers are frozen."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from accelerate.state import AcceleratorState

from llm2clip.trainers.alignment import set_heads
from llm2clip.trainers.base_trainer import StageTrainer
from llm2clip.trainers.run_context import RunContext
from llm2clip.trainers.saving import load_weights
from llm2clip.trainers.stage2_config import NEW_MODEL_FIELDS, NOT_OF_TEXTS, TRAINING_FIELDS, Stage2Config
from llm2clip.trainers.text_tower_config import LoraSettings
from llm2clip.utils.files import read_json, write_json
from llm2clip.utils.settings import change_config, defaults_of
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel

logger = logging.getLogger(__name__)

WARM_START = "warm_start"
# In its folder, written last: what the first part measured, and its curves.
WARM_START_RESULT = "warm_start.json"
# Of the learning rate of the run, if its first part has none of its own.
WARM_START_RATE = 10.0


def first_part(config: Stage2Config) -> Stage2Config:
    """Return the settings of the first part of a run with `warm_start`, in which both towers are frozen (LP-FT).

    Kumar et al. (arXiv 2202.10054) train the new head first, since a random one sends large gradients through a
    pretrained tower and distorts it; in ProCLIP (arXiv 2510.18795) most of the ability that LLM2CLIP loses is kept in
    this way.

    Raises:
        ValueError: `warm_start` has a field that the config does not have, or that is one of the whole run, or a value
            that does not fit.
    """
    fixed = {
        "output_dir": str(Path(config.output_dir) / WARM_START),
        "freeze_vision": "all",
        "freeze_vision_layers": 0,
        "frozen_states_dir": None,
        "tower_chunk_size": None,
        "push_to_hub": False,
        "bundle_text_model": False,
        "warm_start": {},
    }
    rates: dict[str, Any] = {
        "learning_rate": WARM_START_RATE * config.learning_rate,
        "vision_learning_rate": None,
        "text_learning_rate": None,
        "vision_layer_decay": 1.0,  # no layer trains
    }
    given, defaults = config.warm_start, defaults_of(config)
    # Data and towers are opened once, for both parts.
    shared = {*fixed, *(defaults.keys() - defaults_of(Stage2Config).keys() - {*NEW_MODEL_FIELDS})}
    if whole := [name for name in given if name in shared]:
        raise ValueError(f"warm_start has {whole[0]}, but takes that from the run, or has one value; leave it out.")
    if "num_train_epochs" in given:
        rates |= {"max_steps": -1}
    if "eval_strategy" in given:
        rates |= {"eval_steps": None}
    # What is for a tower that trains, and an LLM that does; and what keeps the vision side near itself.
    unused = {"patch_dropout", "lora_rank", *defaults_of(LoraSettings), "text_model_dtype", "neftune_noise_alpha"}
    unused |= {"distill_weight", "structure_weight"}
    if given.get("feature_views", config.feature_views) == 1:
        unused |= {"crop_scale"}
    if given.get("alignment") == "closed_form":
        # Which settings of training do not concern.
        unused |= {*TRAINING_FIELDS}
    elif given.get("distill_from"):
        unused |= {*NOT_OF_TEXTS}
    rates |= {name: value for name, value in defaults.items() if name in unused}
    return change_config(config, {**rates, **given, **fixed}, "warm_start")


def warm_start_result(config: Stage2Config) -> dict[str, Any] | None:
    """Read the `metrics` of a finished first part and its log, `history`; None if there is none."""
    path = Path(config.output_dir) / WARM_START / WARM_START_RESULT
    return read_json(path) if path.is_file() else None


def run_first_part(make: Callable[[], StageTrainer], first: Stage2Config, resume: bool) -> dict[str, Any]:
    """Run a first part, or resume it; the state of accelerate is reset before and after.

    Args:
        make: Makes its Trainer.

    Returns:
        See [`warm_start_result`].
    """
    what = "the adapter, from texts alone" if first.distill_from else "projection and adapter, with frozen towers"
    logger.info("Warm start: %s.", what)
    # Both parts may have a precision of their own, which accelerate keeps for the whole process.
    AcceleratorState._reset_state()
    trainer = make()
    with RunContext(first, resume or None, is_command=True) as run:
        result = {"metrics": trainer.fit(run), "history": trainer.state.log_history}
        if first.should_save:
            write_json(Path(first.output_dir) / WARM_START_RESULT, result)
    AcceleratorState._reset_state()
    return result


def continue_with(model: LLM2CLIPModel, first: Stage2Config, feature_dropout: float | None) -> None:
    """Give a model the weights and the heads of a finished first part.

    Args:
        feature_dropout: The setting of the run; None takes that of the first part.
    """
    logger.info("Continuing with the warm start in %s.", first.output_dir)
    saved = LLM2CLIPModel.from_pretrained(first.output_dir, text_model=False)
    if first.alignment != "train":
        set_heads(model, saved.config.visual_head, saved.config.projection_dim)
    load_weights(model, saved, first.output_dir)
    if feature_dropout is None:
        cast(LLM2CLIPConfig, model.config).feature_dropout = saved.config.feature_dropout


def arguments_by_name(
    trainer_class: type, base: type, positional: Sequence[Any], named: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a Trainer by name; those that its class takes as `*args` have the names of `base`."""
    parameters = inspect.signature(trainer_class.__init__).parameters.values()  # type: ignore[misc]
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
    return {**dict(zip([parameter.name for parameter in parameters][1:], positional, strict=False)), **named}

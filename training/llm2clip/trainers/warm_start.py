"""The first part of stage 2: align projection and adapter with frozen towers, before the vision tower trains (LP-FT).

Kumar et al. (arXiv 2202.10054) train the new head first, since a random one sends large gradients through a pretrained
tower and distorts it; in ProCLIP (arXiv 2510.18795) most of the ability that LLM2CLIP loses is kept in this way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from llm2clip.trainers.run_settings import check_settings
from llm2clip.trainers.stage2_config import NEW_MODEL_FIELDS, TRAINING_FIELDS, Stage2Config
from llm2clip.utils.files import read_json, write_json
from llm2clip.utils.settings import change_config

logger = logging.getLogger(__name__)

FOLDER = "warm_start"
# Written last: what the first part measured, and its curves.
RESULT = "warm_start.json"
# Of the learning rate of the second part, if the first has none of its own.
RATE = 10.0


def first_part(config: Stage2Config) -> Stage2Config:
    """Return the settings of the first part of a run.

    Raises:
        ValueError: `warm_start` has a field that Stage2Config does not have, or a value that does not fit.
    """
    fixed = {
        "output_dir": str(Path(config.output_dir) / FOLDER),
        "freeze_vision": "all",
        "freeze_vision_layers": 0,
        "frozen_states_dir": None,
        "tower_chunk_size": None,
        "push_to_hub": False,
        "bundle_text_model": False,
        "warm_start": {},
    }
    rates: dict[str, Any] = {
        "learning_rate": RATE * config.learning_rate,
        "vision_learning_rate": None,
        "text_learning_rate": None,
    }
    own = {name: value for name, value in config.warm_start.items() if name not in fixed}
    if own.get("alignment") == "closed_form":
        # Which settings of training do not concern.
        rates = {field.name: field.default for field in fields(config) if field.name in TRAINING_FIELDS}
    return change_config(config, {**rates, **own, **fixed}, "warm_start")


def second_part(config: Stage2Config) -> Stage2Config:
    """Return the settings of the second part, which continues with the model of the first."""
    # `warm_start` stays, so that a resumed run with another one is refused.
    first = str(Path(config.output_dir) / FOLDER)
    changes: dict[str, Any] = {"model_name_or_path": first, "feature_cache": None, "feature_views": 1}
    changes |= {"alignment": "train", "ridge": None, "feature_dtype": "float32"}
    return change_config(config, {**dict.fromkeys(NEW_MODEL_FIELDS), **changes})


def first_history(config: Stage2Config) -> list[dict[str, Any]]:
    """Return the log of the first part of a run for its card; none in other runs and processes."""
    if not config.warm_start or not config.should_save:
        return []
    return read_json(Path(config.output_dir) / FOLDER / RESULT)["history"]


def run_first_part(
    config: Stage2Config, resume: bool, run: Callable[[Stage2Config, bool], dict[str, Any]]
) -> dict[str, Any]:
    """Run the first part, from its last checkpoint if `resume`, unless it is finished.

    Args:
        config: The settings of the whole run.
        run: Runs a part; see the result.

    Returns:
        `metrics` of the first part, and its log as `history`.
    """
    first = first_part(config)
    result = Path(first.output_dir) / RESULT
    if resume and result.is_file():
        check_settings(first, Path(first.output_dir))
        logger.info("the warm start in %s is finished.", first.output_dir)
        return read_json(result)
    logger.info("Warm start: projection and adapter, with frozen towers.")
    found = run(first, resume)
    if config.should_save:
        write_json(result, found)
    return found

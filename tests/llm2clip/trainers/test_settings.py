"""Numbers that a stage cannot be trained with are refused when its settings are read."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from llm2clip.utils.settings import build_config


@pytest.mark.parametrize("config", [MNTPRecipe, Stage1Recipe, Stage2Recipe])
@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "save_steps"])
def test_a_number_has_to_be_finite(config: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is nan, but it has to be a finite number"):
        build_config(config, {"use_cpu": True, name: math.nan})


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (Stage1Recipe, {"learning_rate": math.inf}, "learning_rate is inf, but it has to be a finite number"),
        (Stage1Recipe, {"lora_dropout": math.nan}, "lora_dropout is nan"),
        (Stage1Recipe, {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, but is 0"),
        (Stage1Recipe, {"gradient_accumulation_steps": -1}, "gradient_accumulation_steps must be at least 1"),
        (Stage1Recipe, {"max_steps": 0}, "max_steps is 0; set it to a number of steps, or to -1"),
        (Stage1Recipe, {"grace_seconds": 1e300}, "grace_seconds must be"),
        (Stage2Recipe, {"vision_layer_decay": math.inf}, "vision_layer_decay is inf"),
        (Stage2Recipe, {"projection_dim": 0}, "projection_dim must be at least 1, but is 0"),
        (Stage2Recipe, {"projection_dim": -1}, "projection_dim must be at least 1"),
        (Stage2Recipe, {"adapter_expansion": 0}, "adapter_expansion must be at least 1"),
        (MNTPRecipe, {"block_size": 0}, "block_size must be at least 2"),
        (MNTPRecipe, {"block_size": 1}, "block_size must be at least 2"),
        (MNTPRecipe, {"mlm_probability": 0.0}, "mlm_probability must be above 0 and at most 1"),
    ],
)
def test_a_number_out_of_range_is_named(config: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(config, {"use_cpu": True, **fields})


def test_gradients_may_be_unlimited() -> None:
    assert build_config(Stage1Recipe, {"use_cpu": True, "max_grad_norm": math.inf}).max_grad_norm == math.inf


def test_a_share_of_the_steps_as_warm_up_leaves_one_after_it() -> None:
    config = build_config(Stage2Recipe, {"use_cpu": True, "warmup_steps": 0.3})
    assert [config.get_warmup_steps(steps) for steps in (1, 2, 3, 16)] == [0, 1, 1, 5]


@pytest.mark.parametrize(
    ("fields", "num_rows", "message"),
    [
        ({}, 7, "fewer rows than one batch of 8"),
        ({"warmup_steps": 5}, 31, "has 5 of 3 optimizer steps; lower warmup_steps"),
        ({"warmup_steps": 2, "gradient_accumulation_steps": 2}, 31, "has 2 of 2 optimizer steps"),
        ({"warmup_steps": 5, "max_steps": 4}, 1000, "has 5 of 4 optimizer steps"),
    ],
)
def test_rows_that_are_too_few_for_the_settings(fields: dict[str, Any], num_rows: int, message: str) -> None:
    common = {"use_cpu": True, "per_device_train_batch_size": 8, "num_train_epochs": 1}
    config = build_config(Stage2Recipe, {**common, **fields})
    with pytest.raises(ValueError, match=message):
        config.check_length(num_rows)

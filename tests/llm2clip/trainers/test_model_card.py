"""What the card of a run says: settings that differ, and its evaluations beside those before the training."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2clip import MNTPConfig, Stage1Config, Stage2Config
from llm2clip.trainers.base_config import StageConfig
from llm2clip.trainers.model_card import _recipe, latest_evaluations

SETS = {"validation": {"path": "pictures", "split": "validation", "caption_columns": ["caption"]}}


@pytest.mark.parametrize("config", [Stage1Config, Stage2Config, MNTPConfig])
def test_no_default_is_among_the_settings_that_differ(config: type[StageConfig], tmp_path: Path) -> None:
    assert _recipe(config(output_dir=str(tmp_path))) == {}
    changed = config(output_dir=str(tmp_path), learning_rate=0.5, activation_checkpointing=True, debug="", seed=7)
    assert _recipe(changed) == {"learning_rate": 0.5, "activation_checkpointing": True, "seed": 7}


def test_an_evaluation_has_the_scores_before_the_training_and_the_columns_of_its_source() -> None:
    before, after = ({"step": step, "eval_validation_text_to_image_recall@1": step / 10 + 0.1} for step in (0, 4))
    (found,) = latest_evaluations(["validation"], [before, {"step": 4, "loss": 1.0}, after], SETS, "title", None, True)
    assert (found.title, found.metrics) == ("pictures (validation, caption)", {"text_to_image_recall@1": 0.5})
    assert found.baseline == {"text_to_image_recall@1": 0.1}
    # A run whose only measurement is that before its first step, and one without it.
    for history in ([before], [after]):
        (alone,) = latest_evaluations(["validation"], history, SETS, "title", None, True)
        assert not alone.baseline

"""What a Trainer cannot do with a model, rows or settings is one clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from llm2clip import (
    LLM2CLIPModel,
    LLM2CLIPTextModel,
    Stage1Config,
    Stage1Trainer,
    Stage2Config,
    Stage2Trainer,
)
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.test_arguments import trainer_of
from tests.llm2clip.trainers.test_every_setting import settings, stage2
from tests.llm2clip.trainers.test_plain_datasets import joint_model


def test_an_adapter_of_the_callers_own_is_trained_as_it_is(inputs: Inputs, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def with_adapter() -> LLM2CLIPTextModel:
        model = LLM2CLIPTextModel.from_pretrained(inputs.text)
        model.decoder = get_peft_model(model.decoder, LoraConfig(r=3, target_modules=["q_proj"]))
        return model

    model = with_adapter()
    Stage1Trainer(model=model, args=Stage1Config(**settings(tmp_path)))
    assert model.decoder.peft_config["default"].r == 3
    with pytest.raises(ValueError, match="lora_rank is 5, but the model has an adapter with 3"):
        Stage1Trainer(model=with_adapter(), args=Stage1Config(**settings(tmp_path), lora_rank=5))
    other: Any = get_peft_model(LLM2CLIPTextModel.from_pretrained(inputs.text), LoraConfig(target_modules=["q_proj"]))
    for lost in (other, other.get_base_model()):
        with pytest.raises(ValueError, match="an adapter of your own has to be on its decoder"):
            Stage1Trainer(model=lost, args=Stage1Config(**settings(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"remove_unused_columns": True}, "leave remove_unused_columns off"),
        ({"label_names": ["labels"]}, "leave label_names empty"),
    ],
)
def test_settings_without_use_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    for config in (Stage1Config, Stage2Config):
        with pytest.raises(ValueError, match=message):
            config(output_dir=str(tmp_path), use_cpu=True, **fields)
    with pytest.raises(ValueError, match="have no label smoothing"):
        Stage1Config(output_dir=str(tmp_path), use_cpu=True, label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_vision": "all", "crop_scale": [0.5, 1.0]}, "images are stored without crops"),
        ({"freeze_vision": "all", "patch_dropout": 0.5}, "patch_dropout is for a vision tower that trains"),
        ({"lr_scheduler_kwargs": {"num_cycles": 3}}, "has no lr_scheduler_kwargs"),
        ({"bf16_full_eval": True}, "leave bf16_full_eval and fp16_full_eval off"),
        ({"eval_do_concat_batches": False}, "recalls are over all rows"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(
    changes: dict[str, Any], message: str, inputs: Inputs, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        stage2(inputs, tmp_path, **changes)


def test_a_search_over_what_is_read_at_construction_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 3}
    name = joint_model(inputs, tmp_path / "own")
    model_init = lambda: LLM2CLIPModel.from_pretrained(name, text_model=False)  # noqa: E731
    trainer = trainer_of(inputs, tmp_path, changes, model_init=model_init)
    with pytest.raises(ValueError, match="a search cannot vary skip_bad_steps"):
        trainer.hyperparameter_search(lambda trial: {"skip_bad_steps": trial.suggest_int("n", 1, 3)}, n_trials=1)
    with pytest.raises(ValueError, match="do not work with model_init"):
        trainer_of(inputs, tmp_path, {"warm_start": {"max_steps": 1}}, model_init=model_init)


def test_what_a_beginner_mixes_up_is_one_clear_error(inputs: Inputs, tmp_path: Path) -> None:
    made = stage2(inputs, tmp_path)
    model, data, args = made.model, made.train_dataset, Stage2Config(**settings(tmp_path))
    other = LLM2CLIPModel.from_pretrained(tmp_path / "model", text_model=False)
    other.config.text_model_fingerprint = "0" * 32
    stores = {"cache": made.cache, "processing_class": made.processing_class}
    splits = datasets.DatasetDict({"a": datasets.Dataset.from_dict({})})
    cases: dict[str, Any] = {
        "needs args of type Stage2Config, not Stage1Config": (model, Stage1Config(**settings(tmp_path))),
        "model is a LLM2CLIPTextModel, but stage 2 trains": (LLM2CLIPTextModel.from_pretrained(inputs.text), args),
        "was made by .* but the text encoder in use": (other, args, None, data, None, stores),
        "open it with EmbeddingCache.open": (model, args, None, data, None, {"cache": inputs.cache}),
        "train_dataset has the splits a; give one": (
            model,
            args,
            None,
            splits,
        ),
        "rows are eval_dataset": (model, args, None, data, None, {"retrieval": {"a": [1]}}),
    }
    for message, (*positional,) in cases.items():
        named = positional.pop() if isinstance(positional[-1], dict) and len(positional) > 5 else {}
        with pytest.raises(ValueError, match=message):
            Stage2Trainer(*positional, **named)
    with pytest.raises(ValueError, match=r"stage 1 needs processing_class"):
        Stage1Trainer(LLM2CLIPTextModel.from_pretrained(inputs.text), Stage1Config(**settings(tmp_path)), None, [])
    with pytest.raises(ValueError, match="there is no checkpoint"):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))

"""Masked next token prediction from its settings, and stage 1 on its result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from llm2clip.data.sampling import SampleIndex
from llm2clip.trainers import mntp_trainer, run_mntp, run_stage1
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.mntp_data import MaskCollator, TokenBlocks
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPTextModel
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.modeling_llm2clip import tiny as tiny_models


def fields(folder: Path, llm: str, **changes: Any) -> dict[str, Any]:
    shared = tiny.stage1_fields(folder, llm)
    return {
        **shared,
        "sources": [{"path": tiny.GLOSSES, "caption_columns": ["gloss"], "max_samples": 200}],
        "block_size": 32,
        **changes,
    }


def run(folder: Path, llm: str, resume: bool = False, **changes: Any) -> dict[str, Any]:
    return run_mntp.run(build_config(MNTPRecipe, fields(folder, llm, **changes)), resume=resume)


def test_result_is_a_text_tower_that_stage1_can_train(inputs: Inputs, tmp_path: Path) -> None:
    gloss_test = {"path": tiny.GLOSSES, "split": "test", "anchor_column": "lemmas", "positive_column": "gloss"}
    metrics = run(tmp_path / "mntp", inputs.llm, eval_sources={"glosses": gloss_test})
    assert metrics["eval_glosses_num_targets"] == 586
    model = LLM2CLIPTextModel.from_pretrained(tmp_path / "mntp")
    assert model.config.prompt_prefix == tiny_models.PREFIX
    before = LLM2CLIPTextModel.from_decoder(inputs.llm).decoder.state_dict()
    changed = [name for name, value in model.decoder.state_dict().items() if not value.equal(before[name])]
    assert changed
    assert all("proj" in name for name in changed)
    unset = {"prompt_prefix": None, "prompt_suffix": None, "max_text_length": None, "max_steps": 1}
    settings = {**tiny.stage1_fields(tmp_path / "stage1", str(tmp_path / "mntp")), **unset}
    run_stage1.run(build_config(Stage1Recipe, settings))
    assert (tmp_path / "stage1" / "model.safetensors").exists()


def test_weights_in_16_bit_train_in_mixed_precision(inputs: Inputs, tmp_path: Path) -> None:
    losses = [
        run(tmp_path / name, inputs.llm, max_steps=2, save_strategy="no", **precision)["train_loss"]
        for name, precision in (("single", {}), ("mixed", {"dtype": "bfloat16", "bf16": True}))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_resumed_run_equals_an_uninterrupted_run(inputs: Inputs, tmp_path: Path) -> None:
    run(tmp_path / "unbroken", inputs.llm)
    run(tmp_path / "broken", inputs.llm)
    (tmp_path / "broken" / "checkpoint-6" / "trainer_state.json").unlink()
    run(tmp_path / "broken", inputs.llm, resume=True)
    expected = LLM2CLIPTextModel.from_pretrained(tmp_path / "unbroken").state_dict()
    for name, value in LLM2CLIPTextModel.from_pretrained(tmp_path / "broken").state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


def test_masks_depend_only_on_seed_and_sample(inputs: Inputs, tmp_path: Path) -> None:
    config = build_config(MNTPRecipe, fields(tmp_path, inputs.llm))
    tokenizer = AutoTokenizer.from_pretrained(inputs.llm)
    collate = MaskCollator(tokenizer, config)
    ids = tokenizer(["a small brown dog runs on the beach"] * 40)["input_ids"]
    blocks = TokenBlocks(np.concatenate(ids).astype(np.int32), 32)
    samples = [blocks[SampleIndex(1, index)] for index in range(4)]
    first = collate(samples)
    torch.rand(3)
    again = collate(samples)
    assert first.pop("keys") == again.pop("keys") == [f"block {number}" for number in range(4)]
    assert all(first[name].equal(again[name]) for name in first)
    other = collate([blocks[SampleIndex(2, index)] for index in range(4)])
    assert not other["labels"].equal(first["labels"])
    masked = first["labels"] != -100
    assert 0.1 < masked.float().mean() < 0.3
    assert (first["input_ids"][masked] == tokenizer.convert_tokens_to_ids("_")).float().mean() > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token": "<nothing>"}, "mask_token '<nothing>' is not a token"),
        ({"block_size": 100_000}, "do not fill one block of 100000"),
    ],
)
def test_invalid_settings_raise_a_clear_error(
    changes: dict[str, Any], message: str, inputs: Inputs, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, inputs.llm, **changes)


def test_a_text_tower_is_refused_since_it_has_no_language_modelling_head(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without the language-modelling head"):
        run(tmp_path, inputs.text)


def test_a_trained_head_is_refused_where_its_embedding_is_divided(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mntp_trainer, "is_divided", lambda trainer: True)
    model, args = LLM2CLIPTextModel.from_pretrained(inputs.text), MNTPRecipe(output_dir=str(tmp_path))
    head = torch.nn.Linear(model.config.hidden_size, 8, bias=False)
    with pytest.raises(ValueError, match="divide the token embedding"):
        mntp_trainer.MNTPTrainer(model=model, args=args, head=head)
    mntp_trainer.MNTPTrainer(model=model, args=args, head=head.requires_grad_(False))

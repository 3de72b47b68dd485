"""Stage 1 from its settings: training, resuming, results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from llm2clip.data import PairCollator
from llm2clip.trainers import run_stage1
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.utils.settings import build_config
from modeling_llm2clip import LLM2CLIPTextModel
from tests.llm2clip import tiny
from tests.llm2clip.conftest import Inputs
from tests.modeling_llm2clip import tiny as tiny_models


def run(folder: Path, llm: str, resume: bool = False, **changes: Any) -> dict[str, Any]:
    fields = {**tiny.stage1_fields(folder, llm), **changes}
    return run_stage1.run(build_config(Stage1Recipe, fields), resume=resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return LLM2CLIPTextModel.from_pretrained(folder).state_dict()


def test_result_is_a_text_tower_that_loads_with_auto_classes(inputs: Inputs, tmp_path: Path) -> None:
    gloss_test = {"path": tiny.GLOSSES, "split": "test", "anchor_column": "lemmas", "positive_column": "gloss"}
    metrics = run(
        tmp_path,
        inputs.llm,
        eval_sources={"glosses": gloss_test},
        eval_strategy="steps",
        eval_steps=3,
        report_to="tensorboard",
    )
    assert metrics["eval_glosses_num_targets"] == 586
    assert list(tmp_path.rglob("events.out.tfevents.*"))
    model = AutoModel.from_pretrained(tmp_path)
    assert isinstance(model, LLM2CLIPTextModel)
    assert (tmp_path / "modeling_llm2clip_text.py").exists()
    ids = AutoTokenizer.from_pretrained(tmp_path)("a dog")["input_ids"]
    assert len(ids) > model.config.num_prefix_tokens == 8
    before = LLM2CLIPTextModel.from_decoder(inputs.llm)
    assert not model.decoder.layers[0].mlp.up_proj.weight.equal(before.decoder.layers[0].mlp.up_proj.weight)


def test_checkpoints_contain_adapter_tokenizer_and_code(inputs: Inputs, tmp_path: Path) -> None:
    run(tmp_path, inputs.llm, max_steps=3)
    checkpoint = tmp_path / "checkpoint-3"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_model.safetensors", "config.json", "tokenizer.json", "modeling_llm2clip_text.py"} <= names
    assert "model.safetensors" not in names
    loaded = LLM2CLIPTextModel.from_pretrained(checkpoint).eval()
    merged = LLM2CLIPTextModel.from_pretrained(tmp_path).eval()
    ids = torch.randint(1, 400, (2, 9))
    torch.testing.assert_close(loaded(ids).pooler_output, merged(ids).pooler_output, atol=1e-5, rtol=1e-4)


def test_resumed_run_equals_an_uninterrupted_run(inputs: Inputs, tmp_path: Path) -> None:
    run(tmp_path / "unbroken", inputs.llm, lora_dropout=0.1)
    run(tmp_path / "broken", inputs.llm, lora_dropout=0.1)
    expected = weights(tmp_path / "unbroken")
    for name in ("model.safetensors", "config.json", "trainer_state.json"):
        (tmp_path / "broken" / name).unlink()
    killed = tmp_path / "broken" / "checkpoint-6"
    (killed / "trainer_state.json").unlink()  # as if it was killed while it saved
    run(tmp_path / "broken", inputs.llm, resume=True, lora_dropout=0.1)
    for name, value in weights(tmp_path / "broken").items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


def test_a_finished_run_is_not_overwritten(inputs: Inputs, tmp_path: Path) -> None:
    run(tmp_path / "a", inputs.llm, max_steps=3)
    with pytest.raises(FileExistsError, match=r"already contains a run \(checkpoint-3\); add --resume"):
        run(tmp_path / "a", inputs.llm)
    run(tmp_path / "b", inputs.llm, max_steps=1, save_strategy="no")
    with pytest.raises(FileExistsError, match=r"already contains a run \(model.safetensors\)"):
        run(tmp_path / "b", inputs.llm)


@pytest.mark.parametrize("start", ["llm", "text"])
def test_adapter_can_be_kept_and_loads_over_what_it_was_trained_on(start: str, inputs: Inputs, tmp_path: Path) -> None:
    """Start from a plain LLM, and from a text tower with other weights than its LLM."""
    unset: dict[str, Any] = {"prompt_prefix": None, "prompt_suffix": None, "max_text_length": None}
    fields = {"max_steps": 2, "save_strategy": "no", **(unset if start == "text" else {})}
    run(tmp_path / "merged", getattr(inputs, start), **fields)
    run(tmp_path / "adapter", getattr(inputs, start), save_format="adapter", **fields)
    adapter = LLM2CLIPTextModel.from_pretrained(tmp_path / "adapter")
    assert adapter.has_adapter
    ids = torch.randint(1, 400, (2, 9))
    expected = LLM2CLIPTextModel.from_pretrained(tmp_path / "merged").eval()(ids).pooler_output
    for load in (LLM2CLIPTextModel.from_pretrained, AutoModel.from_pretrained):
        torch.testing.assert_close(
            load(tmp_path / "adapter").eval()(ids).pooler_output, expected, atol=1e-5, rtol=1e-4
        )


def test_training_truncates_captions_like_encoding(inputs: Inputs) -> None:
    tokenizer = AutoTokenizer.from_pretrained(inputs.text)
    pair = {"anchor": "a word " * 90, "positive": "b", "negative": None, "instruction": None, "source": "x"}
    batch = PairCollator(tokenizer, 8)([{**pair, "positive_instruction": None}])
    assert batch["anchor"]["input_ids"].shape == (1, 64)
    assert batch["num_truncated"] == 1


def test_best_checkpoint_is_loaded_at_the_end(inputs: Inputs, tmp_path: Path) -> None:
    gloss_test = {"path": tiny.GLOSSES, "split": "test", "anchor_column": "lemmas", "positive_column": "gloss"}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_glosses_mean_rank"}
    changes = {"eval_sources": {"glosses": gloss_test}, "eval_strategy": "steps", "eval_steps": 3, **best}
    metrics = run(tmp_path, inputs.llm, greater_is_better=True, **changes)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    ranks = [entry["eval_glosses_mean_rank"] for entry in history if "eval_glosses_mean_rank" in entry]
    assert metrics["eval_glosses_mean_rank"] == pytest.approx(max(ranks[:2]), abs=0.5)


def test_full_fine_tuning_without_lora(inputs: Inputs, tmp_path: Path) -> None:
    run(tmp_path, inputs.llm, lora_rank=0, max_steps=1, save_strategy="no")
    trained = weights(tmp_path)["decoder.embed_tokens.weight"]
    assert not trained.equal(LLM2CLIPTextModel.from_decoder(inputs.llm).decoder.embed_tokens.weight)


def test_training_a_text_tower_keeps_its_prompt(inputs: Inputs, tmp_path: Path) -> None:
    unset = {"prompt_prefix": None, "prompt_suffix": None, "max_text_length": None}
    run(tmp_path, inputs.text, max_steps=1, save_strategy="no", **unset)
    assert LLM2CLIPTextModel.from_pretrained(tmp_path).config.prompt_prefix == tiny_models.PREFIX
    with pytest.raises(ValueError, match="defines the prompt; remove prompt_prefix, prompt_suffix"):
        run(tmp_path / "again", inputs.text)
    with pytest.raises(ValueError, match="remove bidirectional"):
        run(tmp_path / "again", inputs.text, bidirectional=False, **unset)


def test_bfloat16_trains_with_and_without_an_accelerator(inputs: Inputs, tmp_path: Path) -> None:
    losses = [
        run(tmp_path / str(bf16), inputs.llm, bf16=bf16, save_strategy="no")["train_loss"] for bf16 in (False, True)
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_hard_negatives_and_instructions_reach_the_loss(inputs: Inputs, tmp_path: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(
        "\n".join(f'{{"q": "word {i}", "d": "meaning {i}", "n": "nonsense {i}"}}' for i in range(40)), encoding="utf-8"
    )
    source = {"path": str(rows), "anchor_column": "q", "positive_column": "d"}
    losses = []
    for extra in ({}, {"negative_column": "n"}, {"instruction": "Retrieve the meaning; "}):
        metrics = run(
            tmp_path / str(len(losses)), inputs.llm, sources=[source | extra], max_steps=1, save_strategy="no"
        )
        losses.append(metrics["train_loss"])
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": []}, "Stage1Recipe needs sources"),
        ({"model_name_or_path": ""}, "needs model_name_or_path"),
        ({"dtype": "float31"}, "dtype is 'float31', but it has to be one of float32"),
        ({"save_format": "zip"}, "save_format is 'zip', but it has to be one of merged, adapter"),
        ({"lora_rank": 0, "save_format": "adapter"}, "needs LoRA, but lora_rank is 0"),
        ({"sources": [{"path": tiny.GLOSSES, "anchor_colum": "lemmas"}]}, "did you mean 'anchor_column'"),
        ({"sources": [{"path": tiny.GLOSSES, "anchor_column": "word", "positive_column": "gloss"}]}, "lemmas"),
        ({"per_device_train_batch_size": 100_000}, "batch"),
    ],
)
def test_invalid_settings_raise_a_clear_error(
    changes: dict[str, Any], message: str, inputs: Inputs, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, inputs.llm, **changes)

"""Stage 1 and masked next token prediction: what trains, what the result keeps, what is refused, and MNTP's tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from llm2clip.command_line.settings import build_config
from llm2clip.data import CaptionSource, distinct_captions
from llm2clip.data.sampling import SampleIndex
from llm2clip.trainers import mntp_data, mntp_trainer
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.mntp_data import MaskCollator, TokenBlocks, source_tokens
from modeling_llm2clip import LLM2CLIPTextModel
from tests.builders import small_runs, tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.trainers.stages import assert_equal, fields_of, run

QUICK: dict[str, Any] = {"max_steps": 1, "save_strategy": "no"}
# What a text tower has of its own.
UNSET = {"prompt_prefix": None, "prompt_suffix": None, "max_text_length": None}


def changed(inputs: Inputs, folder: Path) -> set[str]:
    """The weights of the LLM that a run has trained."""
    before = AutoModel.from_pretrained(inputs.llm).state_dict()
    after = LLM2CLIPTextModel.from_pretrained(folder).decoder.state_dict()
    return {name for name, value in after.items() if not value.equal(before[name])}


def test_lora_trains_the_projections_and_full_fine_tuning_all(inputs: Inputs, tmp_path: Path) -> None:
    run("stage1", tmp_path / "full", inputs, lora_rank=0, **QUICK)
    assert "embed_tokens.weight" in changed(inputs, tmp_path / "full")
    for stage in ("mntp", "stage1"):
        run(stage, tmp_path / stage, inputs, **QUICK)
        found = changed(inputs, tmp_path / stage)
        assert found
        assert all("proj" in name for name in found)


def test_stage1_trains_a_text_tower_on_and_keeps_its_prompt(inputs: Inputs, tmp_path: Path) -> None:
    run("mntp", tmp_path / "mntp", inputs, **QUICK)
    text = {"model_name_or_path": str(tmp_path / "mntp"), **QUICK}
    run("stage1", tmp_path / "stage1", inputs, **text, **UNSET)
    assert LLM2CLIPTextModel.from_pretrained(tmp_path / "stage1").config.prompt_prefix == tiny.PREFIX
    # As the packaged recipes do, one after the other: the prompt is named again.
    run("stage1", tmp_path / "again", inputs, **text)
    assert_equal(tmp_path / "again", tmp_path / "stage1")
    with pytest.raises(ValueError, match=r"defines the prompt; remove prompt_prefix\.$"):
        run("stage1", tmp_path / "other", inputs, **text, prompt_prefix="Caption: ")
    with pytest.raises(ValueError, match="remove bidirectional"):
        run("stage1", tmp_path / "other", inputs, **text, **UNSET, bidirectional=False)


@pytest.mark.parametrize("start", ["llm", "text"])
def test_an_adapter_loads_over_what_it_was_trained_on(start: str, inputs: Inputs, tmp_path: Path) -> None:
    fields = {"model_name_or_path": getattr(inputs, start), **(UNSET if start == "text" else {}), **QUICK}
    for form in ("merged", "adapter"):
        run("stage1", tmp_path / form, inputs, save_format=form, **fields)
    assert LLM2CLIPTextModel.from_pretrained(tmp_path / "adapter").has_adapter
    ids = torch.randint(1, 400, (2, 9))
    merged, adapter = (AutoModel.from_pretrained(tmp_path / form).eval()(ids) for form in ("merged", "adapter"))
    torch.testing.assert_close(adapter.pooler_output, merged.pooler_output, atol=1e-5, rtol=1e-4)


def test_hard_negatives_and_instructions_reach_the_loss(inputs: Inputs, tmp_path: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("\n".join(f'{{"q": "word {i}", "d": "meaning {i}", "n": "nonsense {i}"}}' for i in range(40)))
    source = {"path": str(rows), "anchor_column": "q", "positive_column": "d"}
    losses = set()
    for extra in ({}, {"negative_column": "n"}, {"instruction": "Retrieve the meaning; "}):
        metrics = run("stage1", tmp_path / str(len(losses)), inputs, sources=[source | extra], **QUICK)
        losses.add(metrics["train_loss"])
    assert len(losses) == 3


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("stage1", {"sources": []}, "Stage1Recipe needs sources"),
        ("stage1", {"model_name_or_path": ""}, "needs model_name_or_path"),
        ("stage1", {"dtype": "float31"}, "dtype is 'float31'"),
        (
            "stage1",
            {"lora_rank": 0, "save_format": "adapter"},
            "save_format is adapter, but it needs lora_rank above 0",
        ),
        ("stage1", {"lora_rank": -1}, "lora_rank must be at least 0"),
        ("mntp", {"sources": [small_runs.concepts(weight=2)]}, "weight is 2.0, but .* is read without it here"),
        (
            "stage1",
            {"sources": [{"path": small_runs.GLOSSES, "anchor_colum": "lemmas"}]},
            "did you mean 'anchor_column'",
        ),
        (
            "stage1",
            {"sources": [{"path": small_runs.GLOSSES, "anchor_column": "a", "positive_column": "gloss"}]},
            "lemmas",
        ),
        ("stage1", {"per_device_train_batch_size": 100_000}, "batch"),
        ("mntp", {"mask_token": "<nothing>"}, "mask_token '<nothing>' is not a token"),
        ("mntp", {"block_size": 100_000}, "do not fill one block of 100000"),
    ],
)
def test_settings_that_do_not_fit(
    stage: str, changes: dict[str, Any], message: str, inputs: Inputs, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(stage, tmp_path, inputs, **changes)


def test_mntp_refuses_a_text_tower_and_a_trained_head_whose_embedding_is_sharded(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="without the language-modelling head"):
        run("mntp", tmp_path, inputs, model_name_or_path=inputs.text)
    monkeypatch.setattr(mntp_trainer, "is_sharded", lambda trainer: True)
    model, args = LLM2CLIPTextModel.from_pretrained(inputs.text), MNTPRecipe(output_dir=str(tmp_path))
    head = torch.nn.Linear(model.config.hidden_size, 8, bias=False)
    with pytest.raises(ValueError, match="shards the token embedding"):
        mntp_trainer.MNTPTrainer(model=model, args=args, head=head)
    mntp_trainer.MNTPTrainer(model=model, args=args, head=head.requires_grad_(False))


def test_masks_depend_only_on_seed_and_sample(inputs: Inputs, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(inputs.llm)
    collate = MaskCollator(tokenizer, build_config(MNTPRecipe, fields_of("mntp", tmp_path, inputs)))
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


def only_once(monkeypatch: pytest.MonkeyPatch) -> Callable[..., np.ndarray]:
    """From now on, tokens that are computed are an error, and so are captions that are held for it."""

    def forbidden(*_: Any) -> Any:
        raise AssertionError("computed again")

    for name in ("token_batches", "distinct_captions"):
        monkeypatch.setattr(mntp_data, name, forbidden)
    return source_tokens


def test_the_tokens_of_tables_and_streams_are_computed_once_and_held_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two captions a row; each of the first column appears twice."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = small_runs.write_text_pairs(tmp_path / "rows.parquet", 200)

    def sources(**fields: Any) -> list[CaptionSource]:
        return [CaptionSource(path, caption_columns=["short", "long"], max_samples=150, **fields)]

    tokenizer = tiny.plain_tokenizer()
    texts = distinct_captions(sources())
    assert len(texts) == 1.5 * 150
    expected = [token for ids in tokenizer(texts)["input_ids"] for token in ids]
    for streaming in (False, True):
        tokens = source_tokens(sources(streaming=streaming), tokenizer)
        assert tokens.tolist() == expected
        with monkeypatch.context() as patch:
            again = only_once(patch)
            held = again(sources(streaming=streaming), tokenizer)
            assert isinstance(held, np.memmap)
            assert np.array_equal(held, tokens)
            fewer = [CaptionSource(path, caption_columns=["short"], max_samples=150, streaming=streaming)]
            with pytest.raises(AssertionError, match="computed again"):
                again(fewer, tokenizer)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(AssertionError, match="computed again"):
        only_once(monkeypatch)(sources(), tokenizer)

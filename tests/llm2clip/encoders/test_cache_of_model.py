"""Whether a cache belongs to a model: adapters, stale records, tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from llm2clip.command_line.settings import build_config
from llm2clip.encoders import embed
from llm2clip.encoders.cache_of_model import open_cache_of_model
from llm2clip.models.towers import describe_text_tower, open_text_tower
from llm2clip.store import EmbeddingCache, StoreMismatchError
from llm2clip.trainers import run_stage1, run_stage2
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel
from tests.builders import small_runs
from tests.llm2clip.conftest import Inputs


def config_of(text: str, **fields: Any) -> LLM2CLIPConfig:
    text_config, _ = describe_text_tower(text)
    fields = {"text_model_fingerprint": text_config.fingerprint, **fields}
    return LLM2CLIPConfig(text_config=text_config, text_model_name_or_path=text, **fields)


@pytest.mark.parametrize(("start", "dtype"), [("llm", "float32"), ("text", "bfloat16")])
def test_stage_1_with_an_adapter_then_embed_then_stage_2(
    start: str, dtype: str, inputs: Inputs, tmp_path: Path
) -> None:
    text, cache = str(tmp_path / "text"), str(tmp_path / "cache")
    fields = small_runs.stage1_fields(Path(text), getattr(inputs, start))
    unset = dict.fromkeys(("prompt_prefix", "prompt_suffix", "max_text_length")) if start == "text" else {}
    fields |= {**unset, "save_format": "adapter", "max_steps": 2, "save_strategy": "no", "dtype": dtype}
    run_stage1.run(build_config(Stage1Recipe, fields))
    sources = [small_runs.concepts(), small_runs.concepts("validation", max_samples=40)]
    settings = {"text_model_name_or_path": text, "output_dir": cache, "sources": sources}
    embed.run(embed.EmbedConfig(**settings))
    fields = small_runs.stage2_fields(tmp_path / "out", inputs.vision, text, cache)
    run_stage2.run(build_config(Stage2Recipe, fields | {"max_steps": 1, "save_strategy": "no"}))
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["text_model_fingerprint"] == EmbeddingCache.open(cache).manifest.fingerprint


def test_a_plain_llm_has_the_prompt_that_its_cache_was_made_with(inputs: Inputs, tmp_path: Path) -> None:
    sources = [small_runs.concepts(), small_runs.concepts("validation", max_samples=40)]
    prompt = {"prompt_prefix": "caption: ", "prompt_suffix": " ."}
    settings = {"text_model_name_or_path": inputs.llm, "output_dir": str(tmp_path / "cache"), "sources": sources}
    embed.run(embed.EmbedConfig(**settings, **prompt))
    fields = small_runs.stage2_fields(tmp_path / "out", inputs.vision, inputs.llm, str(tmp_path / "cache"))
    run_stage2.run(build_config(Stage2Recipe, fields | {"max_steps": 1, "save_strategy": "no", "eval_sources": {}}))
    model = LLM2CLIPModel.from_pretrained(tmp_path / "out")
    assert {name: getattr(model.config.text_config, name) for name in prompt} == prompt
    captions = ["a dog", "two cats"]
    expected = open_text_tower(inputs.llm, dtype="float32", **prompt)
    found = model.text_model.float().eval().encode(captions, AutoTokenizer.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(found, expected[0].eval().encode(captions, expected[1]), atol=1e-4, rtol=1e-4)


def test_captions_with_an_instruction_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    """A model has none, so that its own embeddings would be others."""
    settings: dict[str, Any] = {"text_model_name_or_path": inputs.text, "instruction": "Find a picture:"}
    embed.run(embed.EmbedConfig(**settings, output_dir=str(tmp_path), sources=[small_runs.concepts(max_samples=8)]))
    _, tokenizer = describe_text_tower(inputs.text)
    with pytest.raises(StoreMismatchError, match=r"were embedded after '.*Find a picture:', but the model reads"):
        open_cache_of_model(tmp_path, config_of(inputs.text), tokenizer)


def test_a_cache_is_compared_by_what_the_model_records(inputs: Inputs) -> None:
    _, tokenizer = describe_text_tower(inputs.text)
    assert len(open_cache_of_model(inputs.cache, config_of(inputs.text), tokenizer))
    other = config_of(inputs.text, text_model_fingerprint="3-0")
    with pytest.raises(StoreMismatchError, match="in use has fingerprint 3-0"):
        open_cache_of_model(inputs.cache, other, tokenizer)
    assert len(open_cache_of_model(inputs.cache, config_of(inputs.text, text_model_fingerprint=None), tokenizer))


def test_a_cache_of_another_tokenizer_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    shutil.copytree(inputs.text, tmp_path / "text")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text")
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path / "text")
    fields = small_runs.stage2_fields(tmp_path / "out", inputs.vision, str(tmp_path / "text"), inputs.cache)
    with pytest.raises(StoreMismatchError, match=r"made with the tokenizer .* in use is"):
        run_stage2.run(build_config(Stage2Recipe, fields))

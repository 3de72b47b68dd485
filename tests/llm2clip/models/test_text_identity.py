"""The identity of a text tower and its tokenizer, from the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from transformers import AutoModel, AutoTokenizer

from llm2clip.models.prompting import with_prompt
from llm2clip.models.text_identity import read_fingerprint, tokenizer_fingerprint
from llm2clip.models.towers import describe_text_tower, open_text_tower, save_text_tower
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from tests.builders import tiny
from tests.llm2clip.conftest import Inputs


@pytest.mark.parametrize("kind", ["joint", "sharded", "bfloat16"])
def test_the_model_is_not_built(kind: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = open_text_tower(inputs.text)
    name = str(tmp_path)
    tokenizer.save_pretrained(name)
    if kind == "joint":
        clip = LLM2CLIPModel.from_vision_text_pretrained(inputs.vision, model, projection_dim=8)
        clip.save_pretrained(name, save_text_model=True)
    elif kind == "sharded":
        model.save_pretrained(name, max_shard_size="30KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    else:
        save_text_tower(model.to(torch.bfloat16), tokenizer, name)
    config, _ = describe_text_tower(name)
    for kind_of_model in (LLM2CLIPTextModel, AutoModel):
        monkeypatch.setattr(kind_of_model, "from_pretrained", None)
    assert read_fingerprint(name, None, config) == model.fingerprint()


def test_an_adapter_is_merged_for_its_identity(inputs: Inputs, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, tokenizer = open_text_tower(inputs.text)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.decoder = peft.get_peft_model(model.decoder, lora)
    model.decoder.peft_config["default"].base_model_name_or_path = inputs.text
    save_text_tower(model, tokenizer, tmp_path)
    config, _ = describe_text_tower(str(tmp_path))
    assert read_fingerprint(str(tmp_path), None, config) == config.fingerprint == model.fingerprint()
    for dtype in ("float32", "bfloat16"):
        assert open_text_tower(str(tmp_path), dtype=dtype)[0].fingerprint() == config.fingerprint


def test_identity_of_a_tokenizer_survives_saving(inputs: Inputs, tmp_path: Path) -> None:
    for name in (inputs.text, inputs.llm):
        _, tokenizer = open_text_tower(name)
        expected = tokenizer_fingerprint(tokenizer)
        tokenizer(["a", "a b c"], padding=True, truncation=True)
        tokenizer.padding_side = "right"
        assert tokenizer_fingerprint(tokenizer) == expected
        tokenizer.save_pretrained(tmp_path)
        assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == expected


def test_what_changes_the_tokens_changes_the_identity(tmp_path: Path) -> None:
    def prompted(**changes: Any) -> Any:
        options = {"prefix": tiny.PREFIX, "suffix": tiny.SUFFIX, "max_length": 64, **changes}
        return with_prompt(tiny.plain_tokenizer(), **options)[0]

    tokenizers = [prompted(**changes) for changes in ({}, {"prefix": "a "}, {"suffix": ""}, {"max_length": 32})]
    tokenizers += [prompted(), prompted()]
    tokenizers[-2].add_tokens(["zebra"])
    tokenizers[-1].backend_tokenizer.normalizer = normalizers.Lowercase()
    for change in (lambda model: model["merges"].pop(), lambda model: model["vocab"].update({"zebra": 9999})):
        tokenizers[0].save_pretrained(tmp_path)
        content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
        change(content["model"])
        (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        tokenizers.append(AutoTokenizer.from_pretrained(tmp_path))
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers}) == 8


@pytest.mark.parametrize("model_type", tiny.DECODERS)
def test_files_of_every_decoder_give_the_identity_of_the_model(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.text_model(model_type).decoder.save_pretrained(tmp_path)
    tiny.plain_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = open_text_tower(str(tmp_path))
    save_text_tower(model, tokenizer, tmp_path / "tower")
    monkeypatch.setattr(LLM2CLIPTextModel, "from_pretrained", None)
    for name in (str(tmp_path), str(tmp_path / "tower")):
        config, _ = describe_text_tower(name)
        assert read_fingerprint(name, None, config) == model.fingerprint() == model.config.fingerprint

"""`llm2clip convert` on LLMs: prompt and pooling, shards, several adapters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from llm2clip.models.towers import open_text_tower
from modeling_llm2clip import LLM2CLIPTextModel
from tests.builders import tiny
from tests.llm2clip.convert.checkpoints import convert
from tests.llm2clip.convert.conftest import Refused

NAME = "meta-llama/Meta-Llama-3-8B-Instruct"


def llm_folder(folder: Path, model_type: str = "llama", **options: Any) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny.decoder_config(model_type))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder, **options)
    tiny.plain_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_converted_llm_gives_the_embeddings_of_the_llm_with_the_prompt(
    shard: str, tmp_path: Path, capsys: Any
) -> None:
    source = llm_folder(tmp_path / "llm", max_shard_size=shard)
    assert (Path(source) / "model.safetensors.index.json").exists() == (shard == "20KB")
    convert(source, tmp_path / "out", "--prompt-name", NAME)
    assert "lm_head.weight: the language modeling head" in capsys.readouterr().out
    tower = LLM2CLIPTextModel.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected, expected_tokenizer = open_text_tower(source, prompt_prefix=tiny.PREFIX, prompt_suffix=tiny.SUFFIX)
    captions = ["a red squirrel", "a steam train in the snow"]
    assert tokenizer(captions)["input_ids"] == expected_tokenizer(captions)["input_ids"]
    embeds = expected.encode(captions, expected_tokenizer)
    torch.testing.assert_close(tower.encode(captions, tokenizer), embeds, atol=1e-6, rtol=1e-5)
    assert tower.config.fingerprint == expected.fingerprint() == tower.fingerprint()
    assert tower.config.num_prefix_tokens == expected.config.num_prefix_tokens > 1
    written = {path.suffix or path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"LICENSE-CODE", ".json", ".md", ".py", ".safetensors"}
    stranger = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(stranger.encode(captions, tokenizer), embeds, atol=1e-6, rtol=1e-5)


def test_name_in_the_config_selects_the_prompt(tmp_path: Path) -> None:
    source = llm_folder(tmp_path / "llm")
    config = Path(source) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_name_or_path": NAME}))
    convert(source, tmp_path / "out")
    assert LLM2CLIPTextModel.from_pretrained(tmp_path / "out").config.prompt_suffix == "<|eot_id|>"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "are missing: decoder.layers.1.mlp.up_proj.weight"),
        ("model.norm.weight", torch.ones(7), "shapes that differ"),
        ("model.norm.weight", torch.full((tiny.HIDDEN,), float("nan")), "NaN"),
    ],
    ids=["missing", "shape", "nan"],
)
def test_damaged_llms_are_refused(name: str, value: Any, message: str, tmp_path: Path, refused: Refused) -> None:
    source = llm_folder(tmp_path / "llm")
    path = Path(source) / "model.safetensors"
    state = {**load_file(path), name: value}
    save_file({key: weight for key, weight in state.items() if weight is not None}, path, metadata={"format": "pt"})
    refused(message, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def lora(source: str, folder: Path, seed: int, **fields: Any) -> str:
    torch.manual_seed(seed)
    model = AutoModel.from_pretrained(source)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **fields})
    adapter = get_peft_model(model, config)
    for name, parameter in adapter.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapter.save_pretrained(folder)
    return str(folder)


def test_several_adapters_are_merged_in_order(tmp_path: Path) -> None:
    source = llm_folder(tmp_path / "llm")
    stack = [lora(source, tmp_path / "mntp", 1), lora(source, tmp_path / "supervised", 2, r=8, use_rslora=True)]
    convert(source, tmp_path / "out", "--prompt-name", NAME, "--adapters", *stack)
    tower = LLM2CLIPTextModel.from_pretrained(tmp_path / "out")
    base = AutoModel.from_pretrained(source)
    weight = base.layers[0].self_attn.q_proj.weight.detach().clone()
    for folder, scale in zip(stack, (8 / 4, 8 / 8**0.5), strict=True):
        state = load_file(Path(folder) / "adapter_model.safetensors")
        name = "base_model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        weight += scale * state[name.format("B")] @ state[name.format("A")]
    torch.testing.assert_close(tower.decoder.layers[0].self_attn.q_proj.weight, weight, atol=1e-5, rtol=1e-5)


def test_adapter_with_other_layer_names_is_refused(tmp_path: Path, refused: Refused) -> None:
    source = llm_folder(tmp_path / "llm")
    path = Path(lora(source, tmp_path / "adapter", 1)) / "adapter_model.safetensors"
    state = load_file(path).items()
    save_file({name.replace("model.model.", "model.model.lm."): value for name, value in state}, path)
    message = "has no weights for 12 of the layers in its config"
    refused(message, source, tmp_path / "out", "--adapters", path.parent)
    assert not (tmp_path / "out").exists()


def test_an_llm_that_cannot_be_a_text_tower_is_not_converted(tmp_path: Path, refused: Refused) -> None:
    config = AutoConfig.for_model("lfm2", **tiny.DECODER, layer_types=["conv", "full_attention"])
    AutoModel.from_config(config).save_pretrained(tmp_path / "llm")
    tiny.plain_tokenizer().save_pretrained(tmp_path / "llm")
    message = r"lfm2 \(layers: conv, full_attention\) cannot be a text tower"
    refused(message, tmp_path / "llm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_conversion_holds_one_shard_in_memory(tmp_path: Path) -> None:
    """Peak memory above that of the imports is less than 1.3 x the largest shard + 300 MiB."""
    config = tiny.decoder_config()
    config.update({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8})
    config.update({"num_key_value_heads": 8, "head_dim": 128})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm", max_shard_size="150MB")
    tiny.plain_tokenizer().save_pretrained(tmp_path / "llm")
    sizes = [path.stat().st_size for path in (tmp_path / "llm").glob("*.safetensors")]
    assert sum(sizes) > 600e6
    script = """
import resource, sys
from llm2clip import cli
from llm2clip.convert import conversion
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
before = status("VmRSS")
assert cli.main(["convert", sys.argv[1], sys.argv[2]]) == 0
print("PEAK", 1024 * (status("VmHWM") - before))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "llm"), str(tmp_path / "out")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak = int(output.rpartition("PEAK")[2])
    assert peak < 1.3 * max(sizes) + 300 * 2**20, (peak, max(sizes))

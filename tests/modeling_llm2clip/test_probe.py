"""The probe of decoders: which can be a text tower, when it runs, and that it leaves no trace."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModel

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextConfig, LLM2CLIPTextModel
from modeling_llm2clip import modeling_llm2clip_probe as probe
from tests.modeling_llm2clip import tiny
from tests.modeling_llm2clip.test_packing import FlashOnCPU, flash  # noqa: F401

MAKE_MODELS = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "make_models.py"))
REFUSED = {
    "bloom": "cannot run with a mask",
    "jamba": "layers: linear_attention, full_attention",
    "lfm2": "layers: conv, full_attention",
    "mamba": "cannot run with a mask",
    "mamba2": "first tokens do not see its last one",
    "qwen3_next": "layers: linear_attention, full_attention",
    "recurrent_gemma": "depend on its neighbour in a row",
    "rwkv": "first tokens do not see its last one",
}


@contextmanager
def embedded_batches() -> Iterator[list[Any]]:
    """Collect the token ids of every forward pass in this context."""
    batches: list[Any] = []

    def record(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding):
            batches.append(args[0])

    handle = register_module_forward_pre_hook(record)
    try:
        yield batches
    finally:
        handle.remove()


def forget_verdict(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config", {})):
        part.pop("verified_attention", None)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("model_type", REFUSED)
def test_decoders_that_would_mix_captions_are_refused(model_type: str) -> None:
    decoder = MAKE_MODELS["small_decoder"](model_type)
    with pytest.raises(
        ValueError, match=f"{model_type}.* cannot be a text tower: .*Use another LLM, such as"
    ) as found:
        LLM2CLIPTextModel.from_decoder(decoder)
    # As Jamba calls its layers before transformers 5.16.
    message = str(found.value).replace("layers: mamba, attention", "layers: linear_attention, full_attention")
    assert REFUSED[model_type] in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", tiny.DECODERS)
def test_the_verdict_is_remembered(model_type: str, dtype: torch.dtype) -> None:
    decoder = AutoModel.from_config(tiny.decoder_config(model_type)).to(dtype)
    assert LLM2CLIPTextModel.from_decoder(decoder).config.verified_attention == ["mask"]


def test_the_probe_leaves_no_trace() -> None:
    config = tiny.decoder_config("qwen3")
    config.attention_dropout = 0.5
    decoder = AutoModel.from_config(config).train()
    decoder.layers[0].eval()
    modes = [module.training for module in decoder.modules()]
    state = torch.random.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        LLM2CLIPTextModel.from_decoder(decoder)
    assert torch.random.get_rng_state().equal(state)
    assert [module.training for module in decoder.modules()] == modes
    assert all(weight.grad is None and weight.requires_grad for weight in decoder.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("model_type", "runs"), [("qwen3", True), ("llama", False)])
def test_a_saved_tower_is_probed_only_without_a_verdict(model_type: str, runs: bool, tmp_path: Path) -> None:
    decoder = AutoModel.from_config(tiny.decoder_config(model_type))
    LLM2CLIPTextModel.from_decoder(decoder).save_pretrained(tmp_path)
    with embedded_batches() as batches:
        assert LLM2CLIPTextModel.from_pretrained(tmp_path).config.verified_attention == ["mask"]
    assert not batches
    forget_verdict(tmp_path)
    with embedded_batches() as batches:
        LLM2CLIPTextModel.from_pretrained(tmp_path)
    assert bool(batches) == runs
    assert all(ids.numel() <= 24 for ids in batches)


@pytest.mark.parametrize("model_type", ["lfm2", "mamba"])
def test_an_old_tower_of_a_refused_type_is_refused_when_it_is_loaded(model_type: str, tmp_path: Path) -> None:
    decoder = MAKE_MODELS["small_decoder"](model_type)
    config = LLM2CLIPTextConfig(decoder_config=decoder.config)
    tower = LLM2CLIPTextModel(config)
    tower.decoder.load_state_dict(decoder.state_dict())
    tower.save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="cannot be a text tower"):
        LLM2CLIPTextModel.from_pretrained(tmp_path / "tower")
    LLM2CLIPModel(tiny.joint_config(text=config)).save_pretrained(tmp_path / "joint")
    with pytest.raises(ValueError, match="cannot be a text tower"):
        LLM2CLIPModel.from_pretrained(tmp_path / "joint")


def test_a_causal_baseline_is_not_probed() -> None:
    decoder = MAKE_MODELS["small_decoder"]("mamba2")
    with embedded_batches() as batches:
        tower = LLM2CLIPTextModel.from_decoder(decoder, bidirectional=False)
    assert not batches
    assert tower.config.verified_attention is None


def test_weights_that_are_not_here_are_not_judged() -> None:
    with torch.device("meta"):
        decoder = AutoModel.from_config(tiny.decoder_config("qwen3"))
        assert LLM2CLIPTextModel.from_decoder(decoder).config.verified_attention is None
    zeros = AutoModel.from_config(tiny.decoder_config("qwen3"))
    for weight in zeros.parameters():
        weight.data.zero_()
    assert LLM2CLIPTextModel.from_decoder(zeros).config.verified_attention is None


def test_another_attention_implementation_has_its_own_verdict() -> None:
    model = tiny.text_model("qwen3")
    model.set_attn_implementation("eager")
    assert model.config.verified_attention == ["mask"]
    model.set_attn_implementation("flex_attention")
    assert model.config.verified_attention == ["mask", "flex_attention"]


@pytest.mark.parametrize(
    ("model_type", "fault"),
    [("qwen3", None), ("stablelm", "do not see its last one"), ("gpt_oss", "depend on the attention implementation")],
)
def test_flash_attention_is_refused_where_it_reads_captions_differently(
    model_type: str,
    fault: str | None,
    flash: FlashOnCPU,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tower = LLM2CLIPTextModel.from_decoder(MAKE_MODELS["small_decoder"](model_type))
    tower.decoder.config._attn_implementation_internal = "flash_attention_2"
    probe.verify_decoder(tower)
    assert not flash.sequences, "a CPU has no flash attention"
    monkeypatch.setattr(probe, "_kind_here", lambda tower: probe.attention_kind(tower.decoder))
    if fault is None:
        probe.verify_decoder(tower)
        assert tower.config.verified_attention == ["mask", "flash_attention_2"]
    else:
        with pytest.raises(ValueError, match=f"{fault}.*Use attn_implementation='sdpa', or another LLM"):
            probe.verify_decoder(tower)
    assert flash.sequences


@pytest.mark.parametrize("asked", ["flex_attention", {"text_config": "flex_attention"}])
def test_a_joint_model_refuses_the_attention_that_its_text_tower_refuses(asked: Any) -> None:
    tower = LLM2CLIPTextModel.from_decoder(MAKE_MODELS["small_decoder"]("gpt_oss"))
    model = LLM2CLIPModel(tiny.joint_config(text=tower.config), text_model=False)
    model.set_text_model(tower)
    before = tower.decoder.config._attn_implementation
    refusals = []
    for door, kind in ((tower, "flex_attention"), (model, asked)):
        with pytest.raises(ValueError, match=r"gpt_oss .*flex_attention attention cannot be a text tower") as found:
            door.set_attn_implementation(kind)
        refusals.append(str(found.value))
        # What was refused is not in use.
        assert tower.decoder.config._attn_implementation == before
        assert model.vision_model.config._attn_implementation == "sdpa"
    assert refusals[0] == refusals[1]
    assert "flex_attention" not in tower.config.verified_attention


def test_a_joint_model_remembers_the_verdict_of_its_text_tower() -> None:
    model = tiny.joint_model(text=tiny.text_config("qwen3"))
    model.set_attn_implementation("flex_attention")
    assert model.config.text_config.verified_attention == ["flex_attention"]
    model.text_model.set_attn_implementation("eager")
    assert model.config.text_config.verified_attention == ["flex_attention", "mask"]

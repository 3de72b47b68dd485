"""The probe of decoders, which can be a text tower, that it leaves no trace, and what runs without its record."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from llm2clip.models import attention_probe
from llm2clip.models.attention_probe import packs_exactly, probe_attention, probe_from_disk, verify_text_tower
from llm2clip.models.towers import open_text_tower
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from modeling_llm2clip.modeling_llm2clip_decoder import attention_kind, packs_by_flags, unknown_attention
from tests.builders import tiny
from tests.llm2clip.models.decoders import DECODERS, ENCODERS, embedded_batches, small_model
from tests.modeling_llm2clip.flash import FlashOnCPU

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
# Refused too, as docs/models.md says.
ALSO_REFUSED = ("fnet", "gpt_neo", "roformer")


def probed(decoder: Any, **fields: Any) -> LLM2CLIPTextModel:
    tower = LLM2CLIPTextModel.from_decoder(decoder, **fields)
    probe_attention(tower)
    return tower


IDS = torch.arange(2, 9)[None]


@pytest.mark.parametrize("model_type", REFUSED)
def test_decoders_that_would_mix_captions_are_refused(model_type: str) -> None:
    tower = LLM2CLIPTextModel.from_decoder(small_model(model_type))
    with pytest.raises(
        ValueError, match=f"{model_type}.* cannot be a text tower: .*Use another LLM, such as"
    ) as found:
        verify_text_tower(tower)
    # As Jamba calls its layers before transformers 5.16.
    message = str(found.value).replace("layers: mamba, attention", "layers: linear_attention, full_attention")
    assert REFUSED[model_type] in message
    with pytest.raises(ValueError, match=f"{model_type} .* has no record of it .*llm2clip.open_text_tower"):
        tower(IDS)


@pytest.mark.parametrize("model_type", [*DECODERS, *ENCODERS])
def test_no_model_that_the_probe_refuses_computes_or_packs_by_flags(model_type: str) -> None:
    tower = LLM2CLIPTextModel.from_decoder(small_model(model_type))
    if packs_by_flags(tower.decoder):
        assert packs_exactly(tower)
    if model_type in (*REFUSED, *ALSO_REFUSED):
        with pytest.raises(ValueError, match="cannot be a text tower"):
            verify_text_tower(tower)
        assert "is not known to be a text tower" in str(unknown_attention(tower.decoder, tower.config))
    else:
        verify_text_tower(tower)
        assert unknown_attention(tower.decoder, tower.config) is None
        assert tower(IDS).pooler_output.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", tiny.DECODERS)
def test_the_result_is_recorded(model_type: str, dtype: torch.dtype) -> None:
    decoder = AutoModel.from_config(tiny.decoder_config(model_type)).to(dtype)
    assert probed(decoder).config.verified_attention == ["mask"]


def test_the_probe_leaves_no_trace() -> None:
    config = tiny.decoder_config("qwen3")
    config.attention_dropout = 0.5
    decoder = AutoModel.from_config(config).train()
    decoder.layers[0].eval()
    modes, state = [module.training for module in decoder.modules()], torch.random.get_rng_state()
    probed(decoder)
    assert torch.random.get_rng_state().equal(state)
    assert [module.training for module in decoder.modules()] == modes
    assert all(weight.grad is None and weight.requires_grad for weight in decoder.parameters())


@pytest.mark.parametrize("with_record", [True, False])
@pytest.mark.parametrize("model_type", ["qwen3", "falcon"])
def test_the_record_is_saved_and_a_model_that_needs_it_is_refused_without(
    model_type: str, with_record: bool, tmp_path: Path
) -> None:
    """By the flags of transformers, Falcon may not follow a mask."""
    small_model(model_type).save_pretrained(tmp_path / "llm")
    tiny.plain_tokenizer().save_pretrained(tmp_path / "llm")
    tower, _ = open_text_tower(str(tmp_path / "llm"))
    assert probe_from_disk(str(tmp_path / "llm")) == ["mask"]
    if not with_record:
        tower.config.verified_attention = None
    tower.save_pretrained(tmp_path / "tower")
    LLM2CLIPModel(tiny.joint_config(text=tower.config)).save_pretrained(tmp_path / "joint")
    for part, kind in (("tower", LLM2CLIPTextModel), ("joint", LLM2CLIPModel)):
        with embedded_batches() as batches:
            model = kind.from_pretrained(tmp_path / part)
        assert not batches, "the code of a model does not probe"
        if with_record or model_type == "qwen3":
            model(IDS)
        else:
            with pytest.raises(ValueError, match=r"falcon with sdpa attention .*open_text_tower"):
                model(IDS)


def test_a_causal_baseline_is_not_probed() -> None:
    decoder = small_model("mamba2")
    with embedded_batches() as batches:
        tower = probed(decoder, bidirectional=False)
    assert not batches
    tower(IDS)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_another_attention_implementation_has_its_own_record() -> None:
    tower = probed(small_model("olmo2"))
    tower.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"olmo2 with flex_attention .*, or use attn_implementation='sdpa'"):
        tower(IDS)
    verify_text_tower(tower)
    assert tower.config.verified_attention == ["mask", "flex_attention"]
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        tower(IDS)


@pytest.mark.parametrize(
    ("model_type", "fault"),
    [("qwen3", None), ("stablelm", "do not see its last one"), ("gpt_oss", "depend on the attention implementation")],
)
def test_flash_attention_is_refused_where_it_reads_captions_differently(
    model_type: str, fault: str | None, flash: FlashOnCPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = probed(small_model(model_type))
    tower.decoder.config._attn_implementation_internal = "flash_attention_2"
    probe_attention(tower)
    assert not flash.sequences, "a CPU has no flash attention"
    monkeypatch.setattr(attention_probe, "_kind_here", lambda tower: attention_kind(tower.decoder))
    if fault is None:
        probe_attention(tower)
        assert tower.config.verified_attention == ["mask", "flash_attention_2"]
    else:
        with pytest.raises(ValueError, match=f"{fault}.*Use attn_implementation='sdpa'"):
            probe_attention(tower)
    assert flash.sequences


@pytest.mark.parametrize("asked", ["flex_attention", {"text_config": "flex_attention"}])
def test_a_joint_model_does_not_compute_with_an_attention_without_a_record(asked: Any) -> None:
    tower = probed(small_model("gpt_oss"))
    # Copied, since a new config resets the attention implementation.
    model = LLM2CLIPModel(tiny.joint_config(text=copy.deepcopy(tower.config)), text_model=False)
    model.set_text_model(tower)
    model(input_ids=IDS)
    model.set_attn_implementation(asked)
    with pytest.raises(ValueError, match="gpt_oss with flex_attention attention is not known to be a text tower"):
        model(input_ids=IDS)


def test_a_record_is_not_that_of_another_llm(tmp_path: Path) -> None:
    decoder = AutoModel.from_config(
        AutoConfig.for_model("gptj", n_embd=32, n_layer=1, n_head=2, rotary_dim=8, vocab_size=430)
    )
    decoder.save_pretrained(tmp_path)
    config = tiny.text_config(verified_attention=["mask"])
    assert LLM2CLIPTextModel.from_pretrained(tmp_path, config=config).config.verified_attention is None
    assert config.verified_attention == ["mask"]

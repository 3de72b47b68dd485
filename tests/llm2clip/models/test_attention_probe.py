"""Which text models can be a text tower: the rule of the model's own code, and the probe of the toolbox."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, FNetConfig, FNetModel

from llm2clip.models.attention_probe import probe_text_tower
from llm2clip.models.plain_models import encoder_fields
from llm2clip.models.towers import open_text_tower
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from tests.builders import tiny
from tests.llm2clip.models.decoders import DECODERS, ENCODERS, embedded_batches, small_model

# By the rule: their layers are not attention.
OTHER_LAYERS = ("jamba", "lfm2", "mamba", "mamba2", "qwen3_next", "recurrent_gemma", "rwkv")
# By the probe.
REFUSED = {
    "bloom": "cannot run with a mask",
    "fnet": "depend on padding",
    "gpt_neo": "first tokens do not see its last one",
    "roformer": "depend on padding",
}
IDS = torch.arange(2, 9)[None]


def tower_of(model_type: str, **fields: Any) -> LLM2CLIPTextModel:
    decoder = small_model(model_type)
    return tiny.wrapped(decoder, **{**encoder_fields(decoder.config), **fields})


@pytest.mark.parametrize("model_type", OTHER_LAYERS)
def test_a_model_with_other_layers_than_attention_is_refused_by_its_own_code(model_type: str) -> None:
    with pytest.raises(ValueError, match=f"{model_type}.* cannot be a text tower, whose layers are all attention"):
        tower_of(model_type)
    tower_of(model_type, bidirectional=False)


@pytest.mark.parametrize("model_type", sorted({*DECODERS, *ENCODERS} - {*OTHER_LAYERS}))
def test_the_probe_refuses_what_reads_captions_wrong_and_nothing_else(model_type: str) -> None:
    tower = tower_of(model_type)
    if model_type in REFUSED:
        with pytest.raises(
            ValueError, match=f"{model_type} cannot be a text tower: .*{REFUSED[model_type]}.* such as"
        ):
            probe_text_tower(tower)
    else:
        probe_text_tower(tower)
        assert tower(IDS).pooler_output.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["olmo2", "cohere", "bert", "t5"])
def test_rounding_is_not_taken_for_a_fault(model_type: str, dtype: torch.dtype) -> None:
    probe_text_tower(tower_of(model_type).to(dtype))


def test_a_model_that_mixes_padding_into_texts_is_refused() -> None:
    fnet = FNetModel(FNetConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=100))
    with pytest.raises(ValueError, match="fnet cannot be a text tower: a caption's states depend on padding"):
        probe_text_tower(tiny.wrapped(fnet, bidirectional=None))


def test_a_model_of_unknown_width_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_llm2clip.configuration_llm2clip.OUTPUT_WIDTHS", ())
    opt = AutoModel.from_config(AutoConfig.for_model("opt", **tiny.DECODER, word_embed_proj_dim=24, ffn_dim=48))
    with pytest.raises(ValueError, match="returns states of width 24, but its config has the width 32"):
        probe_text_tower(tiny.wrapped(opt, bidirectional=None))


def test_the_probe_leaves_no_trace() -> None:
    tower = tower_of("olmo2")
    tower.decoder.config.attention_dropout = 0.5
    decoder = tower.decoder.train()
    decoder.layers[0].eval()
    modes, state = [module.training for module in decoder.modules()], torch.random.get_rng_state()
    with embedded_batches() as batches:
        probe_text_tower(tower)
    assert batches
    assert torch.random.get_rng_state().equal(state)
    assert [module.training for module in decoder.modules()] == modes
    assert all(weight.grad is None and weight.requires_grad for weight in decoder.parameters())


def test_the_toolbox_probes_what_it_opens_and_the_model_does_not(tmp_path: Path) -> None:
    small_model("falcon").save_pretrained(tmp_path / "llm")
    tiny.plain_tokenizer().save_pretrained(tmp_path / "llm")
    with embedded_batches() as batches:
        tower, _ = open_text_tower(str(tmp_path / "llm"))
    assert batches
    tower.save_pretrained(tmp_path / "tower")
    with embedded_batches() as batches:
        saved = LLM2CLIPTextModel.from_pretrained(tmp_path / "tower")
    assert not batches
    torch.testing.assert_close(saved(IDS).pooler_output, tower(IDS).pooler_output)


@pytest.mark.parametrize("model_type", list(tiny.DECODERS))
def test_tested_types_and_causal_baselines_are_not_probed(model_type: str) -> None:
    towers = [
        tiny.wrapped(AutoModel.from_config(tiny.decoder_config(model_type))),
        tower_of("falcon", bidirectional=False),
    ]
    with embedded_batches() as batches:
        for tower in towers:
            probe_text_tower(tower)
    assert not batches


@pytest.mark.parametrize("asked", ["flex_attention", {"text_config": "flex_attention"}])
def test_a_type_that_the_tests_do_not_compare_needs_a_mask(asked: Any) -> None:
    """Flash attention and FlexAttention may ignore the mask there, or leave out attention sinks, as in GPT OSS."""
    tower = tower_of("gpt_oss")
    # Copied, since a new config resets the attention implementation.
    model = LLM2CLIPModel(tiny.joint_config(text=copy.deepcopy(tower.config)), text_model=False)
    model.set_text_model(tower)
    model(input_ids=IDS)
    model.set_attn_implementation(asked)
    with pytest.raises(ValueError, match=r"'flex_attention' is not known .* in gpt_oss.* use 'sdpa' or 'eager'"):
        model(input_ids=IDS)


def test_the_record_of_a_probe_in_a_saved_config_is_ignored(tmp_path: Path) -> None:
    tower = tiny.text_model()
    tower.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"verified_attention": ["mask"]}))
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.fingerprint() == tower.fingerprint()
    torch.testing.assert_close(loaded(IDS).pooler_output, tower(IDS).pooler_output)

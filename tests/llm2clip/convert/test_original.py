"""Names and configs of the original code that the parity tests do not cover."""

from __future__ import annotations

import pytest
import torch

from llm2clip.convert.original import from_original
from modeling_llm2clip import LLM2CLIPConfig
from tests.golden import load_golden
from tests.llm2clip.convert.checkpoints import older_bias_names

EVA = load_golden("customclip_a")


def test_older_names_of_the_biases_give_the_same_weights() -> None:
    renamed = older_bias_names(EVA.group("state"))
    assert any(name.endswith("q_bias") for name in renamed)
    _, new = from_original(EVA.group("state"), EVA.meta["config"])
    _, old = from_original(renamed, EVA.meta["config"])
    assert new.keys() == old.keys()
    assert all(new[name].equal(old[name]) for name in new)


def test_rotary_tables_are_dropped() -> None:
    assert any("rope" in name for name in EVA.group("state"))
    _, converted = from_original(EVA.group("state"), EVA.meta["config"])
    assert not [name for name in converted if "rope" in name]


def test_original_config_of_the_large_tower_gives_the_published_config() -> None:
    original = {
        "embed_dim": 1280,
        "vision_cfg": {
            "image_size": 336, "layers": 24, "width": 1024, "head_width": 64, "mlp_ratio": 2.6667, "patch_size": 14,
            "eva_model_name": "eva-clip-l-14-336", "rope": True, "pt_hw_seq_len": 16, "intp_freq": True,
            "naiveswiglu": True, "subln": True,
        },
        "text_cfg": {"use_embedding": True},
    }  # fmt: skip
    config, _ = from_original({}, original)
    assert config.vision_config.to_dict() == LLM2CLIPConfig().vision_config.to_dict()
    assert config.projection_dim == 1280
    assert config.text_config.hidden_size == 4096


def test_the_width_of_the_llm_is_that_of_the_checkpoint() -> None:
    config = {name: value for name, value in EVA.meta["config"].items() if name != "text_cfg"}
    width = EVA.meta["config"]["text_cfg"]["llm_embedding_dim"]
    state = EVA.group("state")
    assert from_original(state, {**config, "text_cfg": {}})[0].text_config.hidden_size == width
    assert from_original(state, config)[0].text_config.hidden_size == width
    tower = {name: values for name, values in state.items() if name.startswith("visual.")}
    assert from_original(tower, config)[0].text_config.hidden_size == config["vision_cfg"]["width"]
    assert from_original(tower, EVA.meta["config"])[0].text_config.hidden_size == width


def test_error_names_an_unknown_tensor_or_timm_model() -> None:
    with pytest.raises(ValueError, match=r"'text\.transformer\.resblocks\.0' is not in any known layout"):
        from_original({"text.transformer.resblocks.0": torch.zeros(1)}, EVA.meta["config"])
    unknown = {**EVA.meta["config"], "vision_cfg": {"timm_model_name": "vit_huge"}}
    with pytest.raises(ValueError, match="timm_model_name 'vit_huge' is unknown; known: vit_so400m"):
        from_original({}, unknown)

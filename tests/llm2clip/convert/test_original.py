"""Names and configs of the original code that the parity tests do not cover."""

from __future__ import annotations

import pytest

from llm2clip.convert.original import joint_config
from modeling_llm2clip import LLM2CLIPConfig
from tests.golden import load_golden
from tests.llm2clip.convert.checkpoints import older_bias_names
from tests.original import from_original

EVA = load_golden("customclip_a")


def test_older_names_of_the_biases_give_the_same_weights_and_rotary_tables_are_dropped() -> None:
    renamed = older_bias_names(EVA.group("state"))
    assert any(name.endswith("q_bias") for name in renamed)
    _, new = from_original(EVA.group("state"), EVA.meta["config"])
    _, old = from_original(renamed, EVA.meta["config"])
    assert new.keys() == old.keys()
    assert all(new[name].equal(old[name]) for name in new)
    assert any("rope" in name for name in EVA.group("state"))
    assert not [name for name in new if "rope" in name]


def test_original_config_of_the_large_tower_gives_the_published_config() -> None:
    vision = {
        "image_size": 336, "layers": 24, "width": 1024, "head_width": 64, "mlp_ratio": 2.6667, "patch_size": 14,
        "eva_model_name": "eva-clip-l-14-336", "rope": True, "pt_hw_seq_len": 16, "intp_freq": True,
        "naiveswiglu": True, "subln": True,
    }  # fmt: skip
    config = joint_config({"embed_dim": 1280, "vision_cfg": vision, "text_cfg": {"use_embedding": True}})
    assert config.vision_config.to_dict() == LLM2CLIPConfig().vision_config.to_dict()
    assert config.projection_dim == 1280
    assert config.text_config.hidden_size == 4096
    tower = joint_config({"embed_dim": 1280, "vision_cfg": vision})
    assert tower.text_config.hidden_size == 1024


def test_error_names_an_unknown_timm_model() -> None:
    with pytest.raises(ValueError, match="timm_model_name 'vit_huge' is unknown; known: vit_so400m"):
        joint_config({**EVA.meta["config"], "vision_cfg": {"timm_model_name": "vit_huge"}})

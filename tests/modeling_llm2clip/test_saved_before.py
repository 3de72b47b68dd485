"""A folder that an earlier version saved loads, and its identities are those of today."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from llm2clip.models.identity import tokenizer_fingerprint
from modeling_llm2clip import LLM2CLIPTextConfig
from modeling_llm2clip.identity_llm2clip import text_fingerprint
from tests.builders import tiny

# As they were written before release 0.1, without fields at which transformers has a default.
TEXT = {
    "architectures": ["LLM2CLIPTextModel"],
    "auto_map": {
        "AutoConfig": "configuration_llm2clip.LLM2CLIPTextConfig",
        "AutoModel": "modeling_llm2clip_text.LLM2CLIPTextModel",
    },
    "bidirectional": True,
    "decoder_config": {
        **tiny.DECODER, "model_type": "llama", "attention_bias": False, "hidden_act": "silu", "is_causal": False,
        "mlp_bias": False, "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "rope_theta": 10000.0, "tie_word_embeddings": False, "use_cache": False,
    },
    "dense": [], "dtype": "float32", "max_text_length": 64, "model_type": "llm2clip_text_model", "normalize": False,
    "num_prefix_tokens": 8, "pool_prompt": False, "pooling": "mean", "prompt_prefix": tiny.PREFIX,
    "prompt_suffix": tiny.SUFFIX, "prompt_token_ids": [420, 422, 84, 82, 300, 423, 198, 198, 424],
    "verified_attention": None,
}  # fmt: skip
JOINT = {
    "adapter_expansion": 2, "adapter_normalize": True, "adapter_num_layers": 2, "architectures": ["LLM2CLIPModel"],
    "auto_map": {
        "AutoConfig": "configuration_llm2clip.LLM2CLIPConfig",
        "AutoModel": "modeling_llm2clip.LLM2CLIPModel",
        "AutoModelForZeroShotImageClassification": "modeling_llm2clip.LLM2CLIPModel",
    },
    "center_text": False,
    "custom_pipelines": {
        "image-feature-extraction": {
            "impl": "pipeline_llm2clip.LLM2CLIPImageFeatureExtractionPipeline", "pt": ["AutoModel"],
        },
    },
    "dtype": "float32", "feature_dropout": 0.0, "initializer": "normal", "initializer_range": 0.2,
    "logit_bias_init_value": None, "logit_scale_init_value": 2.659260036932778, "model_type": "llm2clip",
    "projection_dim": 24, "standardize_vision": False, "text_head": "adapter", "text_model_name_or_path": None,
    "text_model_revision": None,
    "vision_config": {
        **tiny.SIZES, "model_type": "eva02_vision_model", "drop_path_rate": 0.0, "image_size": 28, "num_channels": 3,
        "layer_norm_eps": 1e-06, "layer_scale_init_value": None, "patch_dropout": 0.0, "patch_size": 7,
        "post_norm": False, "rope_grid_size": 3, "sub_layer_norm": True, "swiglu": True,
    },
    "vision_pooling": "cls", "visual_head": "linear", "visual_head_expansion": 8, "visual_projection": True,
    "visual_projection_bias": True,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["joint", "text"])
def test_a_config_of_the_earlier_form_loads(kind: str, tmp_path: Path) -> None:
    model: Any = tiny.joint_model() if kind == "joint" else tiny.text_model()
    model.save_pretrained(tmp_path)
    text = {**TEXT, "fingerprint": (model.text_model if kind == "joint" else model).fingerprint()}
    fields = {**JOINT, "text_config": text, "text_model_fingerprint": text["fingerprint"]} if kind == "joint" else text
    (tmp_path / "config.json").write_text(json.dumps({**fields, "transformers_version": "5.23.0"}))
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    inputs = tiny.processor()(text=tiny.CAPTIONS, return_tensors="pt")
    torch.testing.assert_close(loaded(**inputs).pooler_output, model(**inputs).pooler_output)
    found = loaded.text_model if kind == "joint" else loaded
    assert found.identity() == found.fingerprint() == text["fingerprint"]


def test_identities_that_caches_and_models_have_recorded_stay() -> None:
    config = LLM2CLIPTextConfig(prompt_prefix="a ", num_prefix_tokens=2)
    weights = [("decoder.weight", torch.arange(6.0).view(2, 3) / 7)]
    assert text_fingerprint(config, weights) == "3-0491f438f821bc69e8d2577d2895eff9"
    assert tokenizer_fingerprint(tiny.processor().tokenizer) == "b54fa8953850d6b8876389c78d23e18c"

"""Parity with the original code, at the tolerance of each fixture."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from llm2clip.convert.layouts import TIMM_SIGLIP
from llm2clip.convert.resize import resize_clip_positions, resize_kernel
from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.modeling_eva02 import apply_rotary, resize_position_embedding, rotary_table
from modeling_llm2clip.modeling_llm2clip_heads import LLM2CLIPTextAdapter
from tests.golden import Golden, load_golden
from tests.original import from_original


def load_model(golden: Golden, prefix: str = "", attn_implementation: str = "sdpa") -> LLM2CLIPModel:
    """Build the fixture's model; parts without weights in the fixture are random and not compared."""
    state = {prefix + name: tensor for name, tensor in golden.group("state").items()}
    config, converted = from_original(state, {"text_cfg": {"llm_embedding_dim": 16}, **golden.meta["config"]})
    config._attn_implementation = attn_implementation
    model = LLM2CLIPModel(config, text_model=False).eval()
    report = model.load_state_dict(converted, strict=False)
    assert not report.unexpected_keys
    parts = {key.split(".")[0] for key in report.missing_keys}
    assert parts <= {"text_adapter", "logit_scale"}, report.missing_keys
    return model


TOWERS = ("eva02_tower_a", "eva02_tower_b", "eva02_tower_c", "eva01_tower_a", "bige_tower_a", "openai_vit_a")
TOWERS += ("openai_vit_b",)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TOWERS)
def test_tower_equals_the_original(name: str, attention: str) -> None:
    golden = load_golden(name)
    model = load_model(golden, prefix="visual.", attn_implementation=attention)
    with torch.no_grad():
        tower = model.vision_model(golden["in/pixel_values"], output_hidden_states=True)
        features = model.get_image_features(golden["in/pixel_values"])
    golden.close(tower.hidden_states[-1], "out/all_features")
    golden.close(features.pooler_output, "out/embedding")
    if name.startswith("openai"):
        assert isinstance(model.vision_model, CLIPVisionModel)
        return
    golden.close(tower.pooler_output, "out/forward_features")
    for layer, states in enumerate(tower.hidden_states[1:]):
        golden.close(states, f"out/hidden_{layer}")
    torch.testing.assert_close(tower.last_hidden_state[:, 0], tower.pooler_output)


def test_timm_siglip_tower_is_transformers_siglip() -> None:
    golden = load_golden("siglip_timm_tower_a")
    sizes = golden.meta["config"]
    config = SiglipVisionConfig(
        hidden_size=sizes["embed_dim"], intermediate_size=int(sizes["embed_dim"] * sizes["mlp_ratio"]),
        num_hidden_layers=sizes["depth"], num_attention_heads=sizes["num_heads"], image_size=sizes["img_size"],
        patch_size=sizes["patch_size"], hidden_act="gelu", layer_norm_eps=sizes["ln_eps"],
    )  # fmt: skip
    renamed = TIMM_SIGLIP.under("trunk.").rename(golden.group("state"))
    assert not renamed.unknown
    tower = SiglipVisionModel(config).eval()
    tower.load_state_dict(renamed.tensors)
    with torch.no_grad():
        output = tower(golden["in/pixel_values"])
    golden.close(output.pooler_output, "out/embedding")
    golden.close(output.last_hidden_state, "out/trunk_tokens")


def test_rotary_tables_equal_the_original() -> None:
    golden = load_golden("rope_tables_a")
    assert golden.meta["config"]
    for case in golden.meta["config"]:
        tag, side = case["tag"], case["ft_seq_len"] or case["pt_seq_len"]
        table = rotary_table(2 * case["half_head_dim"], (side, side), case["pt_seq_len"])
        rows = golden[f"out/{tag}/row_index"]
        # The original has every angle twice, once per channel.
        for part, name in enumerate(("cos", "sin")):
            golden.close(table[1 + rows, :, part].repeat_interleave(2, dim=-1), f"out/{tag}/freqs_{name}_rows")
        patches = golden[f"in/{tag}/x_rows"].transpose(1, 2)
        tokens = torch.cat([torch.randn_like(patches[:, :1]), patches], dim=1)
        rotated = apply_rotary(tokens, torch.cat([table[:1], table[1 + rows]]))
        golden.close(rotated[:, 1:].transpose(1, 2), f"out/{tag}/rotated_rows")
        assert rotated[:, 0].equal(tokens[:, 0])


def test_position_embedding_resize_equals_the_original() -> None:
    golden = load_golden("pos_resize_a")
    assert {case["tag"] for case in golden.meta["config"]} > {"same"}
    for case in golden.meta["config"]:
        grid = (case["new_grid"], case["new_grid"])
        resized = resize_position_embedding(golden[f"in/{case['tag']}/pos_embed"], grid)
        golden.close(resized, f"out/{case['tag']}/eva_pos_embed")
        clip = resize_clip_positions(golden[f"in/{case['tag']}/pos_embed"][0], case["new_grid"])
        golden.close(clip, f"out/{case['tag']}/openai_positional_embedding")
        if case["tag"] != "same":  # there the original forgets the kernel
            kernel = resize_kernel(golden[f"in/{case['tag']}/patch_weight"], case["new_patch"])
            golden.close(kernel, f"out/{case['tag']}/eva_patch_weight")


@pytest.mark.parametrize("name", ["text_proj_a", "text_proj_b"])
@pytest.mark.parametrize("normalize", [True, False])
def test_text_adapter_equals_the_original(name: str, normalize: bool) -> None:
    golden = load_golden(name)
    sizes = golden.meta["config"]
    original = {
        "embed_dim": sizes["output_dim"],
        "vision_cfg": {"width": 32, "layers": 1, "head_width": 16, "patch_size": 16, "image_size": 32},
        "text_cfg": {"llm_embedding_dim": sizes["embedding_dim"], "use_embedding": normalize},
    }
    state = {f"text.{name}": tensor for name, tensor in golden.group("state").items()}
    config, converted = from_original(state, original)
    adapter = LLM2CLIPTextAdapter(config)
    adapter.load_state_dict({key.removeprefix("text_adapter."): value for key, value in converted.items()})
    features = adapter(golden["in/embeddings"])
    golden.close(features, f"out/l2norm_{str(normalize).lower()}")
    if normalize:
        golden.close(F.normalize(features, dim=-1), "out/normalized_true")
    else:
        golden.close(adapter.blocks[0](golden["in/embeddings"]), "out/block0_of_raw")


@pytest.mark.parametrize("name", ["customclip_a", "customclip_b"])
def test_joint_model_and_its_gradients_equal_the_original(name: str) -> None:
    golden = load_golden(name)
    model = load_model(golden)
    output = model(pixel_values=golden["in/pixel_values"], llm_embeds=golden["in/text_embeddings"], return_loss=True)
    golden.close(output.image_embeds, "out/image_features")
    golden.close(output.text_embeds, "out/text_features")
    golden.close(output.logit_scale, "out/logit_scale_exp")
    golden.close(output.logits_per_image, "out/logits_per_image", "logits")
    golden.close(output.logits_per_text, "out/logits_per_text", "logits")
    torch.testing.assert_close(output.loss.detach(), golden["out/loss"], atol=1e-5, rtol=1e-4)
    output.loss.backward()
    _, gradients = from_original(golden.group("grad"), golden.meta["config"])
    parameters = dict(model.named_parameters())
    assert parameters.keys() == gradients.keys()
    tolerance = golden.meta["tolerance"]["grad"]
    for key, expected in gradients.items():
        torch.testing.assert_close(
            parameters[key].grad, expected, **tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )

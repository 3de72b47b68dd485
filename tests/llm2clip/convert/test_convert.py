"""`llm2clip convert` on every layout of checkpoints with a vision tower, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

import llm2clip
from llm2clip.convert.joint_plan import STATISTICS
from llm2clip.convert.original import to_original
from llm2clip.hub.cards.card import read_card
from llm2clip.hub.licenses import TERMS
from modeling_llm2clip import LLM2CLIPConfig, LLM2CLIPModel, LLM2CLIPVisionModelWithProjection
from tests.builders import tiny
from tests.golden import Golden, load_golden
from tests.llm2clip.convert import checkpoints
from tests.llm2clip.convert.checkpoints import EVA, OPENAI, convert


def loaded(folder: Path) -> LLM2CLIPModel:
    return LLM2CLIPModel.from_pretrained(folder, text_model=False).eval()


def write_config(path: Path, fields: dict[str, Any]) -> str:
    path.write_text(json.dumps(fields))
    return str(path)


def check_features(golden: Golden, folder: Path, atol: float = 2e-5, rtol: float = 1e-4) -> None:
    with torch.no_grad():
        output = loaded(folder).float()(
            pixel_values=golden["in/pixel_values"], llm_embeds=golden["in/text_embeddings"]
        )
    for name, features in (("image", output.image_embeds), ("text", output.text_embeds)):
        torch.testing.assert_close(features, golden[f"out/{name}_features"], atol=atol, rtol=rtol)


@pytest.mark.parametrize("wrap", [None, "state_dict", "ddp", "deepspeed"])
def test_checkpoint_of_the_original_gives_its_features(
    wrap: str | None, tmp_path: Path, eva_options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    convert(checkpoints.original_pt(EVA, tmp_path / "model.pt", wrap), tmp_path / "out", *eva_options)
    check_features(EVA, tmp_path / "out")
    # The report says what became of every tensor.
    printed = capsys.readouterr().out
    assert "recognized: an LLM2CLIP model: EVA02 (EVA-CLIP names), text adapter" in printed
    assert "visual.blocks.{n}.norm1.weight -> vision_model.blocks.{n}.norm1.weight" in printed
    assert "visual.blocks.{n}.attn.rope.freqs_cos: rotary tables are computed from the config" in printed
    assert "missing: none" in printed
    # With the LLM, as users load the folder.
    whole = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert whole.config.text_model_name_or_path == str(tmp_path / "llm")
    assert whole.encode_text(["a cat"], processor).isfinite().all()
    image_processor = processor.image_processor
    assert image_processor.crop_size["height"] == EVA.meta["config"]["vision_cfg"]["image_size"]
    assert list(image_processor.image_mean) == [0.48145466, 0.4578275, 0.40821073]  # those of OpenAI's CLIP


def test_a_relative_path_of_the_llm_is_found_from_everywhere(
    tmp_path: Path, eva_options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = Path(checkpoints.original_pt(EVA, tmp_path / "model.pt"))
    found = llm2clip.convert_checkpoint(source, Path("out"), model_config=eva_options[1], text_model="llm")
    assert found["written"] == "out"
    assert LLM2CLIPConfig.from_pretrained("out").text_model_name_or_path == str(tmp_path / "llm")


def test_float16_weights_are_not_rounded(tmp_path: Path, eva_options: list[str]) -> None:
    source = checkpoints.original_pt(EVA, tmp_path / "model.pt", dtype=torch.float16)
    convert(source, tmp_path / "out", *eva_options)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["logit_scale"].dtype == torch.float32
    for name, tensor in checkpoints.ours(EVA).items():
        assert found[name].equal(tensor.half() if name != "logit_scale" else tensor.half().float()), name
    check_features(EVA, tmp_path / "out", atol=5e-3, rtol=1e-2)


def test_openai_tower_uses_quickgelu_by_default(tmp_path: Path) -> None:
    """The JSONs of the original omit `quick_gelu`, although OpenAI towers need it."""
    fields = {name: value for name, value in OPENAI.meta["config"].items() if name != "quick_gelu"}
    source = checkpoints.original_pt(OPENAI, tmp_path / "model.pt")
    options = ["--model-config", write_config(tmp_path / "config.json", fields)]
    options += ["--text-model", checkpoints.llm_of(OPENAI, tmp_path / "llm")]
    convert(source, tmp_path / "out", *options)
    check_features(OPENAI, tmp_path / "out")
    convert(source, tmp_path / "exact", *options, "--quick-gelu", "false")
    with pytest.raises(AssertionError):
        check_features(OPENAI, tmp_path / "exact")


def test_microsoft_openai_folder_is_converted_with_its_license(tmp_path: Path) -> None:
    source = checkpoints.microsoft_openai_folder(tmp_path / "microsoft")
    convert(source, tmp_path / "out", "--text-model", checkpoints.llm_of(OPENAI, tmp_path / "llm"))
    check_features(OPENAI, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert source in card


def test_a_converted_model_is_under_the_license_of_the_llama_in_its_llm(tmp_path: Path) -> None:
    """Whatever Microsoft's card states, and without asking the Hub for that of the LLM."""
    source = checkpoints.microsoft_openai_folder(tmp_path / "microsoft")
    llm = checkpoints.llm_of(OPENAI, tmp_path / "LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned")
    convert(source, tmp_path / "out", "--text-model", llm)
    data, text = read_card(tmp_path / "out")
    assert data["license"] == "llama3"
    assert data["base_licenses"] == ["microsoft (apache-2.0)", f"{Path(llm).name} (llama3)"]
    assert "**Built with Meta Llama 3**" in text
    assert (tmp_path / "out" / "NOTICE").read_text() == TERMS["llama3"].notice + "\n"


def test_microsoft_eva_folder_prefers_the_pt_file_with_the_adapter(tmp_path: Path, eva_options: list[str]) -> None:
    folder = tmp_path / "microsoft"
    folder.mkdir()
    save_file(checkpoints.microsoft_eva_names(checkpoints.ours(EVA)), folder / "model.safetensors")
    write_config(folder / "config.json", {"model_type": "clip", "projection_dim": 32})
    convert(folder, tmp_path / "vision", *eva_options[:2])
    model = LLM2CLIPVisionModelWithProjection.from_pretrained(tmp_path / "vision").eval()
    with torch.no_grad():
        embeds = torch.nn.functional.normalize(model(EVA["in/pixel_values"]).pooler_output, dim=-1)
    EVA.close(embeds, "out/image_features")
    checkpoints.original_pt(EVA, folder / "model.pt")
    convert(folder, tmp_path / "out", *eva_options)
    check_features(EVA, tmp_path / "out")


def test_plain_eva_clip_gets_new_heads_for_stage_2(tmp_path: Path, eva_options: list[str]) -> None:
    source, scale = tmp_path / "eva.pt", torch.tensor(4.5)
    state = checkpoints.with_text_tower(checkpoints.older_bias_names(EVA.group("state")))
    torch.save({**state, "logit_scale": scale}, source)
    convert(source, tmp_path / "out", *eva_options, "--projection-dim", "16")
    model = loaded(tmp_path / "out")
    for name, tensor in checkpoints.ours(EVA).items():
        if name.startswith("vision_model."):
            assert model.state_dict()[name].equal(tensor), name
    assert model.logit_scale.equal(scale)
    assert model.visual_projection.weight.shape == (16, EVA.meta["config"]["vision_cfg"]["width"])
    assert model.visual_projection.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    assert not model.text_adapter.proj.weight.eq(0).all()
    # Without an LLM the result is a vision tower, from which stage 2 takes the scale.
    convert(source, tmp_path / "tower", *eva_options[:2])
    tower = AutoModel.from_pretrained(tmp_path / "tower")
    with torch.no_grad():
        torch.testing.assert_close(tower(EVA["in/pixel_values"]), model.vision_model(EVA["in/pixel_values"]))
    assert tower.config.logit_scale_init_value == scale
    convert(source, tmp_path / "normal", *eva_options, "--initializer", "normal")
    assert loaded(tmp_path / "normal").visual_projection.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_tower_with_timm_names_gives_the_outputs_of_timm(tmp_path: Path, eva_options: list[str]) -> None:
    timm_eva = pytest.importorskip("timm.models.eva")
    sizes = EVA.meta["config"]["vision_cfg"]
    side = sizes["image_size"]
    shape = {"embed_dim": sizes["width"], "depth": sizes["layers"], "num_heads": sizes["width"] // sizes["head_width"]}
    shape |= {"img_size": side, "patch_size": sizes["patch_size"], "ref_feat_shape": (sizes["pt_hw_seq_len"],) * 2}
    kind = dict.fromkeys(("swiglu_mlp", "scale_mlp", "scale_attn_inner", "use_rot_pos_emb"), True)
    oracle = timm_eva.Eva(
        **shape, **kind, mlp_ratio=sizes["mlp_ratio"], qkv_fused=False, global_pool="token", num_classes=8
    ).eval()
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(oracle.state_dict(), tmp_path / "timm.safetensors")
    convert(tmp_path / "timm.safetensors", tmp_path / "out", *eva_options[:2])
    tower, images = AutoModel.from_pretrained(tmp_path / "out").eval(), torch.randn(2, 3, side, side)
    with torch.no_grad():
        found, expected = tower(images).last_hidden_state, oracle.forward_features(images)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


VISION = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 7}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}


@pytest.mark.parametrize(
    ("config_class", "model_class"), [(CLIPConfig, CLIPModel), (SiglipConfig, SiglipModel)], ids=["clip", "siglip"]
)
def test_plain_clip_of_transformers_keeps_its_tower_outputs(
    config_class: Any, model_class: Any, tmp_path: Path
) -> None:
    plain = model_class(config_class(vision_config=dict(VISION), text_config=dict(TEXT))).eval()
    plain.save_pretrained(tmp_path / "plain")
    llm = checkpoints.llm_folder(tmp_path / "llm", 16)
    convert(tmp_path / "plain", tmp_path / "out", "--text-model", llm, "--projection-dim", "24")
    model, images = loaded(tmp_path / "out"), torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        actual, expected = (side.vision_model(images).pooler_output for side in (model, plain))
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(model.logit_scale, plain.logit_scale.reshape(()))


@pytest.mark.parametrize("size", [21, 42])
def test_image_size_resizes_positions_like_interpolation_at_run_time(
    size: int, tmp_path: Path, eva_options: list[str]
) -> None:
    source = checkpoints.original_pt(EVA, tmp_path / "model.pt")
    convert(source, tmp_path / "out", *eva_options, "--image-size", str(size))
    convert(source, tmp_path / "same", *eva_options)
    model, other, images = loaded(tmp_path / "out"), loaded(tmp_path / "same"), torch.randn(1, 3, size, size)
    with torch.no_grad():
        expected = other.get_image_features(images, interpolate_pos_encoding=True).pooler_output
        torch.testing.assert_close(model.get_image_features(images).pooler_output, expected)
    # And back again, from a folder of this package.
    convert(tmp_path / "out", tmp_path / "back", "--image-size", "28")
    assert loaded(tmp_path / "back").vision_model.pos_embed.shape == other.vision_model.pos_embed.shape
    processor = AutoProcessor.from_pretrained(tmp_path / "back", trust_remote_code=True)
    assert processor.image_processor.size["shortest_edge"] == 28


@pytest.mark.parametrize("golden", [EVA, OPENAI], ids=["eva", "openai"])
def test_conversion_to_the_original_restores_its_state_dict(golden: Golden, tmp_path: Path) -> None:
    source = checkpoints.original_pt(golden, tmp_path / "model.pt")
    options = ["--model-config", checkpoints.model_config(golden, tmp_path)]
    convert(source, tmp_path / "out", *options, "--text-model", checkpoints.llm_of(golden, tmp_path / "llm"))
    convert(tmp_path / "out", tmp_path / "back.pt", "--to", "original")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    state = {name: tensor for name, tensor in golden.group("state").items() if "rope" not in name}
    assert back.keys() == state.keys()
    assert all(back[name].equal(state[name]) for name in state)


def test_reset_heads_replaces_what_the_loader_of_the_original_drops(tmp_path: Path) -> None:
    """The `--pretrained` of the original drops head and adapter; here --reset-heads does."""
    golden = load_golden("ckpt_load_a")
    fields = golden.meta["config"]
    side = fields["new_grid"] * fields["vision_cfg"]["patch_size"]
    vision = {**fields["vision_cfg"], "image_size": side, "pt_hw_seq_len": fields["pt_hw_seq_len"]}
    text = {"llm_embedding_dim": fields["text_dim"]}
    config = {"embed_dim": fields["embed_dim"], "vision_cfg": vision, "text_cfg": text}
    torch.save({"module": golden.group("ckpt")}, tmp_path / "model.pt")
    llm = checkpoints.llm_folder(tmp_path / "llm", fields["text_dim"])
    options = ["--model-config", write_config(tmp_path / "c.json", config), "--text-model", llm]
    convert(tmp_path / "model.pt", tmp_path / "kept", *options)
    convert(tmp_path / "model.pt", tmp_path / "reset", *options, "--reset-heads")
    kept, reset = loaded(tmp_path / "kept"), loaded(tmp_path / "reset")
    head = golden["ckpt/visual.head.weight"]
    assert kept.visual_projection.weight.equal(head)
    assert not reset.visual_projection.weight.equal(head)
    for model in (kept, reset):
        assert model.logit_scale.equal(golden["ckpt/logit_scale"])
        state = to_original(model.config, model.state_dict())
        for name in golden.meta["keys_changed"]:
            torch.testing.assert_close(state[name], golden[f"after/{name}"], atol=2e-5, rtol=1e-4)


def test_a_model_of_this_package_keeps_its_statistics_and_their_dtype(tmp_path: Path) -> None:
    source = tiny.save_apart(tmp_path, **tiny.FROZEN_TOWER).to(torch.bfloat16)
    source.save_pretrained(tmp_path / "bf16")
    tiny.processor().save_pretrained(tmp_path / "bf16")
    tiny.processor().tokenizer.save_pretrained(tmp_path / "llm")
    convert(tmp_path / "bf16", tmp_path / "out", "--reset-heads")
    found, state = loaded(tmp_path / "out"), source.state_dict()
    assert found.dtype == torch.bfloat16
    for name in STATISTICS:
        assert found.state_dict()[name].dtype == torch.float32
        assert found.state_dict()[name].equal(state[name])
    assert not found.visual_projection.g.weight.equal(source.visual_projection.g.weight)


def test_openai_state_dict_gives_the_features_of_the_original(tmp_path: Path) -> None:
    golden = load_golden("openai_load_a")
    torch.save(golden.group("ckpt"), tmp_path / "openai.pt")
    sizes = golden.meta["config"]
    vision = {"image_size": 28, "layers": 1, "width": sizes["width"], "patch_size": sizes["patch"]}
    config = write_config(tmp_path / "c.json", {"embed_dim": 32, "vision_cfg": vision})
    llm = checkpoints.llm_folder(tmp_path / "llm", 16)
    convert(tmp_path / "openai.pt", tmp_path / "out", "--model-config", config, "--text-model", llm)
    model = loaded(tmp_path / "out")
    torch.testing.assert_close(model.logit_scale, golden["out/logit_scale"])
    with torch.no_grad():
        # The original rounds these weights to fp16 when it loads them; this package does not.
        for module in model.vision_model.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                for parameter in module.parameters():
                    parameter.copy_(parameter.half())
        tower = model.vision_model(golden["in/pixel_values"], output_hidden_states=True)
    golden.close(tower.pooler_output, "out/pooled")
    golden.close(tower.hidden_states[-1], "out/all_features")

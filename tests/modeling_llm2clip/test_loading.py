"""Large models on small machines: offloading, dtype and attention by part, quantisation, loading one half."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, BitsAndBytesConfig, TorchAoConfig

from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from tests.builders import tiny
from tests.builders.tiny import CAPTIONS, IMAGES

LAYOUTS = ["bundled", "apart"]


def saved(layout: str, folder: Path) -> tuple[Path, dict[str, Tensor], Tensor]:
    """The folder of a model whose LLM is in it or in another one, with inputs and their logits."""
    model = tiny.save(folder / "clip") if layout == "bundled" else tiny.save_apart(folder)
    inputs = tiny.processor()(text=CAPTIONS, images=IMAGES, return_tensors="pt")
    with torch.inference_mode():
        return folder / "clip", inputs, model(**inputs).logits_per_image


def int8() -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_every_part_of_a_frozen_tower_model_can_be_offloaded_to_disk(tmp_path: Path) -> None:
    model, processor = tiny.save(tmp_path / "all", **tiny.FROZEN_TOWER), tiny.processor()
    names = ("vision_model", "text_model", "text_adapter", "visual_standardization")
    parts = {**dict.fromkeys(names, "disk"), "visual_projection": "cpu", "logit_scale": "cpu"}
    loaded = LLM2CLIPModel.from_pretrained(tmp_path / "all", device_map=parts, offload_folder=tmp_path / "offload")
    assert loaded.text_adapter.proj.weight.is_meta
    for encode, expected, inputs in (
        (loaded.encode_text, model.encode_text, CAPTIONS),
        (loaded.encode_image, model.encode_image, IMAGES),
    ):
        torch.testing.assert_close(encode(inputs, processor), expected(inputs, processor))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_llm_can_be_left_out_and_loaded_later(layout: str, tmp_path: Path) -> None:
    folder, inputs, expected = saved(layout, tmp_path)
    light = AutoModel.from_pretrained(folder, text_model=False)
    assert light(pixel_values=inputs["pixel_values"]).pooler_output.shape == (2, 24)
    with pytest.raises(ValueError, match="loaded without its LLM"):
        light(**inputs)
    light.save_pretrained(tmp_path / "light")
    again = AutoModel.from_pretrained(tmp_path / "light", text_model=False)
    for without in (light, again):
        without.load_text_model()
        assert without(**inputs).logits_per_image.equal(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device_map", ["auto", {"": "cpu", "text_model": "disk"}], ids=["auto", "disk"])
def test_device_map_places_the_parts_and_keeps_the_logits(device_map: Any, layout: str, tmp_path: Path) -> None:
    folder, inputs, expected = saved(layout, tmp_path)
    loaded = AutoModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    offloaded = isinstance(device_map, dict) and "text_model" in device_map
    assert next(loaded.text_model.parameters()).is_meta == offloaded
    assert not next(loaded.vision_model.parameters()).is_meta
    assert loaded(**inputs).logits_per_image.equal(expected)


@pytest.mark.filterwarnings("ignore:The following device_map keys")
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("save_text_model", [None, True])
def test_an_offloaded_model_can_be_saved(save_text_model: bool | None, layout: str, tmp_path: Path) -> None:
    folder, inputs, expected = saved(layout, tmp_path)
    options = {"device_map": "auto", "max_memory": {"cpu": 60_000}, "offload_folder": tmp_path / "offload"}
    loaded = AutoModel.from_pretrained(folder, **options)
    if save_text_model and layout == "apart":
        with pytest.raises(ValueError, match="quantised or offloaded"):
            loaded.save_pretrained(tmp_path / "again", save_text_model=True)
        assert not (tmp_path / "again").exists()
        return
    loaded.save_pretrained(tmp_path / "again", save_text_model=save_text_model)
    again = AutoModel.from_pretrained(tmp_path / "again")
    assert (again.config.text_model_name_or_path is None) == bool(save_text_model)
    assert again.config.text_model_fingerprint == again.text_model.fingerprint()
    assert again(**inputs).logits_per_image.equal(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_llm_can_have_a_dtype_of_its_own(layout: str, tmp_path: Path) -> None:
    folder, inputs, expected = saved(layout, tmp_path)
    loaded = AutoModel.from_pretrained(folder, text_model_kwargs={"dtype": torch.bfloat16})
    assert loaded.vision_model.dtype == loaded.text_adapter.proj.weight.dtype == torch.float32
    assert loaded.text_model.dtype == torch.bfloat16
    torch.testing.assert_close(loaded(**inputs).logits_per_image, expected, atol=0.5, rtol=0)
    half = AutoModel.from_pretrained(folder, dtype=torch.float16)
    assert half.text_model.dtype == half.dtype == torch.float16
    if layout == "apart":  # otherwise as it was saved
        LLM2CLIPTextModel.from_pretrained(tmp_path / "llm").bfloat16().save_pretrained(tmp_path / "llm")
        loaded = AutoModel.from_pretrained(folder)
        assert (loaded.dtype, loaded.text_model.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attn_implementation_can_be_set_by_part(layout: str, tmp_path: Path) -> None:
    folder, inputs, expected = saved(layout, tmp_path)
    cases: list[tuple[Any, str, str]] = [
        ("eager", "eager", "eager"),
        ({"vision_config": "eager"}, "eager", "sdpa"),
        ({"text_config": "eager"}, "sdpa", "eager"),
    ]
    for asked, vision, text in cases:
        loaded = AutoModel.from_pretrained(folder, attn_implementation=asked)
        changed = AutoModel.from_pretrained(folder)
        changed.set_attn_implementation(asked)
        for model in (loaded, changed):
            assert model.vision_model.config._attn_implementation == vision
            assert model.text_model.decoder.config._attn_implementation == text
            torch.testing.assert_close(model(**inputs).logits_per_image, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantization_config_applies_to_the_llm_only(layout: str, tmp_path: Path) -> None:
    folder, inputs, expected = saved(layout, tmp_path)
    loaded = AutoModel.from_pretrained(folder, quantization_config=int8())
    kinds = {name: type(parameter.data).__name__ for name, parameter in loaded.named_parameters()}
    quantised = [name for name, kind in kinds.items() if kind == "Int8Tensor"]
    # Seven linear layers in each of the two blocks, and nothing else.
    assert len(quantised) == 14
    assert all(name.startswith("text_model.decoder.layers.") for name in quantised)
    logits = loaded(**inputs).logits_per_image
    assert not logits.equal(expected)
    torch.testing.assert_close(logits, expected, atol=0.5, rtol=0)
    by_text_model_kwargs = AutoModel.from_pretrained(folder, text_model_kwargs={"quantization_config": int8()})
    assert by_text_model_kwargs(**inputs).logits_per_image.equal(logits)
    with pytest.raises(ValueError, match="which text_model=False does not load"):
        AutoModel.from_pretrained(folder, quantization_config=int8(), text_model=False)
    with pytest.raises(ValueError, match="quantised or offloaded"):
        loaded.save_pretrained(tmp_path / "again", save_text_model=True)
    assert not (tmp_path / "again").exists()
    loaded.save_pretrained(tmp_path / "again")
    assert AutoModel.from_pretrained(tmp_path / "again")(**inputs).logits_per_image.equal(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes quantises on an accelerator")
def test_bitsandbytes_quantises_the_llm_only(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    folder, inputs, expected = saved("apart", tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    loaded = AutoModel.from_pretrained(folder, quantization_config=quantization, device_map="cuda")
    for part, is_quantised in ((loaded.text_model, True), (loaded.vision_model, False)):
        assert any(type(module).__name__ == "Linear4bit" for module in part.modules()) == is_quantised
    logits = loaded(**{name: value.to("cuda") for name, value in inputs.items()}).logits_per_image
    torch.testing.assert_close(logits.cpu(), expected, atol=2, rtol=0)


def growth(code: str, folder: Path, warm_up: Path) -> int:
    """Measure the peak memory in bytes that `code` adds to a new process after `warm_up`."""
    script = f"""
import sys
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPVisionModelWithProjection
def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
LLM2CLIPModel.from_pretrained(sys.argv[2])  # imports what loading needs
folder, before = sys.argv[1], status("VmRSS")
{code}
print("PEAK", 1024 * (status("VmHWM") - before))
"""
    command = [sys.executable, "-c", script, str(folder), str(warm_up)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.rpartition("PEAK")[2])


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the process's memory from /proc")
@pytest.mark.slow
def test_a_half_reads_only_its_own_tensors(tmp_path: Path) -> None:
    text = tiny.text_config()
    text.decoder_config.vocab_size = 2_000_000
    model = tiny.joint_model(text=text)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.text_model.parameters())
    folder, small = tmp_path / "large", tmp_path / "small"
    model.save_pretrained(folder)
    tiny.joint_model().save_pretrained(small)
    vision = growth("LLM2CLIPVisionModelWithProjection.from_pretrained(folder)", folder, small)
    without = growth("LLM2CLIPModel.from_pretrained(folder, text_model=False)", folder, small)
    touch = "for parameter in LLM2CLIPModel.from_pretrained(folder).parameters(): parameter.sum()"
    assert max(vision, without) < size / 7
    assert growth(touch, folder, small) > size > 240 * 2**20

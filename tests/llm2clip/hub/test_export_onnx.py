"""ONNX graphs in onnxruntime give the outputs of the exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from llm2clip import cli
from llm2clip.hub import export_onnx, onnx_writing
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor, LLM2CLIPVisionModelWithProjection
from tests.modeling_llm2clip import tiny
from tests.modeling_llm2clip.tiny import CAPTIONS, IMAGES

onnxruntime = pytest.importorskip("onnxruntime")
PROCESSOR = tiny.processor()
# Towers and LLMs that differ most; the others are slow, or nightly.
OFTEN = (("siglip_vision_model", "cls"), ("dinov2", "cls_mean"))
TOWERS = [
    pytest.param(name, pooling, marks=[] if (name, pooling) in OFTEN else pytest.mark.slow)
    for name in ("clip_vision_model", "siglip_vision_model", "dinov2")
    for pooling in ("cls", "cls_mean")
]
LLMS = [
    pytest.param(name, marks=[] if name in ("qwen3", "gemma3_text", "phi3") else pytest.mark.nightly)
    for name in tiny.DECODERS
    if name != "llama"
]


def session(folder: Path, part: str) -> Any:
    return onnxruntime.InferenceSession(str(folder / f"{part}_model.onnx"))


def image_embeds(folder: Path) -> Tensor:
    pixels = PROCESSOR(images=[*IMAGES, IMAGES[0]], return_tensors="np")["pixel_values"]
    return torch.from_numpy(session(folder, "vision").run(["image_embeds"], {"pixel_values": pixels})[0])


def text_embeds(folder: Path, captions: list[str], processor: LLM2CLIPProcessor = PROCESSOR) -> Tensor:
    batch = processor(text=captions, return_tensors="np")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return torch.from_numpy(session(folder, "text").run(["text_embeds"], inputs)[0])


@pytest.mark.parametrize(
    "fields",
    [pytest.param({}, id="default"), pytest.param(tiny.FROZEN_TOWER, id="frozen tower", marks=pytest.mark.slow)],
)
def test_graphs_give_the_outputs_of_the_model(fields: dict[str, Any], tmp_path: Path) -> None:
    model = tiny.save(tmp_path, logit_bias_init_value=-2.5, **fields)
    assert cli.main(["export-onnx", str(tmp_path)]) == 0
    folder = tmp_path / "onnx"
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["text_model.onnx", "vision_model.onnx"]
    expected = model.encode_text(CAPTIONS, PROCESSOR)
    torch.testing.assert_close(text_embeds(folder, CAPTIONS), expected, atol=1e-5, rtol=0)
    # One caption: another batch size and length, no padding.
    torch.testing.assert_close(text_embeds(folder, CAPTIONS[:1]), expected[:1], atol=1e-5, rtol=0)
    images = model.encode_image([*IMAGES, IMAGES[0]], PROCESSOR)
    torch.testing.assert_close(image_embeds(folder), images, atol=1e-5, rtol=0)
    inputs = session(folder, "text").get_inputs()
    assert {entry.name: entry.shape for entry in inputs} == {
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "length"],
    }
    assert session(folder, "vision").get_inputs()[0].shape == ["batch", 3, 28, 28]
    metadata = session(folder, "text").get_modelmeta().custom_metadata_map
    assert float(metadata["logit_scale"]) == pytest.approx(model.logit_scale.exp().item())
    assert float(metadata["logit_bias"]) == -2.5


@pytest.mark.slow
def test_float16_graph_of_a_model_whose_llm_is_in_its_own_folder(tmp_path: Path) -> None:
    model = tiny.save_apart(tmp_path, **tiny.FROZEN_TOWER)
    arguments = [str(tmp_path / "clip"), "--output_dir", str(tmp_path / "out"), "--dtype", "float16"]
    assert cli.main(["export-onnx", *arguments, "--parts", "text"]) == 0
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["text_model.onnx"]
    embeds = text_embeds(tmp_path / "out", CAPTIONS)
    assert embeds.dtype == torch.float32
    torch.testing.assert_close(embeds, model.encode_text(CAPTIONS, PROCESSOR), atol=1e-2, rtol=0)
    assert cli.main(["export-onnx", *arguments, "--parts", "vision", "--overwrite"]) == 0
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["vision_model.onnx"]
    images = model.encode_image([*IMAGES, IMAGES[0]], PROCESSOR)
    torch.testing.assert_close(image_embeds(tmp_path / "out"), images, atol=1e-2, rtol=0)


def test_vision_half_has_only_a_vision_graph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = LLM2CLIPVisionModelWithProjection(tiny.joint_config()).eval()
    model.save_pretrained(tmp_path)
    PROCESSOR.image_processor.save_pretrained(tmp_path)
    assert cli.main(["export-onnx", str(tmp_path), "--parts", "text"]) == 2
    assert "is a vision half of an LLM2CLIP model and has no text graph" in capsys.readouterr().err
    assert cli.main(["export-onnx", str(tmp_path)]) == 0
    pixels = PROCESSOR(images=[*IMAGES, IMAGES[0]], return_tensors="pt")
    expected = torch.nn.functional.normalize(model(**pixels).pooler_output, dim=-1)
    torch.testing.assert_close(image_embeds(tmp_path / "onnx"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("model_type", "pooling"), TOWERS)
def test_vision_graph_of_other_towers(model_type: str, pooling: str, tmp_path: Path) -> None:
    model = LLM2CLIPModel(
        tiny.joint_config(vision=tiny.other_vision_config(model_type), vision_pooling=pooling)
    ).eval()
    model.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    export_onnx.run(export_onnx.ExportOnnxConfig(str(tmp_path), parts=["vision"]))
    expected = model.encode_image([*IMAGES, IMAGES[0]], PROCESSOR)
    torch.testing.assert_close(image_embeds(tmp_path / "onnx"), expected, atol=1e-5, rtol=0)


def test_image_processor_determines_the_image_size_of_the_graph(tmp_path: Path) -> None:
    """DINOv2 interpolates its positions, so a model may see smaller images than its tower was trained on."""
    model = LLM2CLIPModel(tiny.joint_config(vision=tiny.other_vision_config("dinov2"))).eval()
    model.save_pretrained(tmp_path)
    tiny.processor(image_size=14).save_pretrained(tmp_path)
    export_onnx.run(export_onnx.ExportOnnxConfig(str(tmp_path), parts=["vision"]))
    assert session(tmp_path / "onnx", "vision").get_inputs()[0].shape == ["batch", 3, 14, 14]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*LLMS, "two of them"])
def test_text_graph_of_other_llms(model_type: str, tmp_path: Path) -> None:
    text = tiny.pair_config() if model_type == "two of them" else tiny.text_config(model_type)
    model = tiny.save(tmp_path, text=text)
    export_onnx.run(export_onnx.ExportOnnxConfig(str(tmp_path), parts=["text"]))
    processor = LLM2CLIPProcessor.from_pretrained(tmp_path)
    expected = model.encode_text(CAPTIONS, processor)
    torch.testing.assert_close(text_embeds(tmp_path / "onnx", CAPTIONS, processor), expected, atol=1e-5, rtol=0)


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export-onnx", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_models_and_settings_that_cannot_be_exported_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_apart(tmp_path)
    clip, llm = str(tmp_path / "clip"), str(tmp_path / "llm")
    refused([llm], "it contains a text tower", capsys)
    refused(["someone/model"], "someone/model is not a folder; give a folder to write: --output-dir FOLDER", capsys)
    refused([clip, "--dtype", "int4"], "dtype is 'int4', but it has to be one of float32, float16, int8", capsys)
    refused([clip, "--parts", "audio"], "parts is ['audio']; choose vision, text or both", capsys)
    (tmp_path / "llm").rename(tmp_path / "moved")
    refused([clip], "--parts vision exports the vision graph without the LLM", capsys)
    (tmp_path / "clip" / "onnx").mkdir()
    refused([clip], "onnx exists; add --overwrite to replace it", capsys)
    assert not list((tmp_path / "clip" / "onnx").iterdir())
    message = "is not replaced, because llm2clip export-onnx did not write it"
    refused([clip, "--output_dir", clip, "--overwrite"], message, capsys)
    LLM2CLIPModel(tiny.joint_config(vision=tiny.other_vision_config("siglip2_vision_model"))).save_pretrained(
        tmp_path / "naflex"
    )
    refused([str(tmp_path / "naflex")], "reads images of any shape as lists of patches", capsys)
    assert not (tmp_path / "naflex" / "onnx").exists()


def test_graph_that_differs_from_torch_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save(tmp_path)
    run = onnx_writing.graph_rows
    monkeypatch.setattr(onnx_writing, "graph_rows", lambda *inputs: run(*inputs) + 1e-3)
    refused([str(tmp_path), "--parts", "vision"], "vision_model.onnx differs from torch by 1.0e-03", capsys)
    assert not [path for path in tmp_path.iterdir() if "onnx" in path.name]
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llm2clip"

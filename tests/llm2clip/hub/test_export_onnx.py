"""ONNX graphs in onnxruntime give the outputs of the exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm2clip import cli
from llm2clip.hub import export_onnx, onnx_writing
from llm2clip.hub.licenses import TERMS
from modeling_llm2clip import LLM2CLIPProcessor, LLM2CLIPVisionModelWithProjection
from tests.builders import tiny
from tests.builders.tiny import CAPTIONS, IMAGES
from tests.llm2clip.hub.conftest import Refused

onnxruntime = pytest.importorskip("onnxruntime")
PROCESSOR = tiny.processor()
PICTURES = [*IMAGES, IMAGES[0]]  # another batch size than that of the trace
CLOSE = {"atol": 1e-5, "rtol": 0}
# Towers and LLMs that differ most; the others are slow, or nightly.
LLMS = [
    pytest.param(name, marks=[] if name in ("qwen3", "gemma3_text", "phi3") else pytest.mark.nightly)
    for name in tiny.DECODERS
    if name != "llama"
]


def session(folder: Path, part: str) -> Any:
    return onnxruntime.InferenceSession(str(folder / f"{part}_model.onnx"))


def image_embeds(folder: Path, processor: LLM2CLIPProcessor = PROCESSOR) -> Tensor:
    pixels = processor(images=PICTURES, return_tensors="np")["pixel_values"]
    return torch.from_numpy(session(folder, "vision").run(["image_embeds"], {"pixel_values": pixels})[0])


def text_embeds(folder: Path, captions: list[str], processor: LLM2CLIPProcessor = PROCESSOR) -> Tensor:
    batch = processor(text=captions, return_tensors="np")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return torch.from_numpy(session(folder, "text").run(["text_embeds"], inputs)[0])


def graphs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*"))


def test_graphs_give_the_outputs_of_the_model(tmp_path: Path) -> None:
    model = tiny.save(tmp_path, logit_bias_init_value=-2.5, **tiny.FROZEN_TOWER)
    assert cli.main(["export-onnx", str(tmp_path)]) == 0
    folder = tmp_path / "onnx"
    assert graphs(folder) == ["text_model.onnx", "vision_model.onnx"]
    expected = model.encode_text(CAPTIONS, PROCESSOR)
    torch.testing.assert_close(text_embeds(folder, CAPTIONS), expected, **CLOSE)
    # One caption: another batch size and length, no padding.
    torch.testing.assert_close(text_embeds(folder, CAPTIONS[:1]), expected[:1], **CLOSE)
    torch.testing.assert_close(image_embeds(folder), model.encode_image(PICTURES, PROCESSOR), **CLOSE)
    metadata = session(folder, "text").get_modelmeta().custom_metadata_map
    assert float(metadata["logit_scale"]) == pytest.approx(model.logit_scale.exp().item())
    assert float(metadata["logit_bias"]) == -2.5


@pytest.mark.slow
def test_float16_graph_of_a_model_whose_llm_is_in_its_own_folder(tmp_path: Path) -> None:
    model = tiny.save_apart(tmp_path, **tiny.FROZEN_TOWER)
    out = tmp_path / "out"
    arguments = ["export-onnx", str(tmp_path / "clip"), "--output_dir", str(out), "--dtype", "float16", "--parts"]
    assert cli.main([*arguments, "text"]) == 0
    assert graphs(out) == ["text_model.onnx"]
    embeds = text_embeds(out, CAPTIONS)
    assert embeds.dtype == torch.float32
    torch.testing.assert_close(embeds, model.encode_text(CAPTIONS, PROCESSOR), atol=1e-2, rtol=0)
    assert cli.main([*arguments, "vision", "--overwrite"]) == 0
    assert graphs(out) == ["vision_model.onnx"]
    torch.testing.assert_close(image_embeds(out), model.encode_image(PICTURES, PROCESSOR), atol=1e-2, rtol=0)


def test_vision_half_has_only_a_vision_graph_and_the_license_of_what_it_was_made_from(
    tmp_path: Path, refused: Refused
) -> None:
    model, folder, out = LLM2CLIPVisionModelWithProjection(tiny.joint_config()), tmp_path / "half", tmp_path / "out"
    model.save_pretrained(folder)
    PROCESSOR.image_processor.save_pretrained(folder)
    (folder / "LICENSE").write_text("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT")
    card = "---\nlicense: {}\nbase_licenses: ['Llama-3.2-1B (llama3.2)']\n---\nA model.\n"
    command = ("export-onnx", folder, "--output-dir", out)
    refused("has no text graph", *command, "--parts", "text")
    (folder / "README.md").write_text(card.format("mit"))
    refused("does not keep the license of Llama-3.2-1B (llama3.2)", *command)
    assert not out.exists()
    (folder / "README.md").write_text(card.format("llama3.2"))
    assert cli.main([*map(str, command)]) == 0
    assert (out / "LICENSE").read_text() == (folder / "LICENSE").read_text()
    assert (out / "NOTICE").read_text() == f"{TERMS['llama3.2'].notice}\n"
    assert [path.name for path in out.glob("*.onnx")] == ["vision_model.onnx"]
    pixels = PROCESSOR(images=PICTURES, return_tensors="pt")
    expected = torch.nn.functional.normalize(model.eval()(**pixels).pooler_output, dim=-1)
    torch.testing.assert_close(image_embeds(out), expected, **CLOSE)


@pytest.mark.parametrize(
    ("model_type", "pooling", "layers", "size"),
    [
        pytest.param("siglip_vision_model", "cls", None, 28, marks=pytest.mark.slow),
        ("dinov2", "cls_mean", [1, 2], 14),  # smaller than what it was trained on: it interpolates its positions
        pytest.param("clip_vision_model", "cls_mean", [1, 2], 28, marks=pytest.mark.slow),
    ],
)
def test_vision_graph_of_other_towers(
    model_type: str, pooling: str, layers: list[int] | None, size: int, tmp_path: Path
) -> None:
    vision = tiny.other_vision_config(model_type)
    model = tiny.joint_model(vision=vision, vision_pooling=pooling, vision_layers=layers)
    model.save_pretrained(tmp_path)
    processor = tiny.processor(size)
    processor.save_pretrained(tmp_path)
    export_onnx.run(export_onnx.ExportOnnxConfig(str(tmp_path), parts=["vision"]))
    assert session(tmp_path / "onnx", "vision").get_inputs()[0].shape == ["batch", 3, size, size]
    found = image_embeds(tmp_path / "onnx", processor)
    torch.testing.assert_close(found, model.encode_image(PICTURES, processor), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", LLMS)
def test_text_graph_of_other_llms(model_type: str, tmp_path: Path) -> None:
    model = tiny.save(tmp_path, text=tiny.text_config(model_type))
    export_onnx.run(export_onnx.ExportOnnxConfig(str(tmp_path), parts=["text"]))
    processor = LLM2CLIPProcessor.from_pretrained(tmp_path)
    expected = model.encode_text(CAPTIONS, processor)
    torch.testing.assert_close(text_embeds(tmp_path / "onnx", CAPTIONS, processor), expected, **CLOSE)


def test_models_and_settings_that_cannot_be_exported_are_refused(tmp_path: Path, refused: Refused) -> None:
    tiny.save_apart(tmp_path)
    naflex = tiny.joint_model(vision=tiny.other_vision_config("siglip2_vision_model"))
    naflex.save_pretrained(tmp_path / "naflex")
    clip = tmp_path / "clip"
    for words, *arguments in (
        ("it contains a text tower", tmp_path / "llm"),
        ("reads images of any shape as lists of patches", tmp_path / "naflex"),
        ("someone/model is not a folder; give a folder to write: --output-dir FOLDER", "someone/model"),
        ("dtype is 'int4'", clip, "--dtype", "int4"),
        ("parts is ['audio']; choose vision, text or both", clip, "--parts", "audio"),
        ("text_encoder is query, but no text graph", clip, "--parts", "vision", "--text-encoder", "query"),
        ("the layout immich has a folder of its own", clip, "--layout", "immich"),
        ("llm2clip export-onnx did not write it", clip, "--output_dir", clip, "--overwrite"),
    ):
        refused(str(words), "export-onnx", *arguments)
    assert not list(tmp_path.glob("*/onnx"))
    (tmp_path / "llm").rename(tmp_path / "moved")
    refused("--parts vision exports the vision graph without the LLM", "export-onnx", clip)
    (clip / "onnx").mkdir()
    refused("onnx exists; add --overwrite to replace it", "export-onnx", clip)


@pytest.mark.parametrize(
    ("dtype", "spoil", "message"),
    [
        ("float32", lambda rows: rows + 1e-3, "vision_model.onnx differs from torch by 1.0e-03"),
        ("int8", lambda rows: rows.flip(1), "vision_model.onnx has a cosine of"),
    ],
)
def test_graph_that_differs_from_torch_is_not_kept(
    dtype: str, spoil: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    tiny.save(tmp_path)
    run = onnx_writing.graph_rows

    def spoilt(path: Path, inputs: Any) -> Tensor:
        rows = run(path, inputs)
        return rows if path.name == "float32.onnx" else spoil(rows)  # of which int8 is made

    monkeypatch.setattr(onnx_writing, "graph_rows", spoilt)
    refused(message, "export-onnx", tmp_path, "--parts", "vision", "--dtype", dtype)
    assert not [path for path in tmp_path.iterdir() if "onnx" in path.name]

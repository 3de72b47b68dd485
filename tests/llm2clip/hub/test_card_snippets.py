"""The code examples of a pushed card run in a new process without this package, local files or a cache."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from llm2clip.hub import build
from llm2clip.hub.cards.card import CARD, read_card
from llm2clip.utils.towers import save_text_tower
from modeling_llm2clip import LLM2CLIPTextModel, LLM2CLIPVisionModelWithProjection
from tests.llm2clip.hub.conftest import REPO, upload
from tests.loopback_hub import TOKEN, LoopbackHub
from tests.modeling_llm2clip import tiny
from tests.modeling_llm2clip.tiny import IMAGES
from tests.stranger import answer

pytestmark = pytest.mark.usefixtures("unchecked")
READER = """
import contextlib, io, json
shown = []
for snippet in json.loads(sys.argv[1]):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(snippet, "snippet", "exec"), {"__name__": "__main__"})
    shown.append(output.getvalue())
print(json.dumps(shown))
"""


def read(hub: LoopbackHub, folder: Path, home: Path, picture: bool = False) -> list[str]:
    """Push a folder and run the code examples of its card; returns the output of each.

    Args:
        hub: The hub.
        folder: A built folder.
        home: An empty folder for the new process.
        picture: Whether there is a picture.jpg in the working directory.
    """
    upload(hub, folder)
    card = hub.repo(REPO).files()[CARD].decode()
    reader = home / "reader"
    reader.mkdir()
    if picture:
        IMAGES[0].save(reader / "picture.jpg")
    snippets = json.dumps(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
    return answer(READER, snippets, home=reader, environment=hub.environment(home / "cache", token=None))


def test_examples_of_a_joint_model_with_an_example_image(hub: LoopbackHub, tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    IMAGES[0].save(tmp_path / "picture.png")
    settings = build.BuildConfig(str(tmp_path / "model"), str(tmp_path / "out"))
    settings.example_image, settings.example_captions = str(tmp_path / "picture.png"), ["noise", "a dog"]
    build.run(settings)
    probabilities, scores, similarity = read(hub, tmp_path / "out", tmp_path)
    assert probabilities.startswith("tensor([[0.")
    rows = ast.literal_eval(scores)
    assert {row["label"] for row in rows} == {"noise", "a dog"}
    assert sum(row["score"] for row in rows) == pytest.approx(1, abs=1e-4)
    assert similarity.startswith("tensor([[")


def test_examples_of_a_vision_half_with_an_image_of_the_user(hub: LoopbackHub, tmp_path: Path) -> None:
    LLM2CLIPVisionModelWithProjection(tiny.joint_config()).save_pretrained(tmp_path / "half")
    tiny.processor().image_processor.save_pretrained(tmp_path / "half")
    build.run(build.BuildConfig(str(tmp_path / "half"), str(tmp_path / "out")))
    data, text = read_card(tmp_path / "out")
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert "sentence-transformers" not in data["tags"]
    assert 'picture = "picture.jpg"  # path of an image' in text
    states, pooled = read(hub, tmp_path / "out", tmp_path, picture=True)
    assert states == "torch.Size([1, 24]) torch.Size([1, 17, 32])\n"
    assert pooled == "torch.Size([1, 24])\n"


def test_examples_of_a_text_tower(hub: LoopbackHub, tmp_path: Path) -> None:
    save_text_tower(tiny.text_model(), tiny.processor().tokenizer, tmp_path / "llm")
    build.run(build.BuildConfig(str(tmp_path / "llm"), str(tmp_path / "out")))
    shape, states, similarity = read(hub, tmp_path / "out", tmp_path)
    assert shape == "torch.Size([2, 32])\n"
    assert re.fullmatch(r"\[torch.Size\(\[1, \d+, 32\]\), torch.Size\(\[1, \d+, 32\]\)\]\n", states)
    assert similarity.startswith(("tensor([[1.0", "tensor([[0.99"))


def test_example_of_an_adapter_whose_llm_is_on_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tokenizer = tiny.processor().tokenizer
    save_text_tower(tiny.text_model(), tokenizer, tmp_path / "llm")
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("tester/llm")
    api.upload_folder(repo_id="tester/llm", folder_path=tmp_path / "llm")
    tower = LLM2CLIPTextModel.from_pretrained(tmp_path / "llm").eval()
    tower.decoder = peft.get_peft_model(tower.decoder, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    tower.decoder.peft_config["default"].base_model_name_or_path = "tester/llm"
    save_text_tower(tower, tokenizer, tmp_path / "adapter")
    build.run(build.BuildConfig(str(tmp_path / "adapter"), str(tmp_path / "out"), merge_adapter=False))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert read(hub, tmp_path / "out", tmp_path) == ["torch.Size([2, 32])\n"]

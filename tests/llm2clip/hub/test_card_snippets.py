"""The code examples of a pushed card run in a new process without this package, local files or a cache."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi

import llm2clip
from llm2clip.hub.cards.card import CARD, read_card
from llm2clip.models.towers import save_text_tower
from modeling_llm2clip import LLM2CLIPVisionModelWithProjection
from tests.builders import tiny
from tests.builders.tiny import IMAGES
from tests.llm2clip.hub.conftest import REPO, save_adapter, upload
from tests.loopback_hub import TOKEN, LoopbackHub
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
Read = Callable[[Path], list[str]]


@pytest.fixture
def read(hub: LoopbackHub, tmp_path: Path) -> Read:
    """Push a folder and run the code examples of its card beside a picture.jpg; returns the output of each."""

    def push_and_run(folder: Path) -> list[str]:
        upload(hub, folder)
        snippets = re.findall(r"```python\n(.*?)```", hub.repo(REPO).files()[CARD].decode(), re.DOTALL)
        home = tmp_path / "reader"
        home.mkdir()
        IMAGES[0].save(home / "picture.jpg")
        environment = hub.environment(tmp_path / "cache", token=None)
        return answer(READER, json.dumps(snippets), home=home, environment=environment)

    return push_and_run


def test_examples_of_a_joint_model_with_an_example_image(read: Read, built: Path) -> None:
    probabilities, scores, similarity = read(built)
    assert probabilities.startswith("tensor([[0.")
    rows = ast.literal_eval(scores)
    assert {row["label"] for row in rows} == {"noise", "a dog"}
    assert sum(row["score"] for row in rows) == pytest.approx(1, abs=1e-4)
    assert similarity.startswith("tensor([[")


def test_examples_of_a_vision_half_with_an_image_of_the_user(read: Read, tmp_path: Path) -> None:
    LLM2CLIPVisionModelWithProjection(tiny.joint_config()).save_pretrained(tmp_path / "half")
    tiny.processor().image_processor.save_pretrained(tmp_path / "half")
    llm2clip.build_folder(tmp_path / "half", tmp_path / "out")
    data, text = read_card(tmp_path / "out")
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert "sentence-transformers" not in data["tags"]
    assert 'picture = "picture.jpg"  # path of an image' in text
    pooled = "torch.Size([1, 24])\n"
    assert read(tmp_path / "out") == [pooled.strip() + " torch.Size([1, 17, 32])\n", pooled]


def test_examples_of_a_text_tower(read: Read, tmp_path: Path) -> None:
    save_text_tower(tiny.text_model(), tiny.processor().tokenizer, tmp_path / "llm")
    llm2clip.build_folder(tmp_path / "llm", tmp_path / "out")
    shape, states, similarity = read(tmp_path / "out")
    assert shape == "torch.Size([2, 32])\n"
    assert re.fullmatch(r"\[torch.Size\(\[1, \d+, 32\]\), torch.Size\(\[1, \d+, 32\]\)\]\n", states)
    assert similarity.startswith(("tensor([[1.0", "tensor([[0.99"))


def test_example_of_an_adapter_whose_llm_is_on_the_hub(read: Read, hub: LoopbackHub, tmp_path: Path) -> None:
    save_text_tower(tiny.text_model(), tiny.processor().tokenizer, tmp_path / "llm")
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo("tester/llm")
    api.upload_folder(repo_id="tester/llm", folder_path=tmp_path / "llm")
    save_adapter(tmp_path / "adapter", tmp_path / "llm", "tester/llm")
    llm2clip.build_folder(tmp_path / "adapter", tmp_path / "out", merge_adapter=False)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert read(tmp_path / "out") == ["torch.Size([2, 32])\n"]

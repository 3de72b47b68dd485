"""The snippets of a pushed card run for a reader who has nothing but the card: no package, no files, no cache."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from llm2clip.hub import build, push
from llm2clip.hub.cards import CARD
from llm2clip.utils.towers import save_text_tower
from modeling_llm2clip import LLM2CLIPTextModel, LLM2CLIPVisionModelWithProjection
from tests.loopback_hub import TOKEN, LoopbackHub
from tests.modeling_llm2clip import tiny
from tests.modeling_llm2clip.tiny import IMAGES
from tests.stranger import answer

REPO = "tester/tiny"
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


@pytest.fixture(autouse=True)
def _loaded_by_the_reader_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # test_build.py has the process that loads what was built.
    monkeypatch.setattr(build, "_validate", lambda *_: 0.0)


def read(hub: LoopbackHub, folder: Path, home: Path, picture: bool = False) -> list[str]:
    """Push a folder; returns what the snippets of the card print to a reader, who may have a picture."""
    push.run(push.PushConfig(str(folder), REPO, validate=False), HfApi(endpoint=hub.url, token=TOKEN))
    card = hub.repo(REPO).files()[CARD].decode()
    reader = home / "reader"
    reader.mkdir()
    if picture:
        IMAGES[0].save(reader / "picture.jpg")
    snippets = json.dumps(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
    return answer(READER, snippets, home=reader, environment=hub.environment(home / "cache", token=None))


def test_a_joint_model_with_a_picture(hub: LoopbackHub, tmp_path: Path) -> None:
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


def test_a_vision_half_and_the_readers_picture(hub: LoopbackHub, tmp_path: Path) -> None:
    LLM2CLIPVisionModelWithProjection(tiny.joint_config()).save_pretrained(tmp_path / "half")
    tiny.processor().image_processor.save_pretrained(tmp_path / "half")
    build.run(build.BuildConfig(str(tmp_path / "half"), str(tmp_path / "out")))
    assert 'picture = "picture.jpg"  # an image file of yours' in (tmp_path / "out" / CARD).read_text()
    states, pooled = read(hub, tmp_path / "out", tmp_path, picture=True)
    assert states == "torch.Size([1, 24]) torch.Size([1, 17, 32])\n"
    assert pooled == "torch.Size([1, 24])\n"


def test_a_text_tower(hub: LoopbackHub, tmp_path: Path) -> None:
    save_text_tower(tiny.text_model(), tiny.processor().tokenizer, tmp_path / "llm")
    build.run(build.BuildConfig(str(tmp_path / "llm"), str(tmp_path / "out")))
    shape, states, similarity = read(hub, tmp_path / "out", tmp_path)
    assert shape == "torch.Size([2, 32])\n"
    assert re.fullmatch(r"\[torch.Size\(\[1, \d+, 32\]\), torch.Size\(\[1, \d+, 32\]\)\]\n", states)
    assert similarity.startswith(("tensor([[1.0", "tensor([[0.99"))


def test_an_adapter_whose_llm_is_on_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
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

"""`llm2clip build`: what it writes loads for strangers, and says what it is."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from llm2clip_training import cli
from llm2clip_training.cards import CARD, read_card
from llm2clip_training.hub import build, validation
from llm2clip_training.hub.published import FOLDER, parameters, published_models
from llm2clip_training.towers import save_text_tower
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel, LLM2CLIPVisionModelWithProjection
from tests.modeling import tiny
from tests.modeling.tiny import CAPTIONS, IMAGES
from tests.stranger import HIDE


def run(*arguments: str | Path) -> None:
    assert cli.main(["build", *map(str, arguments)]) == 0


def refused(capsys: pytest.CaptureFixture[str], message: str, *arguments: str | Path) -> None:
    assert cli.main(["build", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def logits(folder: Path) -> torch.Tensor:
    processor = AutoProcessor.from_pretrained(folder)
    with torch.inference_mode():
        return AutoModel.from_pretrained(folder)(
            **processor(text=CAPTIONS, images=IMAGES, return_tensors="pt")
        ).logits_per_image


def test_an_llm_in_a_folder_is_bundled(tmp_path: Path) -> None:
    tiny.save_apart(tmp_path)
    (tmp_path / "clip" / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.0}]}))
    IMAGES[0].save(tmp_path / "picture.jpg")
    metrics = {"text_to_image_recall@1": 0.25, "text_to_image_recall@5": 0.5, "text_to_image_recall@10": 0.75}
    fields = {"model": "x", "task": "retrieval", "data": {"path": "/somewhere/pictures", "split": "test"}, **metrics}
    (tmp_path / "results.json").write_text(json.dumps(fields))
    expected = logits(tmp_path / "clip")
    out = tmp_path / "out"
    run(
        *(tmp_path / "clip", out, "--license", "mit", "--results", tmp_path / "results.json"),
        *("--example-image", tmp_path / "picture.jpg", "--example-captions", "noise", "a dog", "--languages", "en"),
    )
    for llm in (tmp_path / "llm").iterdir():
        llm.unlink()
    assert logits(out).equal(expected)
    assert LLM2CLIPModel.from_pretrained(out).config.text_model_name_or_path is None
    assert str(tmp_path) not in (out / "config.json").read_text()
    data, text = read_card(out)
    assert str(tmp_path) not in text.replace(str(out), "")
    assert (data["license"], data["language"]) == ("mit", ["en"])
    assert "| image-text retrieval | pictures (test) | text → image | 25.0 | 50.0 | 75.0 |" in text
    assert "![Training curves](training_curves.png)" in text
    assert "Apache License" in (out / "LICENSE").read_text()
    assert Image.open(out / "training_curves.png").size[0] > 100
    assert Image.open(out / "example.png").size == IMAGES[0].size


def run_snippets(folder: Path) -> list[str]:
    """What the Python blocks of a card print, each in a process that has never seen this package."""
    shown = []
    for snippet in re.findall(r"```python\n(.*?)```", (folder / CARD).read_text(), re.DOTALL):
        command = [sys.executable, "-I", "-c", HIDE + snippet]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr
        shown.append(done.stdout)
    return shown


def test_the_snippets_of_the_card_run(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    IMAGES[0].save(tmp_path / "picture.png")
    captions = ["--example-captions", "noise", "a dog"]
    run(tmp_path / "model", tmp_path / "out", "--example-image", tmp_path / "picture.png", *captions)
    shown = run_snippets(tmp_path / "out")
    assert len(shown) == 3
    scores = ast.literal_eval(shown[1])
    assert {row["label"] for row in scores} == {"noise", "a dog"}
    assert sum(row["score"] for row in scores) == pytest.approx(1, abs=1e-4)


def test_an_llm_on_the_hub_is_named(tmp_path: Path) -> None:
    tiny.save_apart(tmp_path)
    run(tmp_path / "clip", tmp_path / "out", "--text-model", "someone/llm")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["text_model_name_or_path"] == "someone/llm"
    assert fields["text_model_fingerprint"]
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in names if name.startswith("text_model.")]
    assert "someone/llm" in read_card(tmp_path / "out")[0]["base_model"]


def test_a_text_tower_and_its_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tokenizer = tiny.processor().tokenizer
    save_text_tower(tiny.text_model(), tokenizer, tmp_path / "llm")
    tower = LLM2CLIPTextModel.from_pretrained(tmp_path / "llm").eval()
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    tower.decoder = peft.get_peft_model(tower.decoder, lora)
    tower.decoder.peft_config["default"].base_model_name_or_path = str(tmp_path / "llm")
    save_text_tower(tower, tokenizer, tmp_path / "adapter")
    run(tmp_path / "adapter", tmp_path / "out")
    built = LLM2CLIPTextModel.from_pretrained(tmp_path / "out")
    assert not built.has_adapter
    expected = LLM2CLIPTextModel.from_pretrained(tmp_path / "adapter").encode(CAPTIONS, tokenizer)
    torch.testing.assert_close(built.encode(CAPTIONS, tokenizer), expected, atol=1e-5, rtol=1e-5)
    data, text = read_card(tmp_path / "out")
    assert data["pipeline_tag"] == "feature-extraction"
    assert "model.encode(" in text
    shape, similarity = run_snippets(tmp_path / "out")
    assert shape == "torch.Size([2, 32])\n"
    assert similarity.startswith(("tensor([[1.0", "tensor([[0.99"))


def test_a_vision_half(tmp_path: Path) -> None:
    half = LLM2CLIPVisionModelWithProjection(tiny.joint_config())
    half.save_pretrained(tmp_path / "half")
    tiny.processor().image_processor.save_pretrained(tmp_path / "half")
    run(tmp_path / "half", tmp_path / "out")
    data, text = read_card(tmp_path / "out")
    assert data["pipeline_tag"] == "image-feature-extraction"
    IMAGES[0].save(tmp_path / "out" / "picture.jpg")
    assert run_snippets(tmp_path / "out") == ["torch.Size([1, 24]) torch.Size([1, 17, 32])\n"]
    assert "SentenceTransformer" not in text


def test_code_can_live_in_one_repo(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", "--code-repo", "someone/code")
    assert not list((tmp_path / "out").glob("*.py"))
    for name in ("config.json", "processor_config.json"):
        targets = json.loads((tmp_path / "out" / name).read_text())["auto_map"].values()
        assert all(target.startswith("someone/code--") for target in targets), name


def test_building_again_keeps_what_was_written_on_the_card(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out")
    card = (tmp_path / "out" / CARD).read_text()
    (tmp_path / "model" / CARD).write_text(card.replace("An LLM2CLIP model:", "Ours, with love:"))
    run(tmp_path / "model", tmp_path / "out", "--overwrite", "--license", "mit")
    data, text = read_card(tmp_path / "out")
    assert "Ours, with love:" in text
    assert data["license"] == "mit"
    (tmp_path / "model" / CARD).write_text((tmp_path / "out" / CARD).read_text())
    run(tmp_path / "model", tmp_path / "out", "--overwrite", "--license", "apache-2.0")
    data, text = read_card(tmp_path / "out")
    assert data["license"] == "apache-2.0"
    assert "The licence of the weights is apache-2.0" in text


def test_nothing_stays_where_a_stranger_gets_other_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path / "model")
    save = build._save

    def spoiled(loaded: Any, config: Any, folder: Path) -> None:
        save(loaded, config, folder)
        with torch.no_grad():
            loaded.model.text_adapter.proj.weight.mul_(1.01)

    monkeypatch.setattr(build, "_save", spoiled)
    with pytest.raises(RuntimeError, match="gives other text outputs in a new process"):
        build.run(build.BuildConfig(str(tmp_path / "model"), str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_does_not_load_is_not_built(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    (tmp_path / "model" / "modeling_llm2clip_adapter.py").unlink()
    with pytest.raises(RuntimeError, match="does not load in a new process without this package"):
        validation.stranger_outputs(tmp_path / "model", IMAGES[0], CAPTIONS)


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_apart(tmp_path)
    clip, out = tmp_path / "clip", tmp_path / "out"
    refused(capsys, "give a model and a destination", clip)
    refused(capsys, "where others cannot load it from; bundle it", clip, out, "--bundle-text-model", "false")
    refused(capsys, "drop one", clip, out, "--bundle-text-model", "true", "--text-model", "someone/llm")
    refused(capsys, "text_model './llm' is no Hub id (OWNER/NAME)", clip, out, "--text-model", "./llm")
    refused(capsys, "is neither an LLM2CLIP model nor a text tower (its model_type is", tmp_path / "vision", out)
    refused(capsys, "the example picture nowhere.jpg cannot be read", clip, out, "--example-image", "nowhere.jpg")
    (tmp_path / "results.json").write_text("[]")
    refused(capsys, "holds no results of `llm2clip evaluate", clip, out, "--results", tmp_path / "results.json")
    assert not out.exists()
    out.mkdir()
    refused(capsys, "add --overwrite", clip, out)


@pytest.mark.parametrize("name", published_models())
def test_config_only_counts_the_parameters_of_every_published_model(name: str) -> None:
    counts = build.run(build.BuildConfig(str(FOLDER / name), config_only=True))
    assert counts.pop("parameters") == parameters(published_models()[name].build()) > 0
    assert sum(counts.values()) in (counts_total := parameters(published_models()[name].build()), counts_total - 1)

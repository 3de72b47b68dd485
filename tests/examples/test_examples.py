"""Every example runs and prints the expected results."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

from llm2clip.evaluation.benchmarks import choose_benchmarks
from modeling_llm2clip import LLM2CLIPModel
from tests.builders import small_runs
from tests.examples.conftest import EXAMPLES, FITTED, LONG_CAPTION, Run
from tests.forks import run_code

SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "common.py")


def losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"step \d+: loss ([\d.]+)", output)]


def test_every_script_is_one_screen_and_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text()
    assert SCRIPTS
    for script in SCRIPTS:
        limit = 166 if script == "multimodal_llm.py" else 60
        assert len((EXAMPLES / script).read_text().splitlines()) <= limit, script
        assert f"]({script})" in table


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_missing_model_is_one_clear_error(script: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        run(script)
    assert exit_code.value.code == 2
    assert "no model in runs/quickstart/llm2clip: run `make quickstart`, or give --model" in capsys.readouterr().err


def test_zero_shot_classification_names_the_pictures(run: Run, fitted: Path) -> None:
    labels = ["a leaf", "a crocodile", "a penguin", "a train", "a teddy bear"]
    shown = run("zero_shot_classification.py", "--model", fitted, "--labels", *labels)
    first = re.findall(r"^picture of: (.+)\n +([\d.]+)%  (.+)$", shown, re.MULTILINE)
    assert [name for name, _, _ in first] == ["maple leaf", "crocodile", "penguin", "monorail", "teddy bear"]
    assert [label for _, _, label in first] == labels
    assert all(float(share) > 50 for _, share, _ in first)


def test_long_caption_is_read_to_its_end(run: Run, fitted: Path) -> None:
    shown = run("long_caption_retrieval.py", "--model", fitted, "--caption", LONG_CAPTION, "--top", "2")
    whole, cut = re.findall(r"ending in .*\n  [\d.]+  (.+)\n", shown)
    assert (whole, cut) == ("penguin", "mahjong red dragon")
    assert FITTED[65][-20:] in shown


def test_patch_features_of_every_layer(run: Run, fitted: Path, tmp_path: Path) -> None:
    shown = run("patch_features.py", "--model", fitted, "--output", "patches.png")
    assert "pixels (1, 3, 28, 28); image embedding (1, 24)" in shown
    assert re.findall(r"hidden_states\[(\d)\] \(1, 17, 32\)", shown) == ["0", "1", "2"]
    picture = Image.open(tmp_path / "patches.png")
    assert picture.size == (672, 336)
    assert len(picture.crop((336, 0, 672, 336)).getcolors() or []) == 16


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_stages_train_on_a_plain_data_set(stage: str, run: Run, fitted: Path, tmp_path: Path) -> None:
    shown = run(f"train_{stage}.py", "--model", fitted, "--output-dir", "out")
    assert "'eval_loss': " in shown
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_fine_tuning_on_a_folder_measures_before_and_after(
    run: Run, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "my, pictures", tmp_path / "runs/fine_tuned"
    runpy.run_path(str(EXAMPLES / "fine_tune_on_a_folder.py"))["write_sample"](folder)
    shown = run("fine_tune_on_a_folder.py", "--model", fitted, "--data", folder)
    before, after = (float(rank) for rank in re.findall(r"T2I mean rank ([\d.]+)", shown))
    assert before != after
    trained = losses((output / "llm2clip/log.txt").read_text())
    assert trained[-1] < trained[0], trained
    results = [json.loads(path.read_text()) for path in (output / "results").glob("*.json")]
    assert [result["counts"]["images"] for result in results] == [138, 138]
    old, new = (AutoModel.from_pretrained(folder) for folder in (fitted, output / "llm2clip"))
    assert not torch.equal(old.visual_projection.weight, new.visual_projection.weight)
    for layer, frozen in ((0, True), (1, False)):
        before_layer, after_layer = (model.vision_model.blocks[layer].state_dict() for model in (old, new))
        assert all(torch.equal(value, after_layer[name]) for name, value in before_layer.items()) == frozen

    with pytest.raises(SystemExit):
        run("fine_tune_on_a_folder.py", "--model", fitted, "--data", folder)
    assert "runs/fine_tuned/llm2clip is there already: give another --output-dir" in capsys.readouterr().err


@pytest.mark.slow
def test_swapping_the_llm_leaves_image_embeddings_alone(run: Run, fitted: Path, tmp_path: Path) -> None:
    llm = small_runs.save_llm(tmp_path / "llm")
    shown = run("swap_the_llm.py", "--model", fitted, "--llm", llm, "--output-dir", "swapped")
    assert losses(shown)[-1] < losses(shown)[0]
    old, new = (LLM2CLIPModel.from_pretrained(folder).eval() for folder in (fitted, tmp_path / "swapped"))
    processor = AutoProcessor.from_pretrained(tmp_path / "swapped")
    image = Image.effect_noise((28, 28), 80).convert("RGB")
    torch.testing.assert_close(old.encode_image(image, processor), new.encode_image(image, processor))
    decoder = AutoModelForCausalLM.from_pretrained(llm).model
    assert torch.equal(new.text_model.decoder.embed_tokens.weight, decoder.embed_tokens.weight)
    assert new.encode_text(["a dog"], processor).shape == (1, 24)


@pytest.mark.slow
def test_swapping_the_vision_tower_leaves_caption_embeddings_alone(run: Run, fitted: Path, tmp_path: Path) -> None:
    tower = small_runs.save_dinov2_tower(tmp_path / "tower")
    shown = run("swap_the_vision_tower.py", "--model", fitted, "--vision-model", tower, "--output-dir", "swapped")
    assert losses(shown)[-1] < losses(shown)[0]
    old, new = (LLM2CLIPModel.from_pretrained(folder).eval() for folder in (fitted, tmp_path / "swapped"))
    processor = AutoProcessor.from_pretrained(tmp_path / "swapped")
    captions = ["a small dog", LONG_CAPTION]
    torch.testing.assert_close(old.encode_text(captions, processor), new.encode_text(captions, processor))
    assert new.config.vision_config.model_type == "dinov2"
    assert new.encode_image(Image.new("RGB", (50, 40)), processor).shape == (1, 24)


ANSWER_AGAIN = """
import json
import sys
import datasets
from transformers import AutoModelForImageTextToText, AutoProcessor
if sys.argv[3] == "eva02":
    import modeling_llm2clip
model, processor = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForImageTextToText, AutoProcessor))
rows = datasets.load_dataset("parquet", data_files=sys.argv[2], split="train")
prompts = [f"<image>{question}\\nAnswer:" for question in rows["question"]]
inputs = processor(images=rows["image"][:], text=prompts, padding=True, return_tensors="pt")
made = model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1]:]
print("ANSWERS", json.dumps([text.strip() for text in processor.batch_decode(made, skip_special_tokens=True)]))
"""


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four drawings, each with a question of one of two kinds."""
    rows = small_runs.rows_of_concepts().select([19, 54])
    asked = [
        {"image": image, "question": question, "answer": answer, "kind": kind}
        for image, name in zip(rows["image"], ("leaf", "crocodile"), strict=True)
        for kind, question, answer in (("what", "What is this?", name), ("is", f"Is this a {name}?", "yes"))
    ]
    path = tmp_path_factory.mktemp("questions") / "questions.parquet"
    datasets.Dataset.from_list(asked).cast_column("image", datasets.Image()).to_parquet(path)
    return path


@pytest.mark.parametrize("tower", ["eva02", pytest.param("dinov2", marks=pytest.mark.slow)])
def test_a_multimodal_llm_learns_to_answer_and_is_saved(
    tower: str, run: Run, fitted: Path, questions: Path, tmp_path: Path
) -> None:
    model = tmp_path / "tower"
    if tower == "eva02":
        shutil.copytree(fitted, model)
        config = json.loads((model / "config.json").read_text())
        config["vision_config"]["patch_dropout"] = 0.5  # as in the run that trained it
        (model / "config.json").write_text(json.dumps(config))
    else:
        small_runs.save_dinov2_tower(model)
    files = ("--train", questions, "--test", questions)
    small = ("--pool", "2", "--batch-size", "4", "--steps", "20", "--learning-rate", "1e-2")
    llm = small_runs.save_llm(tmp_path / "llm")
    shown = run("multimodal_llm.py", "--model", model, "--llm", llm, *files, *small, "--output-dir", "out")
    first, last = map(float, re.findall(r"'loss': '([\d.]+)'", shown))
    assert last < first
    answers, scores = (json.loads((tmp_path / f"out/{name}.json").read_text()) for name in ("answers", "scores"))
    right = [answer == expected for answer, expected in zip(answers, ("leaf", "yes", "crocodile", "yes"), strict=True)]
    assert scores == {"what": (right[0] + right[2]) / 2, "is": (right[1] + right[3]) / 2}
    assert f"what: {100 * scores['what']:.1f}% right" in shown
    again = [sys.executable, "-c", ANSWER_AGAIN, str(tmp_path / "out"), str(questions), tower]
    printed = run_code(again, env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}, cwd=tmp_path).stdout
    assert json.loads(printed.rpartition("ANSWERS ")[2]) == answers
    assert any(answers)


def test_a_multimodal_llm_resumes_where_it_was(run: Run, fitted: Path, questions: Path, tmp_path: Path) -> None:
    files = ("--llm", small_runs.save_llm(tmp_path / "llm"), "--train", questions, "--test", questions)
    small = ("--pool", "2", "--batch-size", "2", "--steps", "4", "--save-steps", "2")
    arguments = ("--model", fitted, *files, *small)
    run("multimodal_llm.py", *arguments, "--output-dir", "whole")
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    run("multimodal_llm.py", *arguments, "--output-dir", "resumed", "--resume")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    started = load_file(tmp_path / "whole/checkpoint-2/model.safetensors")
    changed = {name for name in whole if not torch.equal(whole[name], started[name])}
    assert changed
    assert all("projector" in name for name in changed)
    for name in whole:
        torch.testing.assert_close(whole[name], resumed[name])


def test_each_picture_of_the_bundled_benchmark_has_its_own_caption() -> None:
    [benchmark] = choose_benchmarks([str(EXAMPLES / "benchmarks" / "concepts.py")], EXAMPLES / "data")
    folder = benchmark.find(EXAMPLES / "data")
    data = benchmark.read(folder)
    assert benchmark.differences(data.counts()) == []
    assert (data.images.key(0), data.texts[0]) == ("emoji-google/1f004", "mahjong red dragon")
    assert data.owners.tolist() == list(range(695))

"""`llm2clip build`: the folder loads without this package, and its card states the facts."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

import llm2clip
from llm2clip import cli
from llm2clip.convert.published import FOLDER, published_models
from llm2clip.files.atomic import read_json
from llm2clip.files.manifests import write_manifest
from llm2clip.hub.build_card import read_results
from llm2clip.hub.cards.card import CARD, read_card
from llm2clip.hub.source_model import SourceModel
from llm2clip.models.towers import save_text_tower
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from tests.builders import tiny
from tests.builders.tiny import CAPTIONS, IMAGES
from tests.llm2clip.evaluation.made_results import retrieval, written
from tests.llm2clip.hub.conftest import REPO, Refused, save_adapter, upload
from tests.loopback_hub import LoopbackHub

MINE = {"given": "runs/mine", "library": "llm2clip 0.1.0", "fingerprint": "1", "dtype": "float32"}


def run(*arguments: str | Path) -> None:
    assert cli.main(["build", *map(str, arguments)]) == 0


def logits(folder: Path) -> torch.Tensor:
    inputs = AutoProcessor.from_pretrained(folder)(text=CAPTIONS, images=IMAGES, return_tensors="pt")
    with torch.inference_mode():
        return AutoModel.from_pretrained(folder)(**inputs).logits_per_image


def test_llm_in_a_local_folder_is_bundled_with_card_curves_and_example(tmp_path: Path) -> None:
    tiny.save_apart(tmp_path)
    (tmp_path / "clip" / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.0}]}))
    IMAGES[0].save(tmp_path / "picture.jpg")
    own = {"path": "/somewhere/pictures", "split": "test", "checksum": "0123456789abcdef"}
    differing = retrieval("x", differences=["999 images instead of 1,000"], model=MINE)
    results = written(tmp_path, retrieval("x", t2i=0.25, data=own, model=MINE), differing)
    expected = logits(tmp_path / "clip")
    out = tmp_path / "out"
    run(
        *(tmp_path / "clip", out, "--license", "mit", "--results", *results),
        *("--example-image", tmp_path / "picture.jpg", "--example-captions", "noise", "a dog", "--languages", "en"),
    )
    (tmp_path / "llm").rename(tmp_path / "elsewhere")
    assert logits(out).equal(expected)
    assert LLM2CLIPModel.from_pretrained(out).config.text_model_name_or_path is None
    assert str(tmp_path) not in (out / "config.json").read_text()
    data, text = read_card(out)
    assert str(tmp_path) not in text.replace(str(out), "")
    assert (data["license"], data["language"]) == ("mit", ["en"])
    assert "| pictures (test) | text → image | 25.0 (22.0-27.0) | 35.0 (32.0-37.0) | 45.0 (42.0-47.0) |" in text
    assert "Urban1k (not the published set: 999 images instead of 1,000)" in text
    assert "ties expected value, text format raw; images 1,000, texts 1,000, truncated texts 12" in text
    assert "![Training curves](training_curves.png)" in text
    assert "Apache License" in (out / "LICENSE-CODE").read_text()
    assert not (out / "LICENSE").exists()
    assert Image.open(out / "training_curves.png").size[0] > 100
    assert Image.open(out / "example.png").size == IMAGES[0].size


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"dtype": "float16"}, ""),
        (
            {"library": "transformers 5.2.0"},
            r"is of other, a model of transformers 5\.2\.0, and a card has .* `llm2clip evaluate`",
        ),
        ({"fingerprint": "2"}, "is of mine and .* of other, with other weights or preprocessing"),
    ],
    ids=["16 bits", "clip", "older weights"],
)
def test_results_of_another_model_do_not_go_onto_the_card(other: dict[str, str], message: str, tmp_path: Path) -> None:
    models = [{**MINE, "given": "mine"}, {**MINE, **other, "given": "other"}]
    files = list(map(Path, written(tmp_path, *(retrieval(model["given"], model=model) for model in models))))
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        assert len(read_results(files)) == 2


def test_a_result_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no result file .*none\.json: `llm2clip evaluate`"):
        read_results([tmp_path / "none.json"])


@pytest.mark.usefixtures("unchecked")
def test_card_curves_and_example_of_a_model_on_the_hub_are_kept(hub: LoopbackHub, tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    (tmp_path / "model" / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 2.0}]}')
    turned = Image.Exif()
    turned[0x0112] = 6
    IMAGES[0].save(tmp_path / "phone.jpg", exif=turned)
    IMAGES[0].resize((20, 20)).save(tmp_path / "second.png")
    pushed = tmp_path / "pushed"
    given = ("--example-image", tmp_path / "phone.jpg", "--example-captions", "noise", "a dog")
    run(tmp_path / "model", pushed, "--license", "mit", *given)
    card = (pushed / CARD).read_text().replace("license: mit", "license: mit\nmy_key: 1")
    (pushed / CARD).write_text(f"{card}\nMy own words:")
    upload(hub, pushed)
    run(REPO, tmp_path / "again")
    data, text = read_card(tmp_path / "again")
    assert (data["license"], data["my_key"], "My own words:" in text) == ("mit", 1, True)
    assert data["widget"] == [{"src": "example.png", "candidate_labels": "noise, a dog"}]
    assert f'cached_file("{tmp_path / "again"}", "example.png")' in text
    assert 'captions = ["noise", "a dog"]' in text
    for name in ("example.png", "training_curves.png"):
        assert Image.open(tmp_path / "again" / name).tobytes() == Image.open(pushed / name).tobytes(), name
    example = Image.open(tmp_path / "again" / "example.png")
    assert (example.size, dict(example.getexif())) == (IMAGES[0].size[::-1], {})
    # Unless another is given.
    run(REPO, tmp_path / "other", "--example-image", tmp_path / "second.png", "--example-captions", "grain")
    assert read_card(tmp_path / "other")[0]["widget"] == [{"src": "example.png", "candidate_labels": "grain"}]
    assert Image.open(tmp_path / "other" / "example.png").size == (20, 20)


@pytest.mark.usefixtures("unchecked")
def test_second_build_keeps_the_edits_of_the_card_but_not_its_license(tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    tiny.save(source)
    run(source, out)
    other = ("other", "--license-name", "own", "--license-link", "LICENSE.txt")
    for license, words in ((("apache-2.0",), "apache-2.0"), (other, "[own](LICENSE.txt)")):
        card = (out / CARD).read_text()
        (source / CARD).write_text(f"{card}\nEdited by hand:")
        run(source, out, "--overwrite", "--license", *license)
        data, text = read_card(out)
        assert data["license"] == license[0]
        assert f"The license of the weights is {words}" in text
        assert "Edited by hand:" in text
    assert (data["license_name"], data["license_link"]) == ("own", "LICENSE.txt")


def test_llm_on_the_hub_is_referred_to_and_not_bundled(tmp_path: Path) -> None:
    tiny.save_apart(tmp_path)
    run(tmp_path / "clip", tmp_path / "out", "--text-model", "someone/llm")
    fields = read_json(tmp_path / "out" / "config.json")
    assert fields["text_model_name_or_path"] == "someone/llm"
    assert fields["text_model_fingerprint"]
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in names if name.startswith("text_model.")]
    assert "someone/llm" in read_card(tmp_path / "out")[0]["base_model"]


def test_adapter_of_a_text_tower_is_merged(tmp_path: Path) -> None:
    tokenizer = tiny.processor().tokenizer
    save_text_tower(tiny.text_model(), tokenizer, tmp_path / "llm")
    save_adapter(tmp_path / "adapter", tmp_path / "llm", str(tmp_path / "llm"))
    run(tmp_path / "adapter", tmp_path / "out")
    built = LLM2CLIPTextModel.from_pretrained(tmp_path / "out")
    assert not built.has_adapter
    expected = LLM2CLIPTextModel.from_pretrained(tmp_path / "adapter").encode(CAPTIONS, tokenizer)
    torch.testing.assert_close(built.encode(CAPTIONS, tokenizer), expected, atol=1e-5, rtol=1e-5)
    assert read_card(tmp_path / "out")[0]["pipeline_tag"] == "feature-extraction"


@pytest.mark.usefixtures("unchecked")
def test_code_repo_replaces_the_code_in_the_folder(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", "--code-repo", "someone/code")
    assert not list((tmp_path / "out").glob("*.py"))
    for name in ("config.json", "processor_config.json"):
        targets = read_json(tmp_path / "out" / name)["auto_map"].values()
        assert all(target.startswith("someone/code--") for target in targets), name


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda model, folder: model.text_adapter.proj.weight.data.mul_(1.01),
            r"the text outputs of .* in a new process differ by",
        ),
        (
            lambda model, folder: (folder / "modeling_llm2clip_decoder.py").unlink(),
            "does not load in a new process without this package",
        ),
    ],
    ids=["outputs", "code"],
)
def test_nothing_is_written_that_is_not_the_model_in_a_new_process(
    spoil: Callable[[Any, Path], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save(tmp_path / "model")
    save = SourceModel.save

    def save_and_spoil(self: SourceModel, folder: Path) -> None:
        save(self, folder)
        spoil(self.model, folder)

    monkeypatch.setattr(SourceModel, "save", save_and_spoil)
    with pytest.raises(RuntimeError, match=message):
        llm2clip.build_folder(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_wrong_settings_are_refused_before_anything_is_written(tmp_path: Path, refused: Refused) -> None:
    tiny.save_apart(tmp_path)
    out = tmp_path / "out"
    command = ("build", tmp_path / "clip", out)
    (tmp_path / "results.json").write_text("{}")
    refused("give a model and a destination", *command[:2])
    refused("it contains model_type 'eva02_vision_model'", "build", tmp_path / "vision", out)
    refused("bundle_text_model is True, but", "build", tmp_path / "llm", out, "--bundle-text-model", "true")
    refused("llm has no adapter", "build", tmp_path / "llm", out, "--merge-adapter", "false")
    refused("revision v2 is given, but", *command, "--revision", "v2")
    for words, *options in (
        ("which others cannot load; bundle it", "--bundle-text-model", "false"),
        ("text_model leaves the LLM out", "--bundle-text-model", "true", "--text-model", "someone/llm"),
        ("text_model './llm' is not a Hub id (OWNER/NAME)", "--text-model", "./llm"),
        ("The image 'nowhere.jpg' cannot be used", "--example-image", "nowhere.jpg"),
        ("is not a result of schema version 1", "--results", tmp_path / "results.json"),
        ("an example caption is empty", "--example-captions", "a", ""),
        ("datasets: Repo id must", "--datasets", "./x"),
        ("require license: other", "--license", "mit", "--license-name", "own"),
    ):
        refused(str(words), *command, *options)
    assert not out.exists()
    out.mkdir()
    refused("add --overwrite", *command)


@pytest.mark.parametrize("name", ["LLM2CLIP-EVA02-B-16", "LLM2CLIP-Qwen2.5-0.5B-CC"])
def test_config_only_counts_the_parameters_of_a_model(name: str) -> None:
    counts = llm2clip.build_folder(FOLDER / name, "", config_only=True)
    total = counts.pop("parameters")
    assert total == published_models()[name].build().num_parameters() > 0
    assert sum(counts.values()) in (total, total - 1)  # without the logit scale


@pytest.mark.usefixtures("unchecked")
def test_only_an_earlier_build_apart_from_its_source_is_replaced(tmp_path: Path, refused: Refused) -> None:
    run_folder = tmp_path / "run"
    tiny.save(run_folder)
    tiny.save(run_folder / "checkpoint-6")
    files = sorted(run_folder.rglob("*"))
    refused("contains the source", "build", run_folder / "checkpoint-6", run_folder, "--overwrite")
    refused("is inside the source", "build", run_folder, run_folder / "built", "--overwrite")
    for _ in range(2):
        run(run_folder / "checkpoint-6", tmp_path / "out", "--overwrite")
    refused("llm2clip build did not write it", "build", tmp_path / "out", run_folder, "--overwrite")
    assert sorted(run_folder.rglob("*")) == files
    # Nor is the LLM of a model, even if an earlier build had written it.
    tiny.save_apart(tmp_path)
    write_manifest(tmp_path / "llm", "build")
    refused("contains the source", "build", tmp_path / "clip", tmp_path / "llm", "--overwrite")
    assert read_json(tmp_path / "llm" / "config.json")["model_type"] == "llm2clip_text_model"


def test_a_model_with_outputs_that_are_not_finite_is_not_built(tmp_path: Path, refused: Refused) -> None:
    model = tiny.save(tmp_path / "model")
    torch.nn.init.constant_(model.visual_projection.weight, float("nan"))
    model.save_pretrained(tmp_path / "model")
    refused("samples are NaN or infinite: image 0", "build", tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()

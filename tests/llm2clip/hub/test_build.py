"""`llm2clip build`: the folder loads without this package, and its card states the facts."""

from __future__ import annotations

import json
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
from llm2clip.hub import build, new_process, source_model
from llm2clip.hub.build_card import read_results
from llm2clip.hub.cards.card import CARD, read_card
from llm2clip.hub.source_model import SourceModel
from llm2clip.utils.files import read_json
from llm2clip.utils.manifests import write_manifest
from llm2clip.utils.towers import save_text_tower
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextModel
from tests.llm2clip.convert import checkpoints
from tests.llm2clip.convert.checkpoints import OPENAI
from tests.llm2clip.evaluation.made_results import classification, retrieval, written
from tests.llm2clip.hub.conftest import REPO, upload
from tests.loopback_hub import TOKEN, File, LoopbackHub, Repo
from tests.modeling_llm2clip import tiny
from tests.modeling_llm2clip.tiny import CAPTIONS, IMAGES


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


@pytest.mark.parametrize("fields", [{}, tiny.FROZEN_TOWER], ids=["default", "frozen tower"])
def test_llm_in_a_local_folder_is_bundled_with_card_curves_and_example(fields: dict[str, Any], tmp_path: Path) -> None:
    tiny.save_apart(tmp_path, **fields)
    (tmp_path / "clip" / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.0}]}))
    IMAGES[0].save(tmp_path / "picture.jpg")
    own = {"path": "/somewhere/pictures", "split": "test", "checksum": "0123456789abcdef"}
    retrieval("x", t2i=0.25, data=own, model=MINE).write(tmp_path / "results.json")
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
    assert "| image-text retrieval | pictures (test) | text → image | 25.0 | 35.0 | 45.0 |" in text
    assert "![Training curves](training_curves.png)" in text
    assert "Apache License" in (out / "LICENSE-CODE").read_text()
    assert not (out / "LICENSE").exists()
    assert Image.open(out / "training_curves.png").size[0] > 100
    assert Image.open(out / "example.png").size == IMAGES[0].size


MINE = {"given": "runs/mine", "library": "llm2clip 0.1.0", "fingerprint": "1", "dtype": "float32"}


def test_results_of_published_sets_go_onto_the_card(tmp_path: Path) -> None:
    result = retrieval("runs/mine", t2i=0.5, i2t=0.25, differences=["999 images instead of 1,000"], model=MINE)
    (path,) = written(tmp_path, result)
    evaluation = read_results([Path(path)])[0]
    assert evaluation.title == "Urban1k (not the published set: 999 images instead of 1,000)"
    assert (evaluation.task, evaluation.dataset, evaluation.revision) == (
        "image-text retrieval", "urban1k", "0123456789abcdef",
    )  # fmt: skip
    assert evaluation.compared == result.scores
    assert evaluation.remarks == (
        "retrieval, positives rows, ties expected value, text format raw; "
        "images 1,000, texts 1,000, truncated texts 12, tied text queries 3"
    )
    (path,) = written(tmp_path, classification("runs/mine", 0.75, model=MINE))
    evaluation = read_results([Path(path)])[0]
    assert (evaluation.title, evaluation.compared["accuracy"]) == ("ImageNet-1k (openai-80)", 0.75)
    Path(path).write_text('{"schema_version": 7}')
    with pytest.raises(ValueError, match="schema version"):
        read_results([Path(path)])[0]


def test_results_of_another_model_do_not_go_onto_the_card(tmp_path: Path) -> None:
    def files(**models: dict[str, str]) -> list[Path]:
        results = [retrieval(name, model={**model, "given": name}) for name, model in models.items()]
        return [Path(path) for path in written(tmp_path, *results)]

    assert len(read_results(files(mine=MINE, again={**MINE, "dtype": "float16"}))) == 2
    with pytest.raises(ValueError, match=r"json is of clip, a model of transformers 5\.2\.0: leave it out"):
        read_results(files(mine=MINE, clip={**MINE, "library": "transformers 5.2.0"}))
    with pytest.raises(ValueError, match=r"is of mine and .* of older, with other weights or preprocessing"):
        read_results(files(mine=MINE, older={**MINE, "fingerprint": "2"}))


@pytest.mark.usefixtures("unchecked")
def test_example_image_is_rotated_by_its_exif_orientation(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    turned = Image.Exif()
    turned[0x0112] = 6
    IMAGES[0].save(tmp_path / "phone.jpg", exif=turned)
    run(tmp_path / "model", tmp_path / "out", "--example-image", tmp_path / "phone.jpg")
    example = Image.open(tmp_path / "out" / "example.png")
    assert example.size == IMAGES[0].size[::-1]
    assert not example.getexif()


@pytest.mark.usefixtures("unchecked")
def test_card_and_curves_of_a_model_on_the_hub_are_kept(hub: LoopbackHub, tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    (tmp_path / "model" / CARD).write_text("---\nlicense: mit\nmy_key: 1\n---\n\nMy own words.\n")
    IMAGES[0].save(tmp_path / "model" / "training_curves.png")
    repo = Repo("tester/model", "model")
    files = {path.name: File(path.read_bytes(), lfs=False) for path in (tmp_path / "model").iterdir()}
    repo.commit("main", files, "a model")
    hub.repos["model", repo.name] = repo
    run(repo.name, tmp_path / "out")
    data, text = read_card(tmp_path / "out")
    assert (data["license"], data["my_key"], text) == ("mit", 1, "My own words.\n")
    assert (tmp_path / "out" / "training_curves.png").read_bytes() == files["training_curves.png"].content


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("place", ["folder", "hub"])
def test_example_of_the_source_is_kept_with_its_captions_until_another_is_given(
    place: str, hub: LoopbackHub, tmp_path: Path
) -> None:
    tiny.save(tmp_path / "model")
    IMAGES[0].save(tmp_path / "first.png")
    IMAGES[1].resize((20, 20)).save(tmp_path / "second.png")
    given = ("--example-image", tmp_path / "first.png", "--example-captions", "noise", "a dog")
    run(tmp_path / "model", tmp_path / "first", *given)
    source = str(tmp_path / "first")
    if place == "hub":
        upload(hub, tmp_path / "first")
        source = REPO
    run(source, tmp_path / "again")
    data, text = read_card(tmp_path / "again")
    assert data["widget"] == [{"src": "example.png", "candidate_labels": "noise, a dog"}]
    assert f'cached_file("{tmp_path / "again"}", "example.png")' in text
    assert 'captions = ["noise", "a dog"]' in text
    assert Image.open(tmp_path / "again" / "example.png").tobytes() == IMAGES[0].tobytes()
    run(source, tmp_path / "other", "--example-image", tmp_path / "second.png", "--example-captions", "grain")
    assert read_card(tmp_path / "other")[0]["widget"] == [{"src": "example.png", "candidate_labels": "grain"}]
    assert Image.open(tmp_path / "other" / "example.png").size == (20, 20)


def test_llm_on_the_hub_is_referred_to_and_not_bundled(tmp_path: Path) -> None:
    tiny.save_apart(tmp_path)
    run(tmp_path / "clip", tmp_path / "out", "--text-model", "someone/llm")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["text_model_name_or_path"] == "someone/llm"
    assert fields["text_model_fingerprint"]
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in names if name.startswith("text_model.")]
    assert "someone/llm" in read_card(tmp_path / "out")[0]["base_model"]


def test_adapter_of_a_text_tower_is_merged(tmp_path: Path) -> None:
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


def test_code_repo_replaces_the_code_in_the_folder(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", "--code-repo", "someone/code")
    assert not list((tmp_path / "out").glob("*.py"))
    for name in ("config.json", "processor_config.json"):
        targets = json.loads((tmp_path / "out" / name).read_text())["auto_map"].values()
        assert all(target.startswith("someone/code--") for target in targets), name


@pytest.mark.usefixtures("unchecked")
def test_second_build_keeps_the_edits_of_the_card_but_not_its_license(tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    tiny.save(source)
    run(source, out)
    other = ("other", "--license-name", "own", "--license-link", "LICENSE.txt")
    for license, words in ((("mit",), "mit"), (("apache-2.0",), "apache-2.0"), (other, "[own](LICENSE.txt)")):
        card = (out / CARD).read_text()
        (source / CARD).write_text(card.replace("An LLM2CLIP model:", "Edited by hand:"))
        run(source, out, "--overwrite", "--license", *license)
        data, text = read_card(out)
        assert data["license"] == license[0]
        assert f"The license of the weights is {words}" in text
        assert "Edited by hand:" in text
    assert (data["license_name"], data["license_link"]) == ("own", "LICENSE.txt")


@pytest.mark.parametrize("llm", [None, "someone/llm"])
def test_nothing_is_written_if_outputs_differ_in_a_new_process(
    llm: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save(tmp_path / "model")
    save = SourceModel.save

    def save_and_change_the_model(self: SourceModel, folder: Path) -> None:
        save(self, folder)
        with torch.no_grad():
            self.model.text_adapter.proj.weight.mul_(1.01)

    monkeypatch.setattr(SourceModel, "save", save_and_change_the_model)
    with pytest.raises(RuntimeError, match=r"the text outputs of .* in a new process differ by"):
        build.run(build.BuildConfig(str(tmp_path / "model"), str(tmp_path / "out"), text_model=llm))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_folder_without_its_code_does_not_load_in_a_new_process(tmp_path: Path) -> None:
    tiny.save(tmp_path / "model")
    (tmp_path / "model" / "modeling_llm2clip_decoder.py").unlink()
    with pytest.raises(RuntimeError, match="does not load in a new process without this package"):
        new_process.outputs_of_new_process(tmp_path / "model", (True, True), IMAGES[0], CAPTIONS)


def test_wrong_settings_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.save_apart(tmp_path)
    clip, out = tmp_path / "clip", tmp_path / "out"
    refused(capsys, "give a model and a destination", clip)
    refused(capsys, "which others cannot load; bundle it", clip, out, "--bundle-text-model", "false")
    refused(capsys, "drop one", clip, out, "--bundle-text-model", "true", "--text-model", "someone/llm")
    refused(capsys, "text_model './llm' is not a Hub id (OWNER/NAME)", clip, out, "--text-model", "./llm")
    refused(capsys, "it contains model_type 'eva02_vision_model'", tmp_path / "vision", out)
    refused(capsys, "The image 'nowhere.jpg' cannot be used: the file", clip, out, "--example-image", "nowhere.jpg")
    results = tmp_path / "results.json"
    for content, message in (
        ("[]", "does not contain a JSON object"),
        ("{}", "is not a result of schema version 1"),
    ):
        results.write_text(content)
        refused(capsys, message, clip, out, "--results", results)
    refused(capsys, "an example caption is empty: ['a', '']", clip, out, "--example-captions", "a", "")
    for name, value in (("datasets", "./x"), ("base_models", "..")):
        refused(capsys, f"{name}: Repo id must", clip, out, f"--{name}", value)
    for options in (("--license", "other"), ("--license", "mit", "--license-name", "own")):
        refused(capsys, "require license: other, which requires both", clip, out, *options)
    assert not out.exists()
    out.mkdir()
    refused(capsys, "add --overwrite", clip, out)


@pytest.mark.parametrize("name", published_models())
def test_config_only_counts_the_parameters_of_a_published_model(name: str) -> None:
    counts = build.run(build.BuildConfig(str(FOLDER / name), config_only=True))
    total = counts.pop("parameters")
    assert total == published_models()[name].build().num_parameters() > 0
    assert sum(counts.values()) in (total, total - 1)  # without the logit scale


@pytest.mark.usefixtures("unchecked")
def test_only_an_earlier_build_apart_from_its_source_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = tmp_path / "run"
    tiny.save(run_folder)
    tiny.save(run_folder / "checkpoint-6")
    files = sorted(run_folder.rglob("*"))
    refused(capsys, "contains the source", run_folder / "checkpoint-6", run_folder, "--overwrite")
    refused(capsys, "is inside the source", run_folder, run_folder / "built", "--overwrite")
    for _ in range(2):
        run(run_folder / "checkpoint-6", tmp_path / "out", "--overwrite")
    refused(capsys, "llm2clip build did not write it", tmp_path / "out", run_folder, "--overwrite")
    assert sorted(run_folder.rglob("*")) == files


def test_the_llm_of_a_model_is_not_replaced_by_its_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_apart(tmp_path)
    write_manifest(tmp_path / "llm", "build")  # as if an earlier build had written it
    refused(capsys, "contains the source", tmp_path / "clip", tmp_path / "llm", "--overwrite")
    assert read_json(tmp_path / "llm" / "config.json")["model_type"] == "llm2clip_text_model"


def test_a_model_with_outputs_that_are_not_finite_is_not_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.save(tmp_path / "model")
    torch.nn.init.constant_(model.visual_projection.weight, float("nan"))
    model.save_pretrained(tmp_path / "model")
    refused(capsys, "samples are NaN or infinite: image 0", tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_are_freed_before_the_new_process_loads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path / "model")
    load, loaded, compare, places = SourceModel.load, [], source_model.outputs_of_new_process, []

    def loading(*arguments: Any) -> SourceModel:
        loaded.append(load(*arguments))
        return loaded[0]

    def comparing(*arguments: Any, **options: Any) -> float:
        places.extend(value.device.type for value in loaded[0].model.state_dict().values())
        return compare(*arguments, **options)

    monkeypatch.setattr(SourceModel, "load", loading)
    monkeypatch.setattr(source_model, "outputs_of_new_process", comparing)
    run(tmp_path / "model", tmp_path / "out")
    assert set(places) == {"meta"}


@pytest.mark.usefixtures("unchecked")
def test_checkpoint_is_converted_built_and_pushed_by_functions_alone(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    converted = llm2clip.convert_checkpoint(
        Path(checkpoints.original_pt(OPENAI, tmp_path / "model.pt")),
        tmp_path / "converted",
        model_config=checkpoints.model_config(OPENAI, tmp_path),
        text_model=checkpoints.llm_of(OPENAI, tmp_path / "llm"),
    )
    assert converted["written"] == str(tmp_path / "converted")
    built = llm2clip.build_folder(tmp_path / "converted", tmp_path / "built", license="mit")
    assert built["written"] == str(tmp_path / "built")
    pushed = llm2clip.push_folder(tmp_path / "built", "tester/tiny", check=False)
    assert pushed["repo"] == f"{hub.url}/tester/tiny"
    arrived = hub.repo("tester/tiny").files()
    assert arrived["model.safetensors"] == (tmp_path / "built" / "model.safetensors").read_bytes()

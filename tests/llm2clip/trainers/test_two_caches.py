"""Stage 2 on two embedding caches side by side: of an LLM after stage 1, and of the text half of a CLIP model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from llm2clip import PairedCache, Stage2Config, Stage2Trainer, cli, load_encoder
from llm2clip.command_line.settings import build_config
from llm2clip.data import CaptionSource, distinct_captions
from llm2clip.encoders import embed
from llm2clip.encoders.stored import open_stored_encoder
from llm2clip.hub.licenses import bases_of
from llm2clip.hub.push import _check_folder
from llm2clip.losses import clip_loss
from llm2clip.models.new_model import from_vision_text_pretrained
from llm2clip.models.towers import open_text_tower
from llm2clip.store import StoreMismatchError
from llm2clip.trainers import run_stage2
from llm2clip.trainers.stage2_config import Stage2Recipe
from modeling_llm2clip import LLM2CLIPModel, LLM2CLIPTextConfig, LLM2CLIPTextModel
from tests.builders import small_runs, tiny
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.encoders.models import LENGTH, save_transformers
from tests.llm2clip.trainers.rows import settings
from tests.llm2clip.trainers.stages import assert_equal, broken_after, llm2clip, losses

TEXTS = ["a dog", "two children play football in a park", "a red bus " * 30]
ALONE = r"takes llm_embeds alone, rows of width 56: the embeddings of .*text \(32\) and .*clip \(24\) side by side"


class Caches(NamedTuple):
    folders: list[str]
    clip: str


@pytest.fixture(scope="module")
def caches(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Caches:
    folder: Path = tmp_path_factory.mktemp("caches")
    save_transformers("clip", folder / "clip")
    clip = str(folder / "clip")
    sources = [small_runs.concepts(), small_runs.concepts("validation", max_samples=40)]
    fields = {"text_model_name_or_path": clip, "output_dir": str(folder / "cache"), "sources": sources}
    embed.run(build_config(embed.EmbedConfig, fields))
    return Caches([inputs.cache, str(folder / "cache")], clip)


def fields_of(caches: Caches, folder: Path, **changes: Any) -> dict[str, Any]:
    fields = small_runs.stage2_fields(folder, caches.clip, "", "")
    return {**fields, "embedding_cache": caches.folders, **changes}


@pytest.fixture(scope="module")
def trained(caches: Caches, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("trained")
    run_stage2.run(build_config(Stage2Recipe, fields_of(caches, folder / "run", max_steps=2, save_strategy="no")))
    return folder / "run"


def stored_rows(caches: Caches, count: int = 8) -> tuple[list[str], Tensor]:
    captions = distinct_captions(CaptionSource.from_dict(small_runs.concepts()))[:count]
    return captions, PairedCache.of_folders(caches.folders).lookup(captions)


def test_the_text_half_of_clip_is_a_text_tower(caches: Caches) -> None:
    tower, tokenizer = open_text_tower(caches.clip)
    clip = CLIPModel.from_pretrained(caches.clip).eval()
    tokens = AutoTokenizer.from_pretrained(caches.clip)(TEXTS, truncation=True, max_length=LENGTH, padding=True)
    inputs = {name: torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = clip.text_model(**inputs).last_hidden_state
        expected = clip.text_projection(states[torch.arange(len(TEXTS)), inputs["attention_mask"].sum(1) - 1])
    torch.testing.assert_close(tower.encode(TEXTS, tokenizer), expected, atol=1e-5, rtol=1e-5)


def test_a_model_of_two_caches_takes_their_rows_and_nothing_else(caches: Caches, trained: Path) -> None:
    model = LLM2CLIPModel.from_pretrained(trained).eval()
    assert model.text_model is None
    assert model.config.text_model_name_or_path is None
    assert model.config.text_config.hidden_size == 56
    assert model.config.text_model_fingerprint == PairedCache.of_folders(caches.folders).manifest.fingerprint
    _, rows = stored_rows(caches)
    with torch.no_grad():
        assert model.get_text_features(llm_embeds=rows).pooler_output.shape == (8, 24)
    images = AutoImageProcessor.from_pretrained(trained, backend="pil")
    torch.testing.assert_close(model.encode_image(tiny.IMAGES), model.encode_image(tiny.IMAGES, images))
    tokens = torch.ones(1, 4, dtype=torch.long)
    for wrong in (
        lambda: model.encode_text(TEXTS),
        lambda: model.get_text_features(tokens),
        lambda: model.load_text_model(),
        lambda: model.load_text_model(caches.clip),
        lambda: model.set_text_model(tiny.text_model()),
        lambda: model.save_pretrained(trained / "with", save_text_model=True),
        lambda: LLM2CLIPTextModel.from_pretrained(trained),
        lambda: LLM2CLIPModel.from_pretrained(trained, text_model_kwargs={"dtype": "auto"}),
        lambda: load_encoder(str(trained), needs=["text"]),
        lambda: load_encoder(str(trained)).encode_text(TEXTS),
    ):
        with pytest.raises(ValueError, match=ALONE):
            wrong()


def test_the_card_and_the_config_say_what_the_model_takes(caches: Caches, trained: Path) -> None:
    card = (trained / "README.md").read_text()
    assert "an adapter that takes the embeddings of text (32) and clip (24) side by side" in card
    assert "encode_text" not in card
    assert "captions" not in card.split("## Use")[1].split("## ")[0]
    assert {"zero-shot-image-classification"}.isdisjoint(
        json.loads((trained / "config.json").read_text())["custom_pipelines"]
    )
    assert caches.clip in {base.name for base in bases_of(trained)}


def test_the_saved_model_is_whole_after_another_save(trained: Path, tmp_path: Path) -> None:
    model = LLM2CLIPModel.from_pretrained(trained)
    model.save_pretrained(tmp_path)
    again = LLM2CLIPModel.from_pretrained(tmp_path)
    for (name, left), right in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert left.equal(right), name
    assert again.config.to_dict() == model.config.to_dict()


def test_evaluation_reads_both_caches(caches: Caches, trained: Path, tmp_path: Path) -> None:
    captions, rows = stored_rows(caches)
    encoder = open_stored_encoder(str(trained), caches.folders)
    with torch.no_grad():
        embeds = F.normalize(encoder.model.get_text_features(llm_embeds=rows).pooler_output, dim=-1)
    torch.testing.assert_close(encoder.encode_text(captions), embeds)
    source = small_runs.concepts("validation", max_samples=40)
    data = ["--split", "validation[:40]", "--caption-columns", "caption"]
    arguments = ["evaluate", str(trained), "--benchmark", str(source["path"]), *data, "--num-workers", "0"]
    output = ["--output", str(tmp_path / "results")]
    assert cli.main([*arguments, *output, "--embedding-cache", *caches.folders]) == 0
    [result] = (tmp_path / "results").glob("*.json")
    measured = json.loads(result.read_text())
    assert "truncated_texts" not in measured["counts"]
    # What the training has logged of the same pictures.
    log = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    [logged] = [entry for entry in log if "eval_validation_text_to_image_recall@10" in entry][-1:]
    found = measured["scores"]["text_to_image_recall@10"]
    assert found == pytest.approx(logged["eval_validation_text_to_image_recall@10"])


def test_other_caches_are_refused(caches: Caches, trained: Path, inputs: Inputs, tmp_path: Path) -> None:
    new = {"vision_model_name_or_path": "", "projection_dim": None, "model_name_or_path": str(trained)}
    first, second = caches.folders
    other_count = r"reads the embeddings of 2 text encoder\(s\), but the embedding caches are"
    for changes, message in (
        ({"embedding_cache": [second, first], **new}, "the text encoder in use has fingerprint"),
        ({"embedding_cache": first, **new}, other_count),
        ({"embedding_cache": [first, second, first]}, "3 embedding caches are given"),
        ({"text_model_name_or_path": inputs.text}, "text_model_name_or_path .* takes llm_embeds alone"),
        ({"embedding_cache": None, "online_text_model": True, **new}, ALONE),
    ):
        with pytest.raises((StoreMismatchError, ValueError), match=message):
            run_stage2.run(build_config(Stage2Recipe, fields_of(caches, tmp_path / "run", **changes)))
    fields = small_runs.stage2_fields(tmp_path / "run", inputs.vision, inputs.text, "")
    with pytest.raises(ValueError, match="takes llm_embeds alone"):
        run_stage2.run(build_config(Stage2Recipe, {**fields, "embedding_cache": caches.folders}))


@pytest.mark.parametrize(("losses", "chunk"), [("both", None), ("each", 3), ("all", None), ("all", 3)])
@pytest.mark.parametrize("center", [False, True])
def test_the_losses_of_each_and_of_both(
    losses: str, chunk: int | None, center: bool, caches: Caches, tmp_path: Path
) -> None:
    _, stored = stored_rows(caches)
    inputs = {"pixel_values": torch.randn(8, 3, 28, 28), "llm_embeds": stored}
    args = Stage2Config(**settings(tmp_path, text_losses=losses, tower_chunk_size=chunk))
    cache = PairedCache.of_folders(caches.folders)
    text = LLM2CLIPTextConfig(encoders=cache.encoders, fingerprint=cache.manifest.fingerprint)
    fields: dict[str, Any] = {"projection_dim": 24, "center_text": center}
    whole = from_vision_text_pretrained(caches.clip, None, text_config=text, **fields)
    assert whole.config.text_model_fingerprint == cache.manifest.fingerprint
    mean = torch.rand(56) / 10 if center else torch.zeros(56)
    if center:
        whole.get_buffer("text_adapter.center").copy_(mean)
    trainer = Stage2Trainer(whole, args, train_dataset=[{}])
    model = trainer.model.train()
    loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    grads = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()

    first, second = stored.clone(), stored.clone()
    first[:, 32:], second[:, :32] = mean[32:], mean[:32]
    views = {"both": [stored], "each": [first, second], "all": [stored, first, second]}[losses]
    images = F.normalize(model.get_image_features(inputs["pixel_values"]).pooler_output, dim=-1)
    expected = []
    for view in views:
        texts = F.normalize(model.get_text_features(llm_embeds=view).pooler_output, dim=-1)
        expected.append(clip_loss(images, texts, model.logit_scale.exp()))
    torch.stack(expected).mean().backward()
    torch.testing.assert_close(loss, torch.stack(expected).mean(), atol=1e-5, rtol=1e-5)
    for name, value in model.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(grads[name], value.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_losses_of_two_caches_are_refused_with_one_text_encoder(saved_model: Path, tmp_path: Path) -> None:
    model = LLM2CLIPModel.from_pretrained(saved_model)
    with pytest.raises(ValueError, match="one text encoder"):
        Stage2Trainer(model, Stage2Config(**settings(tmp_path, text_losses="all")), train_dataset=[])


def test_a_model_without_a_text_tower_needs_its_encoders(inputs: Inputs) -> None:
    with pytest.raises(ValueError, match=r"give a text_model, or .* text_config=LLM2CLIPTextConfig\(encoders=...\)"):
        from_vision_text_pretrained(inputs.vision, None)
    with pytest.raises(ValueError, match="each has a name and a width"):
        LLM2CLIPTextConfig(encoders=[{"name": "an LLM"}])


@pytest.mark.slow
def test_a_built_folder_takes_rows_and_images_from_everyone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The build compares it with what a process without this package computes, from rows and from an image."""
    out = tmp_path / "out"
    assert cli.main(["build", str(trained), str(out)]) == 0
    encoders = json.loads((out / "config.json").read_text())["text_config"]["encoders"]
    assert encoders == [{"name": "text", "width": 32}, {"name": "clip", "width": 24}]
    assert not (out / "modules.json").exists()
    _check_folder(out)  # what a push asks for
    for option, value in (("bundle_text_model", "true"), ("text_model", "some/llm")):
        assert cli.main(["build", str(trained), str(out), "--overwrite", f"--{option}", value]) == 2
        assert f"{option} is {value}".lower() in (said := capsys.readouterr().err.lower())
        assert "takes llm_embeds alone" in said


@pytest.mark.slow
def test_two_processes_and_a_resumed_run_equal_one(caches: Caches, tmp_path: Path) -> None:
    fields = fields_of(caches, tmp_path / "one", text_losses="all")
    llm2clip("stage2", fields)
    batch = fields["per_device_train_batch_size"] // 2
    two = {"output_dir": str(tmp_path / "two"), "save_strategy": "no", "per_device_train_batch_size": batch}
    llm2clip("stage2", {**fields, **two}, 2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    # As a run that was killed after its first checkpoint.
    folder = broken_after(tmp_path / "one", tmp_path / "broken", 3)
    llm2clip("stage2", {**fields, "output_dir": str(folder)}, 1, "--resume")
    assert_equal(tmp_path / "one", folder)

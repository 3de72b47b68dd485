"""Alignment without training: the maps of a closed form, and texts that are mapped into the space of another model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoImageProcessor

from llm2clip import CaptionSource, EmbeddingCache, load_encoder
from llm2clip import main as llm2clip
from llm2clip.command_line.settings import build_config
from llm2clip.data.captions import distinct_captions
from llm2clip.encoders import OurEncoder
from llm2clip.encoders.images import TableImages
from llm2clip.files.manifests import FOLDER_MANIFEST
from llm2clip.models.new_model import from_vision_text_pretrained
from llm2clip.store import MissingCaptionError
from llm2clip.trainers import run_align, stored_rows
from llm2clip.trainers.align_recipe import AlignRecipe
from llm2clip.trainers.closed_form import closed_form_alignment
from llm2clip.trainers.joint_recipe import FEATURES
from llm2clip.trainers.kept_space import take_vision_side
from modeling_llm2clip import LLM2CLIPProcessor
from tests.builders import small_runs
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.encoders.models import save_transformers
from tests.llm2clip.trainers.stages import assert_equal_weights, interrupt, load, run

# What a training has, and an alignment has not.
TRAINING = (*small_runs.SMALL, "learning_rate", "per_device_train_batch_size")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP of transformers, with 24 values."""
    folder = tmp_path_factory.mktemp("clip")
    save_transformers("clip", folder)
    return str(folder)


def settings(folder: Path, vision: str, inputs: Inputs, **changes: Any) -> AlignRecipe:
    fields = small_runs.stage2_fields(folder, vision, inputs.text, inputs.cache)
    fields = {name: value for name, value in fields.items() if name not in (*TRAINING, "projection_dim")}
    return build_config(AlignRecipe, {**fields, **changes})


@pytest.mark.parametrize(("pooling", "layers"), [("cls", None), ("cls_mean", [1, 2])])
def test_a_closed_form_has_the_maps_of_its_training_pairs(
    pooling: str, layers: list[int] | None, inputs: Inputs, tmp_path: Path
) -> None:
    config = settings(tmp_path, inputs.vision, inputs, vision_pooling=pooling, vision_layers=layers)
    metrics = run_align.run(config)
    model = load(tmp_path)
    assert model.config.projection_dim == metrics["closed_form_width"]
    assert (model.config.visual_head, model.config.text_head) == ("linear", "linear")
    assert metrics["eval_validation_text_to_image_recall@10"] > 0
    untrained, processor = run_align.open_model(config)
    _, images = run_align._open(config, untrained, processor, {})
    cache = EmbeddingCache.open(inputs.cache)
    dataset = stored_rows.store_pairs(untrained, processor.image_processor, images, cache, tmp_path / FEATURES)
    samples, captions, weights = dataset.pairs()
    rows = dataset.features.read(dataset.image_rows[samples]).float()
    texts = dataset.cache.read(captions, torch.float32)
    ridge, width = metrics["closed_form_ridge"], int(metrics["closed_form_width"])
    expected = closed_form_alignment(rows, texts, ridge, width, weights=torch.from_numpy(weights))
    with torch.no_grad():
        own = F.normalize(model.get_image_features(vision_features=rows).pooler_output, dim=-1)
        said = F.normalize(model.get_text_features(llm_embeds=texts).pooler_output, dim=-1)
    similarity = expected.embed_images(rows) @ expected.embed_texts(texts).T
    torch.testing.assert_close((own @ said.T).double(), similarity, atol=1e-4, rtol=0)
    # Pairs belong together more than others do.
    assert similarity.diagonal().mean() > similarity.mean() + 0.1


def test_a_second_run_gives_the_same_model_and_computes_no_feature(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, inputs.vision, inputs, heads="residual", ridge=0.3, projection_dim=8)
    run_align.run(config)
    first = load(tmp_path)
    monkeypatch.setattr(TableImages, "decode", lambda *_: pytest.fail("an image is read"))
    run_align.run(config)
    assert_equal_weights(load(tmp_path), first)


def test_the_folder_of_another_model_or_of_other_settings_stays_as_it_is(inputs: Inputs, tmp_path: Path) -> None:
    model = tmp_path / "model"
    run_align.run(settings(model, inputs.vision, inputs, ridge=0.3, projection_dim=8, eval_sources={}))
    before = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    tower = small_runs.save_vision_tower(tmp_path / "other")
    for vision, ridge, message in (
        (inputs.vision, 1.0, "ridge: 0.3 -> 1.0"),
        (tower, 0.3, "vision_model_name_or_path"),
    ):
        with pytest.raises(ValueError, match=rf"was made with other settings \(.*{message}"):
            run_align.run(settings(model, vision, inputs, ridge=ridge, projection_dim=8, eval_sources={}))
    (model / "settings.json").unlink()
    with pytest.raises(FileExistsError, match="already contains a model"):
        run_align.run(settings(model, inputs.vision, inputs, ridge=0.3, projection_dim=8, eval_sources={}))
    assert {name: (model / name).read_bytes() for name in before if name != "settings.json"} == {
        name: content for name, content in before.items() if name != "settings.json"
    }


def test_what_was_killed_while_it_wrote_goes_on(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path / "run", inputs.vision, inputs, ridge=0.3, projection_dim=8, eval_sources={})
    run_align.run(config)
    expected = load(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(run_align, "make_readable_by_version_4", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_align.run(config)
    assert not (tmp_path / "run" / FOLDER_MANIFEST).exists(), "it would say that the folder is whole"
    run_align.run(config)
    assert (tmp_path / "run" / FOLDER_MANIFEST).exists()
    assert_equal_weights(load(tmp_path / "run"), expected)


def test_texts_are_mapped_into_a_kept_space_without_an_image(
    inputs: Inputs, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, clip, inputs, keep_space_of=clip, ridge=0.1, eval_sources={})
    teacher = load_encoder(clip)
    with monkeypatch.context() as patch:
        patch.setattr(TableImages, "decode", lambda *_: pytest.fail("an image is read"))
        run_align.run(config)
    model = load(tmp_path)
    texts = distinct_captions([CaptionSource.from_dict(small_runs.concepts())])
    llm_embeds = EmbeddingCache.open(inputs.cache).lookup(texts).float()
    with torch.no_grad():
        found = model.get_text_features(llm_embeds=llm_embeds).pooler_output.double()
    # The normal equations of a ridge regression on centred rows.
    y = F.normalize(llm_embeds, dim=-1).double()
    x = teacher.encode_text(texts).half().double()
    x = F.normalize(x.float(), dim=-1).double()
    centred = y - y.mean(dim=0)
    covariance = centred.T @ centred / len(y)
    penalty = 0.1 * covariance.diagonal().mean() * torch.eye(len(covariance)).double()
    weight = torch.linalg.inv(covariance + penalty) @ (centred.T @ (x - x.mean(dim=0)) / len(y))
    torch.testing.assert_close(found, centred @ weight + x.mean(dim=0), atol=1e-4, rtol=0)
    assert F.cosine_similarity(found, x).mean() > F.cosine_similarity(x.mean(dim=0)[None], x).mean()
    # Images are where that model has them.
    images = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))]
    own = OurEncoder(model, LLM2CLIPProcessor.from_pretrained(tmp_path))
    torch.testing.assert_close(own.encode_image(images), teacher.encode_image(images), atol=1e-5, rtol=0)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "arXiv 2510.18795" in card
    assert clip not in card, "the path of a folder here is private"


def test_a_part_that_keeps_a_space_is_the_start_of_a_training(inputs: Inputs, clip: str, tmp_path: Path) -> None:
    fields = {"vision_model_name_or_path": clip, "projection_dim": None, "max_steps": 2, "save_strategy": "no"}
    parts = [{"command": "align", "keep_space_of": clip}, {}]
    run("stage2", tmp_path, inputs, parts=parts, **fields)
    first, last = load(tmp_path / "part1"), load(tmp_path)
    head = load_encoder(clip).model.visual_projection.weight
    assert first.visual_projection.weight.equal(head)
    assert not last.visual_projection.weight.equal(head)
    assert F.cosine_similarity(last.visual_projection.weight, head, dim=0).min() > 0.9
    assert last.config.text_head == "linear"


def test_captions_without_stored_embedding_are_skipped_where_that_is_set(
    inputs: Inputs, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a tenth of them: a cache that lacks more is of other data."""
    sources = [small_runs.concepts(caption_columns=["caption", "caption_de"])]
    changes = {"keep_space_of": clip, "sources": sources, "verify_cache": False}
    with pytest.raises(MissingCaptionError, match="llm2clip embed"):
        run_align.run(settings(tmp_path, clip, inputs, **changes, on_error="skip"))
    monkeypatch.setattr(stored_rows, "SKIPPED_SHARE", 1)
    run_align.run(settings(tmp_path, clip, inputs, **changes, on_error="skip"))
    assert load(tmp_path).config.text_head == "linear"


@pytest.mark.parametrize("kind", ["llm2clip", "siglip"])
def test_the_heads_of_a_model_are_taken(kind: str, inputs: Inputs, tmp_path: Path) -> None:
    former = str(tmp_path / "former")
    if kind == "siglip":
        save_transformers("siglip", tmp_path / "former")
    else:
        parts = [{"command": "align", "heads": "residual"}, {"freeze_vision": "all"}]
        fields = {"vision_pooling": "cls_mean", "max_steps": 2, "save_strategy": "no", "eval_sources": {}}
        run("stage2", tmp_path / "former", inputs, parts=parts, **fields)
    encoder: Any = load_encoder(former)
    processor = AutoImageProcessor.from_pretrained(former)
    vision, width = (former, 32) if kind == "siglip" else (inputs.vision, 24)
    new = from_vision_text_pretrained(vision, inputs.text, projection_dim=width)
    take_vision_side(new, processor, encoder, former)
    assert isinstance(new.visual_projection, torch.nn.Identity) == (kind == "siglip")
    images = [Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8))]
    found = OurEncoder(new.eval(), processor).encode_image(images)
    torch.testing.assert_close(found, load_encoder(former).encode_image(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("source", ["clip", "text"])
def test_the_space_of_another_model_is_refused(source: str, inputs: Inputs, clip: str, tmp_path: Path) -> None:
    name = clip if source == "clip" else inputs.text
    message = r"embeds images otherwise than the vision tower .* vision_model_name_or_path"
    with pytest.raises(ValueError, match=message if source == "clip" else "a text tower, which does not embed images"):
        run_align.run(settings(tmp_path, inputs.vision, inputs, keep_space_of=name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ridge": -0.1}, "ridge must be at least 0"),
        ({"adapter_num_layers": 1}, "adapter_num_layers is 1, but heads: linear has no blocks"),
        ({"keep_space_of": "m", "projection_dim": 8}, "projection_dim is 8, but images are embedded as by m"),
        ({"embedding_cache": None}, "give embedding_cache"),
        ({"sources": [small_runs.concepts(streaming=True)]}, "no source can be a stream or have a weight"),
        ({"sources": []}, "sources"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str, inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run_align.run(settings(tmp_path, inputs.vision, inputs, **changes))


def test_the_command_reads_a_recipe(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--vision-model-name-or-path", inputs.vision, "--text-model-name-or-path", inputs.text]
    options += ["--embedding-cache", inputs.cache, "--output-dir", str(tmp_path / "out")]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"sources: [{{path: {small_runs.CONCEPTS}, caption_columns: [caption, keywords], max_samples: 96}}]"
    )
    assert llm2clip(["align", str(recipe), *options]) == 0
    assert "closed_form_width" in capsys.readouterr().out
    assert llm2clip(["verify", str(tmp_path / "out")]) == 0

"""What the demo shows is what the model says, and a second start reads what the first one computed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from llm2clip.data import DamagedImageError
from llm2clip.demo.gallery import Gallery
from modeling_llm2clip import LLM2CLIPModel
from tests.llm2clip.demo.conftest import NUM_IMAGES, source

LABELS = ["a bicycle", "a camera", "a monkey"]


def test_text_search_ranks_as_the_model_does(gallery: Gallery) -> None:
    images = gallery.first(NUM_IMAGES)
    with torch.no_grad():
        inputs = gallery.processor(text="a camera", images=images, return_tensors="pt")
        output = gallery.model(**inputs)
    cosines = (output.logits_per_text[0] / output.logit_scale).tolist()
    found = gallery.search("a camera", top=5)
    assert [hit.score for hit in found] == pytest.approx(sorted(cosines, reverse=True)[:5], abs=1e-5)
    best = images[cosines.index(max(cosines))]
    assert found[0].image.tobytes() == best.tobytes()
    assert found[0].name


def test_an_image_finds_itself_first(gallery: Gallery) -> None:
    query = gallery.first(8)[7]
    found = gallery.search(query, top=3)
    assert found[0].image.tobytes() == query.tobytes()
    assert found[0].score == pytest.approx(1, abs=1e-5)


def test_a_strip_is_refused_before_it_is_resized(gallery: Gallery) -> None:
    strip = Image.new("RGB", (1, 100_000))
    for ask in (
        gallery.search,
        lambda image: gallery.classify(image, LABELS),
        lambda image: gallery.heat_map(image, "a"),
    ):
        with pytest.raises(DamagedImageError, match="1 x 100000 pixels are too narrow"):
            ask(strip)


def test_probabilities_are_the_models(gallery: Gallery) -> None:
    image = gallery.first(1)[0]
    probabilities = gallery.classify(image, [*LABELS, " a camera ", ""], "this is {}, {}")
    with torch.no_grad():
        captions = [f"this is {label}, {label}" for label in LABELS]
        output = gallery.model(**gallery.processor(text=captions, images=image, return_tensors="pt"))
    assert list(probabilities) == LABELS
    assert list(probabilities.values()) == pytest.approx(output.logits_per_image[0].softmax(-1).tolist(), abs=1e-5)
    assert sum(probabilities.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("labels", "template", "message"), [(["one", "one "], "{}", "two different"), (LABELS, "a thing", "needs {}")]
)
def test_classification_without_a_choice_is_refused(
    gallery: Gallery, labels: list[str], template: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gallery.classify(gallery.first(1)[0], labels, template)


def test_heat_map_covers_what_the_tower_sees(gallery: Gallery) -> None:
    wide = Image.new("RGB", (200, 100), "white")
    wide.paste(gallery.first(1)[0].resize((100, 100)), (50, 0))
    seen, drawn, similarity = gallery.heat_map(wide, "a camera")
    assert similarity.shape == (4, 4)
    assert -1 <= similarity.min() < similarity.max() <= 1
    assert seen.size == drawn.size
    assert seen.tobytes() != drawn.tobytes()
    # The centre crop of the wide picture is the square picture.
    square = gallery.heat_map(wide.crop((50, 0, 150, 100)), "a camera")[2]
    torch.testing.assert_close(similarity, square, atol=0.02, rtol=0)


def test_heat_map_of_one_patch_follows_that_patch(gallery: Gallery) -> None:
    image = Image.new("RGB", (28, 28), "white")
    before = gallery.heat_map(image, "a camera")[2]
    image.paste((0, 0, 0), (21, 0, 28, 7))
    change = (gallery.heat_map(image, "a camera")[2] - before).abs()
    assert change.argmax() == 3


def test_a_second_start_reads_the_embeddings(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = Gallery.open(str(model_folder), source(9), tmp_path)
    assert len(first) == 9
    other_images = Gallery.open(str(model_folder), source(5), tmp_path)
    assert len(other_images) == 5
    assert len(list(tmp_path.iterdir())) == 2
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(LLM2CLIPModel, "get_image_features", None)
        second = Gallery.open(str(model_folder), source(9), tmp_path)
    assert "9 image embeddings are read from" in caplog.text
    assert torch.equal(first.embeds, second.embeds)
    assert second.rows == first.rows


def test_another_model_has_other_embeddings(gallery: Gallery, tmp_path: Path) -> None:
    first = Gallery(gallery.model, gallery.processor, source(4), tmp_path)
    weight = gallery.model.visual_projection.weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1
    second = Gallery(gallery.model, gallery.processor, source(4), tmp_path)
    with torch.no_grad():
        weight.copy_(original)
    assert not torch.equal(first.embeds, second.embeds)
    assert len(list(tmp_path.iterdir())) == 2

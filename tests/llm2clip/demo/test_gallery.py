"""The demo shows what the model computes, and embeds each image once."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llm2clip.data import DamagedImageError
from llm2clip.demo.gallery import Gallery, ShownImage
from llm2clip.demo.interface import _clear_examples, _head, build_interface, find_examples
from llm2clip.search.folder_items import FolderImages
from modeling_llm2clip import LLM2CLIPModel
from tests.builders import tiny
from tests.builders.students import add_query_encoder
from tests.llm2clip.demo.conftest import NUM_IMAGES, bundled_images, index_bundled
from tests.llm2clip.encoders import models

IMAGES = [bundled_images().decode(row) for row in range(NUM_IMAGES)]
PROCESSOR = tiny.processor()
LABELS = ["a bicycle", "a camera", "a monkey"]


def stored(gallery: Gallery) -> list[dict[str, Any]]:
    """The rows of a gallery's index with their embeddings."""
    batches = gallery.index.store.keys(["key", "caption", "vector"])
    return [row for batch in batches for row in batch.to_pylist()]


def test_text_search_ranks_images_by_the_models_cosine(gallery: Gallery) -> None:
    with torch.no_grad():
        output = gallery.encoder.model(**PROCESSOR(text="a camera", images=IMAGES, return_tensors="pt"))
    cosines = (output.logits_per_text[0] / output.logit_scale).tolist()
    found = gallery.search("a camera", top=5)
    assert [shown.score for shown in found] == pytest.approx(sorted(cosines, reverse=True)[:5], abs=1e-5)
    best = IMAGES[cosines.index(max(cosines))]
    assert found[0].image.tobytes() == best.tobytes()
    assert found[0].name


def test_the_query_encoder_of_a_model_is_asked_where_there_is_one(saved_model: Path, tmp_path: Path) -> None:
    shutil.copytree(saved_model, tmp_path / "model")
    student = add_query_encoder(tmp_path / "model")
    name, images, cache = str(tmp_path / "model"), bundled_images(9), tmp_path / "cache"
    fast, slow = (Gallery.open(name, images, cache, text_encoder=kind) for kind in ("auto", "llm"))
    embeds = slow.encoder.encode_image(IMAGES[:9])
    for gallery, encode in ((fast, student.encode), (slow, slow.encoder.encode_text)):
        best = (embeds @ encode("a bus")[0]).max().item()
        assert gallery.search("a bus", 1)[0].score == pytest.approx(best, abs=1e-5)
        build_interface([gallery], True, tmp_path / "examples")
    assert "A small text model" in _head(fast)


def test_class_probabilities_equal_the_softmax_of_the_models_logits(gallery: Gallery) -> None:
    image = IMAGES[0]
    probabilities = gallery.classify(image, [*LABELS, " a camera ", ""], "this is {}, {}")
    with torch.no_grad():
        captions = [f"this is {label}, {label}" for label in LABELS]
        output = gallery.encoder.model(**PROCESSOR(text=captions, images=image, return_tensors="pt"))
    assert list(probabilities) == LABELS
    assert list(probabilities.values()) == pytest.approx(output.logits_per_image[0].softmax(-1).tolist(), abs=1e-5)
    assert sum(probabilities.values()) == pytest.approx(1)


def test_heat_map_covers_the_centre_crop(gallery: Gallery) -> None:
    wide = Image.new("RGB", (200, 100), "white")
    wide.paste(IMAGES[0].resize((100, 100)), (50, 0))
    seen, drawn, similarity = gallery.heat_map(wide, "a camera")
    assert similarity.shape == (4, 4)
    assert -1 <= similarity.min() < similarity.max() <= 1
    assert seen.size == drawn.size
    assert seen.tobytes() != drawn.tobytes()
    # The centre crop of the wide picture is the square picture.
    square = gallery.heat_map(wide.crop((50, 0, 150, 100)), "a camera")[2]
    torch.testing.assert_close(similarity, square, atol=0.02, rtol=0)


def test_a_folder_of_images_is_searched_and_updated(gallery: Gallery, tmp_path: Path) -> None:
    folder, cache = tmp_path / "pictures", tmp_path / "cache"
    (folder / "sub").mkdir(parents=True)
    for number in range(3):
        IMAGES[number].save(folder / "sub" / f"{number}.png")
    (folder / "damaged.png").write_bytes(b"words")
    opened = Gallery.embed(gallery.encoder, FolderImages(folder), cache)
    assert len(opened) == 3
    assert opened.search(IMAGES[1], top=1)[0].name == "sub/1.png"
    (folder / "sub" / "1.png").unlink()
    assert "sub/1.png" not in [shown.name for shown in opened.search(IMAGES[1])]
    IMAGES[5].save(folder / "new.png")
    updated = Gallery.embed(gallery.encoder, FolderImages(folder), cache)
    assert updated.search(IMAGES[5], top=1)[0].name == "new.png"
    assert len(updated) == 3
    assert len(list(cache.iterdir())) == 1


def test_an_index_is_opened_with_its_model_and_embeds_nothing(
    saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_bundled(tmp_path / "index", saved_model)
    monkeypatch.setattr("llm2clip.search.search_index.update_index", None)
    opened = Gallery.of_index(index)
    assert (len(opened), opened.has_captions, opened.encoder.name) == (6, True, str(saved_model))
    found = opened.search(IMAGES[3], top=1)[0]
    assert (found.image.tobytes(), found.score) == (IMAGES[3].tobytes(), pytest.approx(1, abs=2e-3))
    torch.manual_seed(1)
    tiny.save(tmp_path / "other")
    with pytest.raises(ValueError, match=f"made by {saved_model}"):
        Gallery.of_index(index, str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"captions is of captions; the demo shows images\."):
        Gallery.of_index(index_bundled(tmp_path / "captions", saved_model, embed="caption", num_workers=None))


def test_examples_contain_no_addresses_of_people(
    gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = itertools.cycle(["a leaf, by jane.doe@mail.example", "a tree"])
    monkeypatch.setattr(gallery, "search", lambda *_: [ShownImage(IMAGES[0].copy(), next(names), 0.5)])
    monkeypatch.setattr(Image.Image, "tobytes", lambda image: id(image))  # so that no two are the same
    queries, pictures = find_examples(gallery, False, tmp_path)
    assert "a tree" in queries["Captions of these pictures"]
    assert "@" not in f"{queries} {pictures}"


def test_examples_of_heat_maps_are_those_that_show_something(
    gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste(IMAGES[0].resize((32, 32)), (32, 32))
    picture.save(tmp_path / "picture.png")
    there, elsewhere = torch.zeros(4, 4), torch.zeros(4, 4)
    there[2:, 2:], elsewhere[:2, :2] = 1, 1
    maps = {"there": there, "elsewhere": elsewhere, "nowhere": torch.zeros(4, 4), "nearly": there + elsewhere / 2}
    monkeypatch.setattr(gallery, "heat_map", lambda image, caption: (image, image, maps[caption]))
    examples = [(tmp_path / "picture.png", "", caption) for caption in maps]
    assert [caption for _, _, caption in _clear_examples(gallery, examples)] == ["there", "nearly"]
    assert [caption for _, _, caption in _clear_examples(gallery, examples[1:2])] == ["elsewhere"]
    assert _clear_examples(gallery, []) == []


def test_an_index_without_its_images_is_named(gallery: Gallery, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    IMAGES[0].save(tmp_path / "images" / "0.png")
    Gallery.embed(gallery.encoder, FolderImages(tmp_path / "images"), tmp_path)
    (place,) = map(str, tmp_path.glob("index-*"))
    (tmp_path / "images" / "0.png").unlink()
    opened = Gallery.of_index(place)
    assert opened.search("a camera") == []
    assert find_examples(opened, False, tmp_path / "examples").pictures == []
    build_interface([opened], False, tmp_path / "examples")
    (tmp_path / "images").rmdir()
    with pytest.raises(FileNotFoundError, match="images, which does not exist"):
        Gallery.of_index(place)


@pytest.mark.parametrize(("kind", "has_maps"), [("clip", True), ("siglip2", False), ("open_clip", False)])
def test_models_of_other_libraries_are_shown(kind: str, has_maps: bool, tmp_path: Path) -> None:
    if kind == "open_clip":
        name = "open_clip:{}/{}".format(*models.register_open_clip(tmp_path / "model"))
    else:
        models.save_transformers(kind, tmp_path / "model")
        name = str(tmp_path / "model")
    opened = Gallery.open(name, bundled_images(5), tmp_path / "cache")
    encoder = opened.encoder
    cosines = (encoder.encode_text("a camera") @ encoder.encode_image(IMAGES[:5]).T)[0]
    found = opened.search("a camera")
    assert [shown.score for shown in found] == pytest.approx(cosines.sort(descending=True).values.tolist(), abs=1e-5)
    probabilities = opened.classify(IMAGES[0], LABELS)
    scale = encoder.model.logit_scale.exp().item()
    logits = scale * encoder.encode_text(LABELS) @ encoder.encode_image(IMAGES[0])[0]
    assert list(probabilities.values()) == pytest.approx(logits.softmax(0).tolist(), abs=1e-5)
    assert opened.has_heat_maps == has_maps
    if has_maps:
        assert opened.heat_map(IMAGES[0], "a camera")[2].shape == (4, 4)


def test_a_second_start_embeds_nothing_and_another_model_or_preprocessing_all(
    saved_model: Path, gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Gallery.open(str(saved_model), bundled_images(5), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(LLM2CLIPModel, "get_image_features", None)
        assert stored(Gallery.open(str(saved_model), bundled_images(5), tmp_path)) == stored(first)
    rounded = Gallery.open(str(saved_model), bundled_images(5), tmp_path, dtype="bfloat16")
    assert stored(rounded) != stored(first)
    processor: Any = gallery.encoder.image_transform().image_processor
    weight = gallery.encoder.model.visual_projection.weight
    with monkeypatch.context() as patch:
        patch.setattr(processor, "image_mean", [0.1, 0.2, 0.3])
        assert stored(Gallery.embed(gallery.encoder, bundled_images(5), tmp_path)) != stored(first)
    with monkeypatch.context() as patch:
        patch.setattr(weight, "data", weight.detach() + 1)
        assert stored(Gallery.embed(gallery.encoder, bundled_images(5), tmp_path)) != stored(first)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["manifest.json", "*.lance"])
def test_a_damaged_cache_is_built_again(
    damage: str, saved_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = Gallery.open(str(saved_model), bundled_images(8), tmp_path)
    expected = [shown.score for shown in first.search("a camera", top=8)]
    (folder,) = tmp_path.glob("index-*")
    for path in folder.rglob(damage):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    again = Gallery.open(str(saved_model), bundled_images(8), tmp_path)
    assert [shown.score for shown in again.search("a camera", top=8)] == pytest.approx(expected)
    said = f"the index {folder} cannot be used and is built again: "
    assert (said if damage == "manifest.json" else "the table is made again: ") in caplog.text


def test_what_a_visitor_sends_is_limited(gallery: Gallery) -> None:
    for message, ask in {
        r"The texts have 20,001 characters together; send at most 20,000\.": lambda: gallery.search("a" * 20_001),
        "The texts have 20,002": lambda: gallery.heat_map(IMAGES[0], "a" * 20_002),
        "The texts have 20,160": lambda: gallery.classify(
            IMAGES[0], [f"{n:010}" for n in range(960)], "a photo of {}"
        ),
        "The texts have 4,000,000": lambda: gallery.classify(IMAGES[0], ["a" * 10**3, "b" * 10**3], "{}" * 2 * 10**3),
        r"These are 1,001 labels; give at most 1,000\.": lambda: gallery.classify(IMAGES[0], [*map(str, range(1001))]),
        "two different": lambda: gallery.classify(IMAGES[0], ["one", "one "]),
        "needs {}": lambda: gallery.classify(IMAGES[0], LABELS, "a thing"),
        "1 x 100000 pixels are too narrow": lambda: gallery.search(Image.new("RGB", (1, 100_000))),
    }.items():
        with pytest.raises((ValueError, DamagedImageError), match=message):
            ask()

"""A saved folder loads as a SentenceTransformer in a process without this package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig

from llm2clip.hub.sentence_transformers import write_sentence_transformers_files
from modeling_llm2clip import LLM2CLIPVisionModelWithProjection
from tests import stranger
from tests.builders import tiny
from tests.builders.tiny import CAPTIONS, IMAGES

STRANGER = """
import json
from pathlib import Path
from PIL import Image
from sentence_transformers import SentenceTransformer

folder, images, captions = sys.argv[1], sorted(Path(sys.argv[2]).iterdir()), json.loads(sys.argv[3])
images = [Image.open(path) for path in images]
model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
module = sys.modules[type(model[0].model).__module__].__name__
text, image = model.encode(captions), model.encode(images)
model.save_pretrained("again")
again = SentenceTransformer("again", trust_remote_code=True, device="cpu")
short = SentenceTransformer(folder, trust_remote_code=True, truncate_dim=8, device="cpu")
print(json.dumps({
    "module": module,
    "text": text.tolist(),
    "text_one_by_one": model.encode(captions, batch_size=1).tolist(),
    "image": image.tolist(),
    "image_one_by_one": model.encode(images, batch_size=1).tolist(),
    "similarity": model.similarity(text, image).tolist(),
    "prompted": model.encode(captions, prompt="a photo of ").tolist(),
    "query": model.encode_query(captions).tolist(),
    "truncated": short.encode(captions).tolist(),
    "again": again.encode(captions).tolist(),
    "again_image": again.encode(images).tolist(),
    "dimensions": [model.get_embedding_dimension(), short.get_embedding_dimension()],
    "max_seq_length": model.max_seq_length,
}))
"""
SEVERAL_PROCESSES = """
import json
from PIL import Image
from sentence_transformers import SentenceTransformer

if __name__ == "__main__":
    captions = json.loads(sys.argv[2])
    images = [Image.open(path) for path in sys.argv[3:]]
    model = SentenceTransformer(sys.argv[1], trust_remote_code=True, device="cpu")
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    rows = [model.encode(inputs, pool=pool, chunk_size=1).tolist() for inputs in (captions, images)]
    model.stop_multi_process_pool(pool)
    print(json.dumps(rows))
"""
CLOSE = {"atol": 1e-5, "rtol": 0}


def opened(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), trust_remote_code=True, device="cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index, image in enumerate(IMAGES):
        image.save(folder / f"{index}.png")
    return folder


def test_process_without_this_package_gets_the_embeddings_of_the_model(pictures: Path, tmp_path: Path) -> None:
    model, processor = tiny.save(tmp_path / "model", **tiny.FROZEN_TOWER), tiny.processor()
    write_sentence_transformers_files(tmp_path / "model")
    found = stranger.answer(STRANGER, tmp_path / "model", pictures, json.dumps(CAPTIONS), home=tmp_path)
    assert found["module"].startswith("transformers_modules.")
    text, image = model.encode_text(CAPTIONS, processor), model.encode_image(IMAGES, processor)
    expected = {
        **dict.fromkeys(("text", "text_one_by_one", "query", "again"), text),
        **dict.fromkeys(("image", "image_one_by_one", "again_image"), image),
        "similarity": text @ image.t(),
        "prompted": model.encode_text([f"a photo of {caption}" for caption in CAPTIONS], processor),
        "truncated": text[:, :8],
    }
    for name, rows in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), rows, **CLOSE, msg=lambda text, name=name: name + text)
    assert found["dimensions"] == [24, 8]
    assert found["max_seq_length"] == 64


def test_an_image_and_a_text_are_one_query(tmp_path: Path) -> None:
    model, processor = tiny.save(tmp_path), tiny.processor()
    write_sentence_transformers_files(tmp_path)
    pairs = list(zip(IMAGES, CAPTIONS, strict=False))
    images, captions = zip(*pairs, strict=True)
    summed = model.encode_text(list(captions), processor) + model.encode_image(list(images), processor)
    expected = torch.nn.functional.normalize(summed, dim=-1)
    loaded = opened(tmp_path)
    rows = loaded.encode([{"image": image, "text": caption} for image, caption in pairs], convert_to_tensor=True)
    torch.testing.assert_close(rows, expected, **CLOSE)
    loaded.save_pretrained(str(tmp_path / "again"))
    row = opened(tmp_path / "again").encode({"text": captions[1], "image": images[1]}, convert_to_tensor=True)
    torch.testing.assert_close(row, expected[1], **CLOSE)


def test_another_transformers_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(tmp_path)
    write_sentence_transformers_files(tmp_path)
    monkeypatch.setattr("transformers.__version__", "5.1.0")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.1.0")
    with pytest.raises(ImportError, match="transformers"):
        opened(tmp_path)


def test_folder_without_the_files_gives_the_same_embeddings_when_normalized(tmp_path: Path) -> None:
    """sentence-transformers reads the return annotations of `forward` and `get_*_features`."""
    model, processor = tiny.save(tmp_path), tiny.processor()
    loaded = opened(tmp_path)
    text = loaded.encode(CAPTIONS, convert_to_tensor=True, normalize_embeddings=True)
    image = loaded.encode(IMAGES, convert_to_tensor=True, normalize_embeddings=True)
    torch.testing.assert_close(text, model.encode_text(CAPTIONS, processor), **CLOSE)
    torch.testing.assert_close(image, model.encode_image(IMAGES, processor), **CLOSE)


def test_model_whose_llm_is_in_another_folder_is_loaded_and_saved(tmp_path: Path) -> None:
    model = tiny.save_apart(tmp_path)
    write_sentence_transformers_files(tmp_path / "clip")
    loaded = opened(tmp_path / "clip")
    rows = loaded.encode(CAPTIONS, convert_to_tensor=True)
    torch.testing.assert_close(rows, model.encode_text(CAPTIONS, tiny.processor()), **CLOSE)
    loaded.save_pretrained(str(tmp_path / "again"))
    assert AutoConfig.from_pretrained(tmp_path / "again").text_model_name_or_path == str(tmp_path / "llm")
    torch.testing.assert_close(opened(tmp_path / "again").encode(CAPTIONS, convert_to_tensor=True), rows, **CLOSE)


def test_text_tower_gives_embeddings_that_are_not_normalized(tmp_path: Path) -> None:
    tower, tokenizer = tiny.text_model(), tiny.processor().tokenizer
    tower.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write_sentence_transformers_files(tmp_path)
    loaded = opened(tmp_path)
    rows = loaded.encode(CAPTIONS, convert_to_tensor=True)
    torch.testing.assert_close(rows, tower.encode(CAPTIONS, tokenizer), **CLOSE)
    unit = torch.nn.functional.normalize(rows, dim=-1)
    torch.testing.assert_close(loaded.similarity(rows, rows), unit @ unit.t(), **CLOSE)


def test_images_that_are_not_square_reach_a_naflex_tower_with_their_grid(tmp_path: Path) -> None:
    model = tiny.joint_model(vision=tiny.other_vision_config("siglip2_vision_model"))
    model.save_pretrained(tmp_path)
    tiny.naflex_processor().save_pretrained(tmp_path)
    write_sentence_transformers_files(tmp_path)
    images = [IMAGES[0], IMAGES[1].resize((20, 60))]
    expected = model.encode_image(images, tiny.naflex_processor())
    torch.testing.assert_close(opened(tmp_path).encode(images, convert_to_tensor=True), expected, **CLOSE)


def test_folders_that_are_not_caption_encoders_are_refused(tmp_path: Path) -> None:
    LLM2CLIPVisionModelWithProjection(tiny.joint_config()).save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match="Give the folder of a model that embeds captions"):
        write_sentence_transformers_files(tmp_path / "vision")
    assert not list(tmp_path.rglob("modules.json"))


def test_the_path_of_a_picture_is_no_caption(tmp_path: Path) -> None:
    """Whatever endings of pictures sentence-transformers knows."""
    tiny.save(tmp_path / "model")
    write_sentence_transformers_files(tmp_path / "model")
    model = opened(tmp_path / "model")
    IMAGES[0].save(tmp_path / "x.png")
    torch.testing.assert_close(model.encode(str(tmp_path / "x.png")), model.encode(IMAGES[0]), **CLOSE)
    for ending in ("tif", "ppm", "jpx"):
        (tmp_path / f"x.{ending}").touch()
        with pytest.raises(ValueError, match=rf"x\.{ending}' is a picture, but would be embedded as a caption"):
            model.encode(str(tmp_path / f"x.{ending}"))
    model.encode("no file.tif")


@pytest.mark.slow  # three processes import sentence-transformers
def test_two_processes_give_the_embeddings_of_one(pictures: Path, tmp_path: Path) -> None:
    model, processor = tiny.save(tmp_path / "model"), tiny.processor()
    write_sentence_transformers_files(tmp_path / "model")
    paths = sorted(pictures.iterdir())
    arguments = (SEVERAL_PROCESSES, tmp_path / "model", json.dumps(CAPTIONS), *paths)
    text, image = stranger.answer(*arguments, home=tmp_path, is_forked=False)
    torch.testing.assert_close(torch.tensor(text), model.encode_text(CAPTIONS, processor), **CLOSE)
    torch.testing.assert_close(torch.tensor(image), model.encode_image(IMAGES, processor), **CLOSE)

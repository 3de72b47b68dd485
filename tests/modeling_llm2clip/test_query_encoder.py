"""The query encoder of a model: its vectors, the space that it belongs to, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from llm2clip.trainers.student import Student
from modeling_llm2clip import LLM2CLIPModel
from modeling_llm2clip.query_encoder_llm2clip import FOLDER, HEAD, SPACE_FILE, QueryEncoder, space_identity
from tests.builders import tiny
from tests.builders.students import add_query_encoder, save_student

TEXTS = ["a dog", "two children near a river in a green park", "a red bus", "Ein roter Bus!"]
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a model with its query encoder."""
    torch.manual_seed(0)
    tiny.save(tmp_path / "model")
    add_query_encoder(tmp_path / "model")
    return tmp_path / "model"


def test_vectors_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    student = save_student(tmp_path / "student")
    together = student.encode(TEXTS)
    assert together.shape == (4, 24)
    alone = torch.cat([student.encode(f" {text} ") for text in TEXTS])
    torch.testing.assert_close(alone, together, **CLOSE)
    torch.testing.assert_close(student.encode([*TEXTS] * 20, batch_size=7)[-4:], together, **CLOSE)
    torch.testing.assert_close(QueryEncoder.from_pretrained(tmp_path / "student").encode(TEXTS), together, **CLOSE)
    long = student.encode(["a dog in a park " * 90])
    torch.testing.assert_close(long, student.encode(["a dog in a park " * 80]), **CLOSE)  # both are cut
    assert student.encode([]).shape == (0, 24)
    with pytest.raises(ValueError, match="caption 1 is empty"):
        student.encode(["a", " "])


def test_a_model_answers_with_its_query_encoder_without_the_llm(model: Path) -> None:
    loaded = LLM2CLIPModel.from_pretrained(model, text_model=False)
    expected = QueryEncoder.from_pretrained(model / FOLDER).encode(TEXTS)
    torch.testing.assert_close(loaded.encode_text(TEXTS, encoder="query"), expected, **CLOSE)
    # It is no part of the model: neither counted nor saved with it.
    assert not any("query" in name for name in loaded.state_dict())
    with pytest.raises(ValueError, match="the query encoder takes no instruction"):
        loaded.encode_text(TEXTS, instruction="find", encoder="query")


def test_the_space_is_that_of_projection_and_adapter(model: Path) -> None:
    loaded = LLM2CLIPModel.from_pretrained(model)
    own = space_identity(loaded)
    assert space_identity(loaded.bfloat16()) == own
    loaded.vision_model.blocks[0].norm1.weight.data.mul_(2)
    loaded.text_model.decoder.norm.weight.data.mul_(2)
    assert space_identity(loaded) == own
    for part in (loaded.visual_projection, loaded.text_adapter):
        weight = next(part.parameters())
        before = weight.detach().clone()
        weight.data.mul_(2)
        assert space_identity(loaded) != own
        weight.data.copy_(before)
    assert space_identity(loaded) == own


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("none", "has no query_encoder/"),
        ("another", "of another model"),
        ("unknown", "of another model"),
        ("no modules", "its modules are Transformer, Pooling"),
    ],
)
def test_what_does_not_belong_to_the_model_is_refused(fault: str, message: str, model: Path) -> None:
    modules = model / FOLDER / "modules.json"
    if fault == "none":
        shutil.rmtree(model / FOLDER)
    elif fault in ("another", "unknown"):
        save_student(model / FOLDER, "2-0" if fault == "another" else None)
    else:
        (model / FOLDER / SPACE_FILE).unlink()  # which has the digest of the next file
        modules.write_text(json.dumps(json.loads(modules.read_text())[:2]))
    loaded = LLM2CLIPModel.from_pretrained(model, text_model=False)
    with pytest.raises(ValueError, match=message):
        loaded.encode_text(TEXTS, encoder="query")


@pytest.mark.parametrize("is_static", [False, True])
def test_every_damaged_or_missing_file_that_changes_vectors_is_named(is_static: bool, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    student = save_student(folder)
    if is_static:
        table = torch.nn.Embedding.from_pretrained(student.backbone.embeddings.word_embeddings.weight.data)
        Student(table, student.tokenizer, 24).save_pretrained(folder := tmp_path / "static")
    read = {HEAD, SPACE_FILE, "config.json", "model.safetensors", "modules.json"}
    read |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    for name in read:
        path = folder / name
        content = path.read_bytes()
        middle = len(content) // 2
        for damaged in (None, content[:middle], content[:-1] + bytes([content[-1] ^ 64])):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            if (name, damaged) != (SPACE_FILE, None):  # without it, the encoder is of no model
                with pytest.raises(ValueError, match=re.escape(name)):
                    QueryEncoder.from_pretrained(folder)
            path.write_bytes(content)
    assert QueryEncoder.from_pretrained(folder).encode(TEXTS).shape == (4, 24)

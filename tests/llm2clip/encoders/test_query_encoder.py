"""The query encoder of a model: its vectors, the space that it belongs to, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llm2clip.encoders.load import load_encoder
from llm2clip.encoders.query_encoder import HEAD, SPACE_FILE, QueryEncoder, query_encoder_of
from llm2clip.files.manifests import QUERY_ENCODER
from llm2clip.models.identity import space_identity
from modeling_llm2clip import LLM2CLIPModel
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
    loaded = load_encoder(str(model), text_encoder="query")
    expected = QueryEncoder.from_pretrained(model / QUERY_ENCODER).encode(TEXTS)
    torch.testing.assert_close(loaded.encode_text(TEXTS), expected, **CLOSE)
    assert loaded.model.text_model is None


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
    modules = model / QUERY_ENCODER / "modules.json"
    if fault == "none":
        shutil.rmtree(model / QUERY_ENCODER)
    elif fault in ("another", "unknown"):
        save_student(model / QUERY_ENCODER, "2-0" if fault == "another" else None)
    else:
        modules.write_text(json.dumps(json.loads(modules.read_text())[:2]))
    loaded = LLM2CLIPModel.from_pretrained(model, text_model=False)
    with pytest.raises(ValueError, match=message):
        query_encoder_of(loaded)


def test_a_missing_head_is_named(tmp_path: Path) -> None:
    save_student(tmp_path)
    (tmp_path / HEAD).unlink()
    with pytest.raises(ValueError, match=HEAD):
        QueryEncoder.from_pretrained(tmp_path)


def test_what_was_recorded_before_is_read(tmp_path: Path) -> None:
    """Earlier folders also have checksums, which a built model has in its list of files."""
    save_student(tmp_path)
    (tmp_path / SPACE_FILE).write_text(json.dumps({"space": "3-0", "files": {HEAD: "0"}}))
    assert QueryEncoder.from_pretrained(tmp_path).space == "3-0"

"""Embeddings that are cut to their first values or rounded to fewer bits, of models of any library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers.util import quantization
from torch.nn.functional import normalize

import llm2clip
from llm2clip.encoders import load_encoder
from llm2clip.evaluation.session import Session
from llm2clip.models.embeddings import NonFiniteError
from tests.builders import tiny
from tests.llm2clip.encoders.models import save_transformers

TEXTS = ["a red bus", "", "two dogs on a beach"]


@pytest.fixture(scope="module", params=["llm2clip", "clip"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    if request.param == "llm2clip":
        tiny.save(folder)
    else:
        save_transformers("clip", folder)
    return folder


def test_truncated_rows_are_the_first_values_of_the_whole(folder: Path) -> None:
    whole, short = load_encoder(str(folder)), load_encoder(str(folder), truncate_dim=5)
    assert short.width == 5 < whole.width
    for name in ("text", "image"):
        inputs = TEXTS if name == "text" else tiny.IMAGES
        rows, found = (getattr(encoder, f"encode_{name}")(inputs) for encoder in (whole, short))
        torch.testing.assert_close(found, normalize(rows[:, :5], dim=-1))
    assert short.fingerprint() != whole.fingerprint()
    assert short.truncate(None).fingerprint() == whole.fingerprint()
    with pytest.raises(ValueError, match=rf"truncate_dim is {whole.width + 1}, but .* embeds as {whole.width} values"):
        short.truncate(whole.width + 1)


@pytest.mark.parametrize("precision", ["float16", "int8", "binary"])
def test_rounded_rows_compare_as_the_codes_do(precision: Any, folder: Path) -> None:
    whole, coarse = load_encoder(str(folder)), load_encoder(str(folder)).truncate(7, precision)
    rows = [torch.cat([one.encode_text(TEXTS), one.encode_image(tiny.IMAGES)]) for one in (whole, coarse)]
    short = normalize(rows[0][:, :7], dim=-1)
    codes = llm2clip.quantize_embeddings(short, precision).numpy()
    if precision == "binary":
        assert (codes == quantization.quantize_embeddings(short, "binary")).all()
        assert codes.shape == (len(short), 1)
        bits = np.unpackbits(codes.view(np.uint8) + np.uint8(128), axis=1)
        wanted = 1 - 2 * (bits[:, None] != bits[None]).sum(axis=2) / 7
    else:
        assert codes.dtype == precision
        if precision == "int8":
            assert (np.abs(codes).max(axis=1) == 127).all()
        values = codes.astype(np.float64)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        wanted = values @ values.T
    np.testing.assert_allclose(rows[1] @ rows[1].T, wanted, atol=1e-3 if precision == "float16" else 1e-6)
    assert not torch.equal(rows[1], short)
    assert coarse.fingerprint() != whole.truncate(7).fingerprint()
    assert coarse.cut == {"truncate_dim": 7, "precision": precision}


def test_values_that_are_not_finite_are_not_rounded_away(folder: Path) -> None:
    encoder = load_encoder(str(folder))
    for module in encoder.model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.constant_(module.weight, torch.nan)
    for precision in ("int8", "binary"):
        encoder.truncate(None, precision)
        with pytest.raises(NonFiniteError):
            encoder.encode_image(tiny.IMAGES)
        with pytest.raises(NonFiniteError, match="of 3 of 3 texts are NaN or infinite: a red bus"):
            encoder.encode_text(TEXTS)
    with pytest.raises(ValueError, match="1 of 1 rows are NaN or infinite"):
        llm2clip.quantize_embeddings(torch.tensor([[1.0, torch.nan]]), "binary")
    with pytest.raises(ValueError, match=r"'int4', but it has to be one of"):
        llm2clip.quantize_embeddings(torch.ones(1, 2), "int4")  # type: ignore[arg-type]


def test_a_model_truncates_its_own_rows() -> None:
    model, processor = tiny.joint_model(), tiny.processor()
    for encode, inputs in ((model.encode_text, TEXTS[:1]), (model.encode_image, tiny.IMAGES)):
        short = normalize(encode(inputs, processor)[:, :3], dim=-1)
        torch.testing.assert_close(encode(inputs, processor, truncate_dim=3), short)
        with pytest.raises(ValueError, match="truncate_dim is 0"):
            encode(inputs, processor, truncate_dim=0)


def test_stored_rows_of_two_widths_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    for dim in (None, 5, None):
        encoder = load_encoder(str(folder), truncate_dim=dim)
        torch.testing.assert_close(Session(encoder, tmp_path).embed_texts(TEXTS), encoder.encode_text(TEXTS))

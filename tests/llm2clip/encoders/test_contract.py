"""Whatever `load_encoder` opens, the commands take: embedders of 2025 and 2026, tiny and with random weights.

Models whose repositories run their own code, such as jina-v5-omni, are not opened and have no row.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from llm2clip import cli
from llm2clip.encoders.load import load_encoder
from llm2clip.serving.app import create_app

from . import families, multimodal
from .models import IMAGES, register_open_clip, save, save_transformers


def embedder(build: Any, folder: Path) -> str:
    multimodal.save_embedder(build, folder / "plain", folder / "model")
    return str(folder / "model")


def clip_like(build: Any, folder: Path) -> str:
    save(build, folder)
    return str(folder)


def siglip2(folder: Path) -> str:
    save_transformers("siglip2", folder)
    return str(folder)


def perception_encoder(folder: Path) -> str:
    """PE, which transformers has no class for: open_clip builds it of timm's tower."""
    tower = {"timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map", "timm_proj": None}
    name, weights = register_open_clip(folder, "tiny-pe", image_size=384, **tower)
    return f"open_clip:{name}/{weights}"


# How each is saved, and the width of its rows.
MODELS: dict[str, tuple[Callable[[Path], str], int]] = {
    "Qwen3-VL-Embedding": (partial(embedder, multimodal.qwen3_vl), 32),
    "GME": (partial(embedder, multimodal.qwen2_vl), 32),
    "EmbeddingGemma 2": (partial(embedder, multimodal.embedding_gemma2), 48),
    "SigLIP 2": (siglip2, 32),
    "MetaCLIP 2": (partial(clip_like, families.metaclip_2), 24),
    "TIPSv2": (partial(clip_like, families.tipsv2), 32),
    "PE": (perception_encoder, 24),
}


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return MODELS[name][0](tmp_path_factory.mktemp("model"))


def test_texts_and_images_are_unit_rows_of_one_space_in_any_batch(name: str, model: str) -> None:
    encoder, texts = load_encoder(model, device="cpu"), ["a red bus", "two children play football in a park"]
    rows = {size: (encoder.encode_text(texts, size), encoder.encode_image(IMAGES, size)) for size in (1, 3)}
    for single, batched in zip(rows[1], rows[3], strict=True):
        torch.testing.assert_close(single, batched, atol=1e-5, rtol=0)
        torch.testing.assert_close(single.norm(dim=-1), torch.ones(len(single)))
        assert single.shape == (len(single), encoder.width)
        assert not torch.allclose(single[0], single[1], atol=1e-4), "the model does not see its input"
    assert encoder.width == MODELS[name][1]


def test_it_is_evaluated_and_served(model: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for number, image in enumerate(IMAGES):
        image.convert("RGB").save(data / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "caption": f"picture {number}"}))
    (data / "metadata.jsonl").write_text("\n".join(rows))
    arguments = ["--split", "train", "--caption-columns", "caption", "--output", str(tmp_path / "results")]
    assert cli.main(["evaluate", model, "--benchmark", str(data), *arguments]) == 0
    (written,) = (tmp_path / "results").glob("*.json")
    assert "text_to_image_recall@1" in written.read_text()
    encoder = load_encoder(model, device="cpu")
    with TestClient(create_app(encoder)) as client:
        picture = base64.b64encode((data / "0.png").read_bytes()).decode()
        answer = client.post("/v1/embeddings", json={"input": ["a red bus", {"image": picture}]}).json()
    served = torch.tensor([entry["embedding"] for entry in answer["data"]])
    expected = torch.cat([encoder.encode_text(["a red bus"]), encoder.encode_image([str(data / "0.png")])])
    torch.testing.assert_close(served, expected, atol=1e-5, rtol=0)


def test_the_commands_index_and_search_with_it(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    photos.mkdir()
    for number, image in enumerate(IMAGES):
        image.convert("RGB").save(photos / f"{number}.png")
    assert cli.main(["index", str(photos), "--model", model, "--output-dir", str(index)]) == 0
    capsys.readouterr()
    assert cli.main(["search", str(index), "a red bus"]) == 0
    printed = capsys.readouterr().out
    assert [f"{number}.png" in printed for number in range(3)] == [True] * 3

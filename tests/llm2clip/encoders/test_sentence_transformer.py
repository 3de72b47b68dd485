"""Multimodal models of sentence-transformers embed as they do in their own library."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fastapi.testclient import TestClient
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

from llm2clip import cli
from llm2clip.data import decode_image
from llm2clip.encoders.load import load_encoder
from llm2clip.serving.app import create_app

from .models import IMAGES, TEXTS, save, tokenizer

MARKS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|>"
    "<|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
)


def qwen3_vl() -> tuple[Any, Any]:
    words = tokenizer(True, model_max_length=400)
    words.add_special_tokens({"additional_special_tokens": MARKS})
    start, end, image, video = words.convert_tokens_to_ids(MARKS)
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(words),
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8, "out_hidden_size": 32,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    marks = {
        "image_token_id": image, "video_token_id": video, "vision_start_token_id": start, "vision_end_token_id": end,
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **marks)
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    pixels = transformers.Qwen2VLImageProcessorPil(patch_size=8, size=size)
    videos = transformers.Qwen3VLVideoProcessor(patch_size=8)
    return transformers.Qwen3VLModel(config), transformers.Qwen3VLProcessor(
        pixels, words, videos, chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain, folder = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("model")
    save(qwen3_vl, plain)
    modules = [Transformer(str(plain)), Pooling(32, pooling_mode="lasttoken"), Normalize()]
    prompts = {"query": "Find the picture.", "document": "Represent the picture."}
    SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save_pretrained(str(folder))
    return folder


def test_texts_are_queries_and_images_are_documents(folder: Path) -> None:
    encoder, model = load_encoder(str(folder), device="cpu"), SentenceTransformer(str(folder), device="cpu")
    texts = [text for text in TEXTS if text]
    expected = torch.from_numpy(model.encode_query(texts))
    torch.testing.assert_close(encoder.encode_text(texts), expected, atol=1e-5, rtol=0)
    images = [decode_image(image) for image in IMAGES]
    expected = torch.from_numpy(model.encode_document(images))
    torch.testing.assert_close(encoder.encode_image(IMAGES, batch_size=3), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, torch.from_numpy(model.encode(images)), atol=1e-3)
    assert encoder.width == 32
    assert encoder.library.startswith("sentence-transformers ")


def test_worker_processes_prepare_images_and_dimensions_are_cut(folder: Path) -> None:
    encoder = load_encoder(str(folder), device="cpu")
    rows = encoder.encode_image(IMAGES)
    torch.testing.assert_close(encoder.encode_image(IMAGES, 2, num_workers=1), rows, atol=1e-5, rtol=0)
    cut = load_encoder(str(folder), device="cpu", truncate_dim=8)
    first = torch.nn.functional.normalize(rows[:, :8], dim=-1)
    torch.testing.assert_close(cut.encode_image(IMAGES), first, atol=1e-5, rtol=0)


def test_the_prompts_are_part_of_the_fingerprint(folder: Path) -> None:
    encoder = load_encoder(str(folder), device="cpu")
    assert encoder.fingerprint() == load_encoder(str(folder), device="cpu").fingerprint()
    other = load_encoder(str(folder), device="cpu")
    other.model.prompts = {**other.model.prompts, "query": "Find the photo."}
    assert encoder.fingerprint() != other.fingerprint()
    lengths, cut = encoder.text_lengths(["a", "ab" * 300])
    assert (lengths > 1).tolist() == [True, True]
    assert cut.tolist() == [False, True]


def test_it_is_evaluated_and_served(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for number, image in enumerate(IMAGES):
        image.convert("RGB").save(data / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "caption": f"picture {number}"}))
    (data / "metadata.jsonl").write_text("\n".join(rows))
    arguments = ["--split", "train", "--caption-columns", "caption", "--output", str(tmp_path / "results")]
    assert cli.main(["evaluate", str(folder), "--benchmark", str(data), *arguments]) == 0
    (written,) = (tmp_path / "results").glob("*.json")
    assert "text_to_image_recall@1" in written.read_text()
    encoder = load_encoder(str(folder), device="cpu")
    with TestClient(create_app(encoder)) as client:
        picture = base64.b64encode((data / "0.png").read_bytes()).decode()
        answer = client.post("/v1/embeddings", json={"input": ["a red bus", {"image": picture}]}).json()
    served = torch.tensor([entry["embedding"] for entry in answer["data"]])
    expected = torch.cat([encoder.encode_text(["a red bus"]), encoder.encode_image([str(data / "0.png")])])
    torch.testing.assert_close(served, expected, atol=1e-5, rtol=0)


def test_the_commands_index_and_search_with_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    photos.mkdir()
    for number, image in enumerate(IMAGES):
        image.convert("RGB").save(photos / f"{number}.png")
    assert cli.main(["index", str(photos), "--model", str(folder), "--output-dir", str(index)]) == 0
    capsys.readouterr()
    assert cli.main(["search", str(index), "a red bus"]) == 0
    printed = capsys.readouterr().out
    assert [f"{number}.png" in printed for number in range(3)] == [True] * 3

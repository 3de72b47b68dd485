from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessorPil

from llm2clip.data import (
    CaptionImageDataset,
    CaptionSource,
    EvalTransform,
    SkipLog,
    SkippedSample,
    Stage2Collator,
    caption_id,
    distinct_captions,
)
from llm2clip.embedding import EmbeddingCache, MissingCaptionError
from tests.llm2clip.embedding.encoder import WIDTH, build, embed

from .conftest import CONCEPTS, SIZE


def _sample(caption: str, *others: str, key: str = "k") -> dict[str, Any]:
    ids = [caption_id(text) for text in (caption, *others)]
    pixels = torch.full((3, 2, 2), float(len(caption)))
    return {"key": key, "pixel_values": pixels, "caption": caption, "caption_id": ids[0], "image_caption_ids": ids}


@pytest.fixture
def cache(tmp_path: Path) -> EmbeddingCache:
    build(tmp_path, ["a", "bb", "ccc"])
    return EmbeddingCache.open(tmp_path)


def test_batch_from_the_cache(cache: EmbeddingCache) -> None:
    batch = Stage2Collator(cache)([_sample("bb", "a"), _sample("a"), _sample("bb")])
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [2, 1, 2]
    assert batch["caption_ids"].tolist() == [caption_id("bb"), caption_id("a"), caption_id("bb")]
    assert batch["image_caption_ids"].tolist() == [
        [caption_id("bb"), caption_id("a")], [caption_id("a"), -1], [caption_id("bb"), -1]
    ]  # fmt: skip
    torch.testing.assert_close(batch["llm_embeds"].float(), embed(["bb", "a", "bb"]), atol=2e-3, rtol=2e-3)
    assert batch["llm_embeds"].dtype == torch.float16
    assert batch["skipped"] == []


def test_skipped_samples_are_taken_out_and_listed(cache: EmbeddingCache) -> None:
    batch = Stage2Collator(cache)([_sample("a"), SkippedSample("k1", "torn"), _sample("ccc")])
    assert batch["pixel_values"].shape[0] == len(batch["caption_ids"]) == len(batch["llm_embeds"]) == 2
    assert batch["skipped"] == [("k1", "torn")]
    with pytest.raises(ValueError, match=r"All 2 samples of a batch were skipped.*k1: torn; k2: empty"):
        Stage2Collator(cache)([SkippedSample("k1", "torn"), SkippedSample("k2", "empty")])


def test_caption_without_embedding_is_an_error(cache: EmbeddingCache) -> None:
    with pytest.raises(MissingCaptionError, match="lacks 1 of 2 captions, the first being 'zz'"):
        Stage2Collator(cache)([_sample("a"), _sample("zz")])


def test_online_encoder_gets_token_ids() -> None:
    calls = []

    def processor(**arguments: Any) -> dict[str, torch.Tensor]:
        calls.append(arguments)
        return {"input_ids": torch.zeros(2, 3), "attention_mask": torch.ones(2, 3)}

    batch = Stage2Collator(processor=processor)([_sample("a"), _sample("bb")])
    assert calls == [{"text": ["a", "bb"], "padding": True, "truncation": True, "return_tensors": "pt"}]
    assert set(batch) == {"pixel_values", "caption_ids", "image_caption_ids", "input_ids", "attention_mask", "skipped"}


def test_exactly_one_text_side_is_needed(cache: EmbeddingCache) -> None:
    for arguments in ({}, {"cache": cache, "processor": print}):
        with pytest.raises(ValueError, match="either an embedding cache or a processor"):
            Stage2Collator(**arguments)


def test_bundled_images_make_a_batch(tmp_path: Path, image_processor: CLIPImageProcessorPil) -> None:
    source = CaptionSource(CONCEPTS, split="test", caption_columns=["caption", "keywords"], max_samples=8)
    build(tmp_path, distinct_captions(source))
    dataset = CaptionImageDataset(source, EvalTransform(image_processor))
    batch = Stage2Collator(EmbeddingCache.open(tmp_path))([dataset[index] for index in range(8)])
    assert batch["pixel_values"].shape == (8, 3, SIZE, SIZE)
    assert batch["llm_embeds"].shape == (8, WIDTH)
    owns = (batch["caption_ids"][:, None, None] == batch["image_caption_ids"][None]).any(-1)
    captions = [dataset[index]["caption"] for index in range(8)]
    assert owns.tolist() == [[left == right for right in captions] for left in captions]
    assert owns.sum() > 8  # several drawings of the same thing


def test_skip_log_lists_each_key_once(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "skipped.jsonl"
    log = SkipLog(path)
    assert log.count == 0
    assert not path.exists()
    assert log.add([("a", "torn"), ("ü", "leer"), ("a", "again")]) == 2
    assert log.add([("a", "torn")]) == 0
    with path.open("a") as file:
        file.write('{"key": "half')  # killed while writing
    resumed = SkipLog(path)
    assert resumed.count == 2
    assert resumed.add([("b", "x"), ("a", "torn")]) == 1
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"key": "a", "reason": "torn"}, {"key": "ü", "reason": "leer"}, {"key": "b", "reason": "x"}]

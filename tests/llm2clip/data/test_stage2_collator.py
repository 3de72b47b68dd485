from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil

from llm2clip.checks.check_data import CheckDataConfig
from llm2clip.data import (
    DamagedImageError,
    EvalTransform,
    Stage2Collator,
    caption_id,
)
from llm2clip.encoders.images import ImageList
from llm2clip.encoders.loop import PreparedImages
from llm2clip.models.prompting import with_prompt
from llm2clip.store import EmbeddingCache, MissingCaptionError
from modeling_llm2clip import LLM2CLIPProcessor
from tests.builders.tiny import plain_tokenizer, processor
from tests.llm2clip.store.encoder import build, embed

from .conftest import png


def _sample(caption: str, *others: str, key: str = "k") -> dict[str, Any]:
    ids = [caption_id(text) for text in (caption, *others)]
    pixels = torch.full((3, 2, 2), float(len(caption)))
    return {"key": key, "pixel_values": pixels, "caption": caption, "caption_id": ids[0], "image_caption_ids": ids}


@pytest.fixture
def cache(tmp_path: Path) -> EmbeddingCache:
    build(tmp_path, ["a", "bb", "ccc"])
    return EmbeddingCache.open(tmp_path)


def test_batch_with_embeddings_from_the_cache(cache: EmbeddingCache) -> None:
    batch = Stage2Collator(cache)([_sample("bb", "a"), _sample("a"), _sample("bb")])
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [2, 1, 2]
    assert batch["caption_ids"].tolist() == [caption_id("bb"), caption_id("a"), caption_id("bb")]
    assert batch["image_caption_ids"].tolist() == [
        [caption_id("bb"), caption_id("a")], [caption_id("a"), -1], [caption_id("bb"), -1]
    ]  # fmt: skip
    torch.testing.assert_close(batch["llm_embeds"].float(), embed(["bb", "a", "bb"]), atol=2e-3, rtol=2e-3)
    assert batch["llm_embeds"].dtype == torch.float16
    assert batch["skipped"] == []


def test_a_batch_of_which_nothing_is_left_is_an_error(cache: EmbeddingCache) -> None:
    rows = [{**_sample("a", key="k1"), "caption": " "}, _sample("zz", key="k2")]
    with pytest.raises(ValueError, match=r"none of the 2 rows of a batch can be used \(k1: it has no text.*; k2: its"):
        Stage2Collator(cache, on_error="skip")(rows)


def test_rows_may_name_the_caches_of_their_captions(cache: EmbeddingCache, tmp_path: Path) -> None:
    """Each of them is asked once a batch, whose rows stay in order."""
    build(tmp_path / "other", ["a", "dddd"])
    other = EmbeddingCache.open(tmp_path / "other")
    texts = ["a", "dddd", "ccc", "a", "bb"]
    rows = [_sample(text) | ({"embedding_cache": other} if number % 2 else {}) for number, text in enumerate(texts)]
    with patch.object(EmbeddingCache, "rows", autospec=True, side_effect=EmbeddingCache.rows) as asked:
        batch = Stage2Collator(cache)(rows)
    assert [call.args[1] for call in asked.call_args_list] == [["a", "ccc", "bb"], ["dddd", "a"]]
    torch.testing.assert_close(batch["llm_embeds"].float(), embed(texts), atol=2e-3, rtol=2e-3)
    rows[2]["embedding_cache"] = other
    batch = Stage2Collator(cache, on_error="skip")(rows)
    torch.testing.assert_close(batch["llm_embeds"].float(), embed(["a", "dddd", "a", "bb"]), atol=2e-3, rtol=2e-3)
    assert batch["skipped"] == [("k", "its caption has no stored embedding")]


def test_captions_have_ids_by_their_texts_unless_rows_have_their_own(cache: EmbeddingCache) -> None:
    row = {"pixel_values": torch.zeros(3, 2, 2), "caption": ["a", "bb"]}
    batch = Stage2Collator(cache).for_evaluation()([row, {**row, "caption": "bb"}])
    assert batch["caption_ids"].tolist() == [caption_id("a"), caption_id("bb")]
    assert batch["image_caption_ids"].tolist() == [[caption_id("a"), caption_id("bb")], [caption_id("bb"), -1]]
    batch = Stage2Collator(cache)([{**row, "caption_id": 7}])
    assert (batch["caption_ids"].tolist(), batch["image_caption_ids"].tolist()) == ([7], [[7]])


@pytest.mark.parametrize(
    "open_with",
    [
        lambda choice: Stage2Collator(on_error=choice),
        lambda choice: PreparedImages(ImageList([]), lambda image, key: {}, on_error=choice),
        lambda choice: CheckDataConfig("data", on_error=choice),
    ],
    ids=["collator", "encoder", "settings"],
)
def test_what_is_done_with_errors_has_the_same_choices_everywhere(open_with: Any) -> None:
    open_with("skip")
    with pytest.raises(ValueError, match=r"on_error is 'ignore', but it has to be 'raise' or 'skip'"):
        open_with("ignore")


def test_rows_that_cannot_be_used_are_an_error_or_skipped() -> None:
    good = {"image": Image.new("RGB", (30, 30)), "caption": "a dog"}
    rows = [{**good, "image": b"torn", "key": "k1"}, good, {**good, "caption": " ", "key": "k3"}]
    with pytest.raises(DamagedImageError, match="'k1' cannot be used"):
        Stage2Collator(processor=processor())(rows)
    batch = Stage2Collator(processor=processor(), on_error="skip")(rows)
    assert len(batch["pixel_values"]) == len(batch["input_ids"]) == 1
    assert [key for key, _ in batch["skipped"]] == ["k1", "k3"]


def test_a_caption_missing_from_the_cache_is_an_error_or_skipped(cache: EmbeddingCache) -> None:
    samples = [_sample("a"), {**_sample("zz"), "key": "k"}, _sample("ccc")]
    with pytest.raises(MissingCaptionError, match="lacks 1 of 3 captions, such as 'zz'"):
        Stage2Collator(cache)(samples)
    batch = Stage2Collator(cache, on_error="skip")(samples)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [1, 3]
    assert batch["skipped"] == [("k", "its caption has no stored embedding")]


def test_rows_of_a_plain_torch_dataset_with_embeddings() -> None:
    rows = [{"pixel_values": torch.full((3, 2, 2), float(n)), "llm_embeds": np.full(4, n)} for n in range(3)]
    (batch,) = DataLoader(rows, batch_size=3, collate_fn=Stage2Collator())
    assert set(batch) == {"pixel_values", "llm_embeds", "skipped"}  # without ids, row i matches row i only
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == batch["llm_embeds"][:, 0].tolist() == [0, 1, 2]
    (batch,) = DataLoader([{**row, "caption_id": 7} for row in rows], batch_size=3, collate_fn=Stage2Collator())
    assert (batch["caption_ids"].tolist(), batch["image_caption_ids"].tolist()) == ([7, 7, 7], [[7], [7], [7]])


def test_one_of_several_captions_is_drawn_for_training_and_the_first_taken_in_evaluation(
    cache: EmbeddingCache,
) -> None:
    """As `CaptionImageDataset` draws them, one that stands in the list twice twice as often."""
    rows = [{"pixel_values": torch.zeros(3, 2, 2), "caption": ["a", " ", "bb", "ccc", "bb"]}] * 400
    expected = cache.lookup(["a", "bb", "ccc"], dtype=None)

    def drawn(collator: Stage2Collator, seed: int) -> list[int]:
        torch.manual_seed(seed)
        return [int((expected == row).all(dim=1).nonzero()) for row in collator(rows)["llm_embeds"]]

    collator = Stage2Collator(cache)
    first = drawn(collator, 0)
    assert [first.count(number) / 400 for number in range(3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.08)
    assert first == drawn(collator, 0) != drawn(collator, 1)
    assert set(drawn(collator.for_evaluation(), 0)) == {0}
    batches = DataLoader(rows, batch_size=100, num_workers=2, collate_fn=collator)
    assert len({tuple(map(tuple, batch["llm_embeds"].tolist())) for batch in batches}) == 4


def test_token_rows_of_unequal_length_are_padded_on_the_left() -> None:
    pixels = torch.zeros(3, 2, 2)
    rows = [
        {"pixel_values": pixels, "input_ids": [5, 6, 7], "pooling_mask": [0, 1, 1]},
        {"pixel_values": pixels, "input_ids": torch.tensor([8]), "pooling_mask": torch.tensor([1])},
    ]
    batch = Stage2Collator()(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["pooling_mask"].tolist() == [[0, 1, 1], [0, 0, 1]]


def test_images_are_prepared_as_in_evaluation(tmp_path: Path, image_processor: CLIPImageProcessorPil) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(png(90))
    images = [png(90), path, Image.new("RGB", (20, 18), (90, 0, 0))]
    processor = LLM2CLIPProcessor(image_processor, with_prompt(plain_tokenizer())[0])
    batch = Stage2Collator(processor=processor)([{"image": image, "caption": " a cat\n"} for image in images])
    expected = EvalTransform(image_processor)(images[2])
    torch.testing.assert_close(batch["pixel_values"], expected.expand(3, -1, -1, -1))
    assert torch.equal(batch["input_ids"], processor(text=["a cat"] * 3, return_tensors="pt")["input_ids"])


PIXELS, EMBEDS = {"pixel_values": [1.0]}, {"llm_embeds": [1.0]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([EMBEDS], "needs pixel_values or image, but has llm_embeds"),
        ([PIXELS], "needs llm_embeds, input_ids or caption, but has pixel_values"),
        ([PIXELS | {"caption": "a"}], r"with a caption need Stage2Collator\(cache=...\) or .*processor"),
        ([PIXELS | {"caption": " "}], "it has no text in caption"),
        ([PIXELS | EMBEDS | {"image_caption_ids": [3]}], "need a caption_id as well"),
        ([{"image": b"1", "caption": "a"}], r"with an image need Stage2Collator\(processor=...\)"),
        ([PIXELS | EMBEDS, PIXELS | EMBEDS | {"caption_id": 1}], "row 0 lacks 'caption_id', which others have"),
    ],
)
def test_errors_name_what_rows_lack(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage2Collator()(rows)

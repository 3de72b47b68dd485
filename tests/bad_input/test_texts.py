"""A caption is text, nothing, or a refusal, the same at every door."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from llm2clip.checks.text_faults import TEXT_FAULTS, script
from llm2clip.data import CaptionSource, distinct_captions
from llm2clip.data.captioned_images import CaptionError, RowCaptions, caption_id, caption_ids, clean_caption
from llm2clip.encoders import embed_captions
from llm2clip.store import EmbeddingCache
from llm2clip.store.store import caption_key, caption_keys
from llm2clip.utils.logs import OBEYED, printable
from tests.bad_input.texts import BadText, corpus
from tests.llm2clip.store.encoder import build, embed
from tests.modeling_llm2clip import tiny

CORPUS = corpus()
TEXTS = [text.value for text in CORPUS if text.outcome == "text"]
CLEAN = [str(text).strip() for text in TEXTS]


def outcome(door: Callable[[Any], Any], value: Any, *errors: type[Exception]) -> str:
    """What a door does with a value."""
    try:
        return "empty" if door(value) is None else "text"
    except errors:
        return "refused"


def test_the_corpus_is_large_and_mixed() -> None:
    assert len(CORPUS) > 200
    assert {text.outcome for text in CORPUS} == {"text", "empty", "refused"}


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_the_reader_of_rows_tells_them_apart(text: BadText) -> None:
    assert outcome(clean_caption, text.value, TypeError) == text.outcome
    if text.outcome == "text":
        assert RowCaptions.of({"caption": text.value}, "row 7", ["caption"], None).texts == [str(text.value).strip()]
        return
    with pytest.raises(CaptionError, match="row 7") as error:
        RowCaptions.of({"caption": text.value}, "row 7", ["caption"], None)
    assert len(str(error.value).splitlines()) == 1
    assert not OBEYED.search(str(error.value))


@pytest.mark.parametrize("text", [text for text in CORPUS if text.outcome != "text"], ids=lambda text: text.outcome)
def test_models_refuse_what_is_no_text(text: BadText) -> None:
    model, processor = tiny.joint_model().eval(), tiny.processor()
    for door in (model.encode_text, model.text_model.encode):
        with pytest.raises((TypeError, ValueError)) as error:
            door(["a dog", text.value], processor.tokenizer)
        assert "1" in str(error.value), "the place of the caption"


def test_all_texts_are_encoded_as_they_are_alone() -> None:
    model, processor = tiny.joint_model().eval(), tiny.processor()
    together = model.encode_text(TEXTS, processor)
    assert together.isfinite().all()
    torch.testing.assert_close(together, embed_captions(CLEAN, model, processor, show_progress_bar=False))
    for number in range(0, len(TEXTS), 9):
        alone = model.encode_text([TEXTS[number]], processor)
        torch.testing.assert_close(together[number : number + 1], alone, atol=1e-5, rtol=0)


def test_keys_are_those_of_each_text() -> None:
    assert caption_keys(CLEAN).tolist() == [list(caption_key(text)) for text in CLEAN]
    assert caption_ids(CLEAN).tolist() == [caption_id(text) for text in CLEAN]
    assert len(set(map(caption_key, CLEAN))) == len(set(CLEAN))


def test_they_go_through_tables_and_caches(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"caption": TEXTS}).to_parquet(tmp_path / "texts.parquet")
    for streaming in (False, True):
        found = distinct_captions(CaptionSource(str(tmp_path / "texts.parquet"), streaming=streaming), False)
        assert found == list(dict.fromkeys(CLEAN))
    build(tmp_path / "cache", found)
    cache = EmbeddingCache.open(tmp_path / "cache")
    assert cache.contains(CLEAN).all()
    torch.testing.assert_close(cache.lookup(found[:50]), embed(found[:50]), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", [*TEXT_FAULTS, "script", "printable"])
def test_reports_take_all_of_them(name: str) -> None:
    examine: Callable[[str], object] = {**TEXT_FAULTS, "script": script, "printable": printable}[name]
    for text in CLEAN:
        examine(text)

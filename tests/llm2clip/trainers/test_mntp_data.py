"""The tokens of MNTP are computed once per machine and held in a file."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from llm2clip.data import CaptionSource, distinct_captions
from llm2clip.trainers import mntp_data
from llm2clip.trainers.mntp_data import source_tokens
from tests.llm2clip import tiny as toolbox_tiny
from tests.modeling_llm2clip import tiny

ROWS = 6_000


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two captions a row; each of the first column appears twice."""
    return toolbox_tiny.write_text_pairs(tmp_path_factory.mktemp("rows") / "rows.parquet", ROWS)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def forbidden(*arguments: Any) -> Any:
    raise AssertionError("computed again")


def sources(path: str, **fields: Any) -> list[CaptionSource]:
    return [CaptionSource(path, caption_columns=["short", "long"], **fields)]


def measured(call: Callable[[], np.ndarray]) -> tuple[np.ndarray, int]:
    tracemalloc.start()
    result = call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, peak


def test_tokens_take_less_than_eight_bytes_each_and_none_once_they_are_computed(
    rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny.plain_tokenizer()
    tokens, peak = measured(lambda: source_tokens(sources(rows), tokenizer))
    texts = distinct_captions(sources(rows))
    assert len(texts) == 1.5 * ROWS
    assert tokens.tolist() == [token for ids in tokenizer(texts)["input_ids"] for token in ids]
    # Whatever the size, a batch of a thousand rows is there as Python objects.
    some, first = measured(lambda: source_tokens(sources(rows, max_samples=2_000), tokenizer))
    assert peak - first < 8 * (len(tokens) - len(some))
    monkeypatch.setattr(mntp_data, "token_batches", forbidden)
    again, peak = measured(lambda: source_tokens(sources(rows), tokenizer))
    assert np.array_equal(again, tokens)
    assert peak < len(tokens)
    with pytest.raises(AssertionError, match="computed again"):
        source_tokens(sources(rows, max_samples=5), tokenizer)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(AssertionError, match="computed again"):
        source_tokens(sources(rows), tokenizer)


def test_tokens_of_a_stream_are_those_of_the_table_and_are_computed_once(
    rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny.plain_tokenizer()
    table, stream = (source_tokens(sources(rows, max_samples=50, streaming=flag), tokenizer) for flag in (False, True))
    assert np.array_equal(table, stream)
    monkeypatch.setattr(mntp_data, "token_batches", forbidden)
    again = source_tokens(sources(rows, max_samples=50, streaming=True), tokenizer)
    assert isinstance(again, np.memmap)
    assert np.array_equal(again, stream)
    for other in (sources(rows, max_samples=49, streaming=True), sources(rows, max_samples=60, streaming=True)):
        with pytest.raises(AssertionError, match="computed again"):
            source_tokens(other, tokenizer)

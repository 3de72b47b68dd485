from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm2clip.command_line.progress import section
from llm2clip.store import EmbeddingCache, StoreIncompleteError, StoreMismatchError, building
from tests.llm2clip.files.locks import another_run

from .encoder import build, embed

TEXTS = [f"caption number {number}" for number in range(37)]
MORE = [f"another caption {number}" for number in range(15)]


class KilledError(Exception):
    pass


def _killed_after(calls: int) -> Callable[[list[str]], torch.Tensor]:
    left = [calls]

    def embed_some(texts: list[str]) -> torch.Tensor:
        if not left[0]:
            raise KilledError
        left[0] -= 1
        return embed(texts)

    return embed_some


def _noting(asked: list[str]) -> Callable[[list[str]], torch.Tensor]:
    """Note which captions are embedded."""
    return lambda texts: (asked.extend(texts), embed(texts))[1]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_manifest_records_encoder_shards_and_truncated_captions(tmp_path: Path) -> None:
    build(tmp_path, TEXTS, count_truncated=lambda texts: sum(text.endswith("7") for text in texts))
    manifest = json.loads((tmp_path / "index.manifest").read_text())
    assert (manifest["format_version"], manifest["kind"], manifest["encoder"]) == (1, "captions", "tiny-encoder")
    assert [rows for rows, *_ in manifest["shards"].values()] == [10, 10, 10, 7]
    assert (manifest["width"], manifest["dtype"], manifest["counts"]) == (8, "float16", {"truncated": 3})
    assert manifest["identity"].items() >= {"fingerprint": "finger-a", "pooling": "mean", "max_length": 64}.items()


@pytest.mark.parametrize(("calls", "torn"), [(0, False), (2, False), (3, False), (7, True), (9, False)])
def test_resumed_build_equals_an_uninterrupted_one(tmp_path: Path, calls: int, torn: bool) -> None:
    truncated, broken = {"count_truncated": lambda texts: len(texts) // 2}, tmp_path / "broken"
    build(tmp_path / "unbroken", TEXTS, **truncated)
    with pytest.raises(KilledError):
        build(broken, TEXTS, _killed_after(calls), **truncated)
    with pytest.raises(StoreIncompleteError if calls >= 3 else FileNotFoundError):
        EmbeddingCache.open(broken)
    done = len(list(broken.glob("*.safetensors")))
    assert done == calls // 3
    if torn:
        shard = broken / "shard-00000.safetensors"
        shard.write_bytes(shard.read_bytes()[:100])
        (broken / ".shard-00002.safetensors.0123abcd.tmp").write_bytes(b"left behind")
    asked: list[str] = []
    build(broken, TEXTS, _noting(asked), **truncated)
    assert len(asked) == len(TEXTS) - 10 * (done - torn)
    assert _contents(broken) == _contents(tmp_path / "unbroken")


def test_complete_cache_is_not_written_again(tmp_path: Path) -> None:
    build(tmp_path, TEXTS)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert build(tmp_path, TEXTS[5:20], _killed_after(0)).rows == 37
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_complete_cache_is_said_to_be_so_outside_of_the_steps_of_a_longer_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build(tmp_path, ["a", "b"])
    caplog.set_level("DEBUG")
    build(tmp_path, ["a", "b"])
    with section("a step"):
        build(tmp_path, ["a", "b"])
    assert [record.levelname for record in caplog.records if "already contains all" in record.message] == [
        "INFO",
        "DEBUG",
    ]


def test_new_captions_are_appended_to_a_complete_cache_in_new_shards(tmp_path: Path) -> None:
    build(tmp_path, TEXTS)
    first, captions = _contents(tmp_path), [*MORE, *TEXTS[:9]]
    with pytest.raises(KilledError):
        build(tmp_path, captions, _killed_after(3))
    assert len(EmbeddingCache.open(tmp_path)) == 37  # the index is that of the complete build
    manifest = build(tmp_path, captions)
    assert [rows for rows, *_ in manifest.shards.values()] == [10, 10, 10, 7, 10, 5]
    assert _contents(tmp_path).items() >= {name: first[name] for name in first if name.startswith("shard")}.items()
    found = EmbeddingCache.open(tmp_path).lookup(MORE + TEXTS)
    torch.testing.assert_close(found, embed(MORE + TEXTS), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("is_first", [True, False])
def test_shards_that_a_kill_kept_out_of_the_index_are_added_to_it(
    is_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_first:
        build(tmp_path, MORE)
    with monkeypatch.context() as patch:
        patch.setattr(building, "_write_index", _killed_after(0))
        with pytest.raises((KilledError, TypeError)):
            build(tmp_path, TEXTS)
    build(tmp_path, TEXTS, _killed_after(0))
    assert EmbeddingCache.open(tmp_path).contains(TEXTS).all()
    (tmp_path / "index.safetensors").write_bytes(b"")
    build(tmp_path, TEXTS, _killed_after(0))
    assert EmbeddingCache.open(tmp_path).contains(TEXTS).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [("fingerprint", "finger-b"), ("max_length", 32), ("dtype", "bfloat16"), ("normalize", True), ("width", 9)],
)
def test_cache_of_another_encoder_is_not_extended(tmp_path: Path, field: str, value: object) -> None:
    build(tmp_path, TEXTS)
    with pytest.raises(StoreMismatchError, match=rf"{field} .*, but this run has {field} {value!r}"):
        build(tmp_path, MORE, **{field: value})


def test_shard_is_absent_after_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def full_disk(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode != "wb":
            return opened(path, mode, *arguments, **options)
        path.write_text("half a shard")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full_disk)
        with pytest.raises(OSError, match="No space left"):
            build(tmp_path, TEXTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]
    assert build(tmp_path, TEXTS).rows == 37


def _in_ranks(world: int, work: Callable[[int, Callable[[], None]], None]) -> list[BaseException]:
    barrier = threading.Barrier(world, timeout=20)
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            work(rank, lambda: barrier.wait() and None)
        except BaseException as error:
            barrier.abort()
            errors.append(error)

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(run, range(world)))
    return errors


def _processes(rank: int, barrier: Callable[[], None]) -> Any:
    return SimpleNamespace(process_index=rank, num_processes=2, wait_for_everyone=barrier)


@pytest.mark.parametrize("before", ["nothing", "killed", "changed"])
def test_what_is_missing_is_distributed_over_ranks_with_an_equal_cache(before: str, tmp_path: Path) -> None:
    build(tmp_path / "one", TEXTS)
    if before != "nothing":
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        for number in (1, 3):  # both would belong to rank 1 if shards were bound to ranks
            path = tmp_path / "two" / f"shard-0000{number}.safetensors"
            path.write_bytes(bytes([*path.read_bytes()[:-1], 7]))
            if before == "killed":
                path.unlink()
    asked: dict[int, list[str]] = {0: [], 1: []}

    def work(rank: int, barrier: Callable[[], None]) -> None:
        options: dict[str, Any] = {"processes": _processes(rank, barrier), "show_progress_bar": False}
        build(tmp_path / "two", TEXTS, _noting(asked[rank]), **options)
        assert len(EmbeddingCache.open(tmp_path / "two")) == len(TEXTS)

    assert _in_ranks(2, work) == []
    assert _contents(tmp_path / "two") == _contents(tmp_path / "one")
    shards = [TEXTS[start : start + 10] for start in range(0, 40, 10)]
    every = {0: shards[0] + shards[2], 1: shards[1] + shards[3]}
    assert asked == (every if before == "nothing" else {0: shards[1], 1: shards[3]})


def test_ranks_with_different_captions_are_refused(tmp_path: Path) -> None:
    def work(rank: int, barrier: Callable[[], None]) -> None:
        build(tmp_path, TEXTS[: 37 - rank], processes=_processes(rank, barrier), show_progress_bar=False)

    assert any("lacks 1 of 37 rows" in str(error) for error in _in_ranks(2, work))


def test_two_builds_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "WAIT", 0.0)
    with another_run(tmp_path), pytest.raises(ValueError, match="another run is using"):
        build(tmp_path, TEXTS)


def not_finite(texts: list[str]) -> torch.Tensor:
    return torch.where(torch.tensor([[text == TEXTS[14]] for text in texts]), torch.nan, embed(texts))


def test_float16_overflow_is_an_error(tmp_path: Path) -> None:
    def large(texts: list[str]) -> torch.Tensor:
        return embed(texts).clamp(-1, 1) + 65504

    with pytest.raises(ValueError, match="'caption number 0' exceeds the range of float16; use bfloat16 or normalize"):
        build(tmp_path, TEXTS, large)
    build(tmp_path / "bfloat16", TEXTS, large, dtype="bfloat16")
    build(tmp_path / "unit", TEXTS, large, normalize=True)
    lengths = EmbeddingCache.open(tmp_path / "unit").lookup(TEXTS).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(37), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (TEXTS, {"encoder": not_finite}, "the caption 'caption number 14'"),
        (TEXTS, {"encoder": lambda texts: embed(texts)[:, :7]}, r"shape \(4, 7\) instead of \(4, 8\)"),
        (["a", "b", "b", "b"], {}, "2 captions repeat an earlier one, such as 'b'"),
        ([], {}, "no captions"),
        (TEXTS, {"encoder": lambda texts: torch.zeros(len(texts), 8), "normalize": True}, "no direction"),
        (TEXTS, {"dtype": "float64"}, "dtype is 'float64'"),
    ],
    ids=["finite", "width", "repeated", "none", "zero", "dtype"],
)
def test_captions_and_embeddings_that_cannot_be_stored_are_refused(
    texts: Any, options: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path, texts, **options)

"""An index in S3, by a server on a loopback port: runs killed by signals, two readers, two runs at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from llm2clip import cli
from llm2clip.search.search_index import SearchIndex
from modeling_llm2clip import LLM2CLIPModel
from tests.object_store import s3_server

from .conftest import content, encoded, index, picture
from .test_memory import kill_updates

Model = tuple[Path, LLM2CLIPModel]
QUERY = np.ones((1, 24), np.float32) / 24**0.5
PLACE = "s3://bucket/index"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


@pytest.fixture
def place(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a folder in an empty bucket, which this process and its children can reach."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    kind = fsspec.get_filesystem_class("s3")
    kind.clear_instance_cache()  # of another address
    files = kind()
    yield PLACE
    files.invalidate_cache()
    if found := files.find("bucket"):
        files.rm(found)
    kind.clear_instance_cache()


def parts(place: str) -> int:
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    return len(files.find(f"{place}/images.lance/data"))


def add_pictures(folder: Path, count: int) -> None:
    for number in range(count):
        (folder / f"new {number:04}.png").write_bytes(encoded(picture(1000 + number)))


def command(pictures: Path, model: Path, place: str) -> list[str]:
    settings = ["--num-workers", "0", "--batch-size", "4", "--part-size", "4"]
    images = ["index", str(pictures), "--model", str(model), "--output-dir", place]
    return [sys.executable, "-m", "llm2clip", *images, *settings]


def test_a_run_killed_by_a_signal_leaves_the_index_in_s3_and_is_resumed(
    place: str, pictures: Path, model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert index(pictures, model[0], place) == (12, 0, 0, 0, 12)
    early = SearchIndex.open(place)
    expected = early.search(QUERY, 20)
    add_pictures(pictures, 80)
    (pictures / "00.png").unlink()
    before = parts(place)
    run = command(pictures, model[0], place)
    with subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while parts(place) < before + 3:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert parts(place) < before + 20
    late = SearchIndex.open(place)
    for reader in (early, late):
        assert reader.search(QUERY, 20) == expected
    again = subprocess.run(run, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resuming an unfinished run" in again.stderr
    assert "embedded: 80\n" in again.stdout
    for reader in (early, late):
        assert reader.search(QUERY, 20) == expected
    index(pictures, model[0], tmp_path / "whole", part_size=4)
    assert sorted(row["key"] for row in content(place)["rows"]) == sorted(
        row["key"] for row in content(tmp_path / "whole")["rows"]
    )
    capsys.readouterr()
    assert cli.main(["search", place, "--image", str(pictures / "new 0050.png"), "--top", "1"]) == 0
    assert "new 0050.png" in capsys.readouterr().out


def test_an_update_in_s3_killed_at_any_moment_leaves_the_old_index(place: str) -> None:
    assert kill_updates(place, (0, 0.3, 1.0)) >= 2


def test_of_two_runs_at_once_in_s3_one_stops_and_nothing_is_mixed(
    place: str, pictures: Path, model: Model, tmp_path: Path
) -> None:
    add_pictures(pictures, 80)
    run = command(pictures, model[0], place)
    running = [subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in running]
    failed = [error for process, error in zip(running, errors, strict=True) if process.returncode]
    assert failed
    assert all("another run writes to the index s3://bucket/index" in error for error in failed), failed
    assert index(pictures, model[0], place)[-1] == 92
    keys = [row["key"] for row in content(place)["rows"]]
    assert len(keys) == len(set(keys)) == 92


def test_what_is_wrong_with_s3_is_said_in_one_line(
    place: str, pictures: Path, model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["index", str(pictures), "--model", str(model[0]), "--num-workers", "0", "--output-dir"]
    missing = "s3://nowhere/index/.llm2clip.json cannot be written: The specified bucket does not exist"
    cases = [(["search", "s3://bucket/none", "a text"], "there is no index in s3://bucket/none")]
    cases += [([*arguments, "s3://nowhere/index"], missing)]
    for given, message in cases:
        assert cli.main(given) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    with monkeypatch.context() as unreachable:
        unreachable.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        assert cli.main(["search", "s3://other/index", "a text"]) == 2
    assert "s3://other/index/manifest.json cannot be reached" in capsys.readouterr().err

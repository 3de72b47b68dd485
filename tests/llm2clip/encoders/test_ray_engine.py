"""Ray as the engine of `llm2clip embed`: the same sidecars as from processes, whatever dies on the way."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm2clip import cli, closed_form_alignment
from llm2clip.encoders.embed_shards import EmbedShard, SidecarJob, list_jobs
from llm2clip.encoders.ray_engine import embed_with_ray
from tests.documents.reading import blocks
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.encoders.shards import Counting, embed, embedding, write_shards
from tests.llm2clip.trainers.test_closed_form import stores
from tests.processes import run_python

pytest.importorskip("ray.data")


# Otherwise Ray writes a token into the home folder, and refuses objects where 95% of the disk are taken.
RAY_VARIABLES = {"RAY_AUTH_MODE": "disabled", "RAY_local_fs_capacity_threshold": "1", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(autouse=True)
def ray_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in RAY_VARIABLES.items():
        monkeypatch.setenv(name, value)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "log.txt"}


@pytest.fixture
def cluster() -> Any:
    """Two processes of Ray, which the tests share with the runs that they start."""
    import ray

    # Workers find the modules of the tests by the paths of this process.
    paths = os.pathsep.join(sys.path)
    ray.init(
        "local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    yield ray
    ray.shutdown()


def dying(marker: Path, always: bool = False) -> EmbedShard:
    """Its process ends within the first shard that has a certain caption, and does not end a second time."""

    def embed_some(texts: list[str]) -> Any:
        if "dog 3" in texts and (always or not marker.exists()):
            marker.touch()
            os._exit(1)
        return Counting()(texts)

    return embedding(embed_some)


def full_disk(job: SidecarJob) -> Any:
    raise OSError(28, "No space left on device", "/somewhere")


@pytest.mark.slow
@pytest.mark.nightly
def test_every_shard_is_done_once_whatever_dies(cluster: Any, tmp_path: Path) -> None:
    source, died = write_shards(tmp_path / "data", 9), tmp_path / "died"
    embed(source, tmp_path / "processes")

    def done(folder: str, embedder: Callable[[], EmbedShard], **options: Any) -> list[Any]:
        jobs = list_jobs([source], str(tmp_path / folder))
        return list(embed_with_ray(jobs, embedder, **{"actors": 2, **options}))

    outcomes = done("ray", lambda: dying(died))
    assert died.exists()
    assert not any(outcome.failed or outcome.done_before for outcome in outcomes)
    assert sum(outcome.captions for outcome in outcomes) == 27
    assert contents(tmp_path / "ray") == contents(tmp_path / "processes")
    assert [outcome.done_before for outcome in done("ray", lambda: dying(died))] == 9 * [1]
    # A shard that ends every process is given up, and named.
    outcomes = done("fatal", lambda: dying(died, always=True))
    ((failure,),) = (outcome.failed for outcome in outcomes if outcome.failed)
    assert "3.parquet: each process that embedded it died" in failure
    assert (len(outcomes), len(contents(tmp_path / "fatal"))) == (9, 16)
    with pytest.raises(ValueError, match="No space left on device: '/somewhere'"):
        done("fatal", lambda: full_disk)
    with pytest.raises(ValueError, match="has room for an actor with 1 CPU and 2 GPUs: 2 CPUs, 0 GPUs"):
        done("fatal", lambda: full_disk, actors=None, gpus_per_actor=2)


@pytest.mark.slow
@pytest.mark.nightly
def test_the_sums_of_tasks_give_the_alignment_of_the_whole(cluster: Any, tmp_path: Path) -> None:
    images, texts = torch.randn(900, 512), torch.randn(900, 768)
    texts[:, :9] += 8 * images[:, :9]
    folders = stores(tmp_path / "data", images, texts)
    (code,) = [content for language, content in blocks("docs/scaling.md") if language == "python"]
    found: dict[str, Any] = {}
    exec(code.replace("/data/", f"{tmp_path}/data/"), found)
    expected = closed_form_alignment(*folders, ridge=0.3, width=256)
    similarity = found["alignment"].embed_images(images) @ found["alignment"].embed_texts(texts).T
    torch.testing.assert_close(
        similarity, expected.embed_images(images) @ expected.embed_texts(texts).T, atol=1e-6, rtol=0
    )


@pytest.mark.slow
def test_the_command_starts_ray_and_writes_the_sidecars_of_processes(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(5):
        rows = [json.dumps({"caption": f"a dog {number} {row}"}) for row in range(20)]
        (tmp_path / "data" / f"{number}.jsonl").write_text("\n".join(rows))
    (tmp_path / "data" / "5.jsonl").write_text("{")
    source = {"path": str(tmp_path / "data"), "streaming": True}
    command = ["embed", "--text-model-name-or-path", inputs.text, "--sources", json.dumps([source])]
    with_ray = [*command, "--output-dir", str(tmp_path / "ray"), "--engine", "ray", "--ray-actors", "2"]
    for error in (embed_with(with_ray), embed_with([*command, "--output-dir", str(tmp_path / "processes")])):
        assert re.search(r"1 of 6 shards could not be embedded, .*5\.jsonl", error), error[-3000:]
    (tmp_path / "data" / "5.jsonl").unlink()
    assert contents(tmp_path / "ray") == contents(tmp_path / "processes")
    assert len(contents(tmp_path / "ray")) == 10
    assert "num_shards_done_before: 5" in embed_with(with_ray)


def embed_with(command: list[str]) -> str:
    """Run the command in a process of its own, which ends with Ray if that crashes; returns what it printed."""
    done = run_python(["-m", "llm2clip", *command], check=False, seconds=240, **RAY_VARIABLES)
    return done.stdout + done.stderr


def test_ray_that_is_missing_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "data", 1)
    sources = json.dumps([{"path": str(tmp_path / "data"), "streaming": True}])
    monkeypatch.setitem(sys.modules, "ray", None)
    command = ["embed", "--text-model-name-or-path", "nothing", "--sources", sources]
    assert cli.main([*command, "--output-dir", str(tmp_path / "out"), "--engine", "ray"]) == 2
    assert "pip install 'llm2clip[all]'" in capsys.readouterr().err

"""A node of Ray that dies while it embeds: nothing is missing, and nothing that was finished is done again.

Both nodes run on this machine, within `unshare --net`, where nothing but the loopback device exists. The worker node
is killed when a third of the shards is done.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.contest import ROOT, THREAD_VARIABLES
from benchmarks.scale import MANIFESTS
from benchmarks.scale_inputs import write_tars, write_text_tower
from benchmarks.watching import kill

pytest.importorskip("ray.data")
ADDRESS, PORT = "127.0.0.1", 6399
PYTHON = [sys.executable, "-m"]
# The user becomes root within it, who may bring the loopback device up.
NETWORK = ["unshare", "--map-root-user", "--net"]
LOOPBACK = ["ip", "link", "set", "lo", "up"]
ENVIRONMENT = {
    **os.environ,
    **dict.fromkeys(THREAD_VARIABLES, "1"),
    "HF_HUB_OFFLINE": "1",
    # Nobody else is in this network.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'training'}",
}


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*NETWORK, *LOOPBACK], capture_output=True).returncode != 0,
    reason="no network of its own can be made here",
)
def test_every_shard_is_embedded_when_a_node_dies(tmp_path: Path) -> None:
    write_tars(tmp_path / "data", 60_000)
    write_text_tower(tmp_path / "tower")
    inside = [*PYTHON, "tests.llm2clip.encoders.test_ray_nodes", str(tmp_path)]
    command = [*NETWORK, "sh", "-c", f'{" ".join(LOOPBACK)} && exec "$@"', "sh", *inside]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])  # after what libraries print
    assert figures["shards"] == 12
    assert 4 <= figures["shards_before_the_kill"] < 12
    assert figures["processes_killed"] > 1
    assert (figures["finished_shards_written_again"], figures["left_over"]) == (0, [])
    assert "num_shards: 12" in figures["verify_printed"]


def embed_on_two_nodes(folder: Path) -> dict[str, Any]:
    """Embed the tars of a folder, kill the worker node on the way, verify, and return what was seen."""
    shards, sidecars = len(list((folder / "data").glob("*.tar"))), folder / "sidecars"
    with contextlib.ExitStack() as nodes:
        nodes.enter_context(node(folder / "head.log", "--head", f"--port={PORT}", "--include-dashboard=false"))
        wait_for_nodes(1)
        worker = nodes.enter_context(node(folder / "worker.log", f"--address={ADDRESS}:{PORT}"))
        wait_for_nodes(2)
        source = {"path": str(folder / "data"), "streaming": True, "caption_columns": ["txt"]}
        command = [*PYTHON, "llm2clip", "embed", "--text-model-name-or-path", str(folder / "tower")]
        command += ["--sources", json.dumps([source]), "--output-dir", str(sidecars)]
        command += ["--engine", "ray", "--ray-address", f"{ADDRESS}:{PORT}"]
        embedding = nodes.enter_context(running(command, folder / "embed.log"))
        while len(before := inodes(sidecars)) < shards // 3:
            assert embedding.poll() is None, (folder / "embed.log").read_text()[-2000:]
            time.sleep(0.02)
        on_worker = kill(psutil.Process(worker.pid))
        assert embedding.wait() == 0, (folder / "embed.log").read_text()[-2000:]
    found = inodes(sidecars)
    verify = [*PYTHON, "llm2clip", "verify", str(sidecars)]
    verified = subprocess.run(verify, env=ENVIRONMENT, check=True, capture_output=True, text=True)
    assert len(found) == len(list(sidecars.glob("*.emb.safetensors"))) == shards
    return {
        "shards": shards,
        "shards_before_the_kill": len(before),
        "processes_killed": on_worker,
        "finished_shards_written_again": sum(found[name] != inode for name, inode in before.items()),
        "left_over": [path.name for path in sidecars.glob(".*.tmp")],
        "verify_printed": verified.stdout.splitlines(),
    }


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command; it is killed at the end, with all that it started."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            if process.poll() is None:
                kill(psutil.Process(process.pid))
                process.wait()


def node(log: Path, *options: str) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """Start a node of Ray with one core."""
    command = [str(Path(sys.executable).with_name("ray")), "start", *options, "--num-cpus=1", "--disable-usage-stats"]
    command += [f"--node-ip-address={ADDRESS}", f"--object-store-memory={100 * 2**20}", "--block"]
    return running(command, log)


def wait_for_nodes(count: int) -> None:
    question = f"import ray; ray.init('{ADDRESS}:{PORT}', log_to_driver=False); print(len(ray.nodes()))"
    for _ in range(5):
        answer = subprocess.run([sys.executable, "-c", question], env=ENVIRONMENT, capture_output=True, text=True)
        if answer.stdout.strip().endswith(str(count)):
            return
        time.sleep(1)
    raise RuntimeError(f"Ray has no {count} nodes: {answer.stdout}{answer.stderr[-2000:]}")


def inodes(sidecars: Path) -> dict[str, int]:
    found = {}
    for path in sidecars.glob(MANIFESTS):
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = path.stat().st_ino
    return {name: inode for name, inode in found.items() if not name.startswith(".")}


if __name__ == "__main__":
    print(f"\n{json.dumps(embed_on_two_nodes(Path(sys.argv[1])))}")

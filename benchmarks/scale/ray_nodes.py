"""Embed on two nodes of Ray in a network of their own, and kill one: `python -m benchmarks.scale.ray_nodes`.

Both nodes run on this machine, within `unshare --net`, where nothing but the loopback device exists. The worker node
is killed when a third of the shards is done; every shard has one whole sidecar all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.contest import ROOT, THREAD_VARIABLES
from benchmarks.scale.data import CAPTIONS_PER_TAR, write_tars, write_text_tower
from benchmarks.scale.embedding import MANIFESTS
from benchmarks.scale.processes import descendants

ADDRESS, PORT = "127.0.0.1", 6399
PYTHON = [sys.executable, "-m"]
ENVIRONMENT = {
    **os.environ,
    **dict.fromkeys(THREAD_VARIABLES, "1"),
    "HF_HUB_OFFLINE": "1",
    # Nobody else is in this network.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'training'}",
}
# On the command line of the process within the network.
INSIDE = "--inside"


def main(arguments: list[str] | None = None) -> None:
    """Print what was measured as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.ray_nodes", description=__doc__)
    parser.add_argument("--captions", type=int, default=300_000)
    parser.add_argument("--folder", type=Path, default=Path("runs/ray_nodes"), help="deleted at the end")
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    folder = options.folder.absolute()
    if options.inside:
        print(json.dumps(embed_on_two_nodes(folder), indent=2))
        return
    try:
        write_tars(folder / "data", options.captions)
        write_text_tower(folder / "tower")
        again = [*PYTHON, "benchmarks.scale.ray_nodes", "--folder", str(folder), INSIDE]
        # The user becomes root within it, who may bring the loopback device up.
        script = 'ip link set lo up && ip -brief address >&2 && exec "$@"'
        network = ["unshare", "--map-root-user", "--net", "sh", "-c", script, "sh"]
        subprocess.run([*network, *again], check=True, env=ENVIRONMENT, cwd=ROOT)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def embed_on_two_nodes(folder: Path) -> dict[str, Any]:
    """Embed the tars of a folder, kill the worker node on the way, verify, and return what was measured.

    Raises:
        RuntimeError: The command failed, or a shard has no sidecar.
    """
    shards, sidecars = len(list((folder / "data").glob("*.tar"))), folder / "sidecars"
    with contextlib.ExitStack() as nodes:
        nodes.enter_context(_node(folder / "head.log", "--head", f"--port={PORT}", "--include-dashboard=false"))
        _wait_for_nodes(1)
        worker = nodes.enter_context(_node(folder / "worker.log", f"--address={ADDRESS}:{PORT}"))
        _wait_for_nodes(2)
        start = time.monotonic()
        command = nodes.enter_context(_embedding(folder))
        first = _wait_for(command, sidecars, 1)
        killed = _wait_for(command, sidecars, shards // 3)
        before = _inodes(sidecars)
        on_worker = _kill(worker)
        unfinished = len(list(sidecars.glob(".*.tmp")))
        if command.wait():
            raise RuntimeError(f"embed failed:\n{(folder / 'embed.log').read_text()[-2000:]}")
        end = time.monotonic()
    found = _inodes(sidecars)
    verified = subprocess.run(
        [*PYTHON, "llm2clip", "verify", str(sidecars)], env=ENVIRONMENT, check=True, capture_output=True, text=True
    )
    if len(found) != shards or len(list(sidecars.glob("*.emb.safetensors"))) != shards:
        raise RuntimeError(f"{len(found)} of {shards} shards have a sidecar.")
    rate = CAPTIONS_PER_TAR / 1000
    return {
        "shards": shards,
        "seconds": round(end - start, 1),
        "seconds_to_first_shard": round(first - start, 1),
        "shards_before_the_kill": len(before),
        "processes_killed": on_worker,
        "thousand_rows_per_second_on_two_nodes": round((len(before) - 1) * rate / (killed - first), 1),
        "thousand_rows_per_second_afterwards": round((shards - len(before)) * rate / (end - killed), 1),
        "files_unfinished_at_the_kill": unfinished,
        "finished_shards_written_again": sum(found[name] != inode for name, inode in before.items()),
        "left_over": [path.name for path in sidecars.glob(".*.tmp")],
        "embed_printed": (folder / "embed.log").read_text().splitlines()[-5:],
        "verify_printed": verified.stdout.splitlines(),
    }


@contextlib.contextmanager
def _node(log: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a node with one core; it is killed at the end."""
    command = [str(Path(sys.executable).with_name("ray")), "start", *options, "--num-cpus=1", "--disable-usage-stats"]
    command += [f"--node-ip-address={ADDRESS}", f"--object-store-memory={100 * 2**20}", "--block"]
    with log.open("wb") as output:
        node = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield node
        finally:
            _kill(node)


@contextlib.contextmanager
def _embedding(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    source = {"path": str(folder / "data"), "streaming": True, "caption_columns": ["txt"]}
    command = [*PYTHON, "llm2clip", "embed", "--text-model-name-or-path", str(folder / "tower")]
    command += ["--sources", json.dumps([source]), "--output-dir", str(folder / "sidecars")]
    command += ["--engine", "ray", "--ray-address", f"{ADDRESS}:{PORT}"]
    with (folder / "embed.log").open("wb") as output:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            _kill(process)


def _wait_for_nodes(count: int) -> None:
    question = f"import ray; ray.init('{ADDRESS}:{PORT}', log_to_driver=False); print(len(ray.nodes()))"
    for _ in range(5):
        answer = subprocess.run([sys.executable, "-c", question], env=ENVIRONMENT, capture_output=True, text=True)
        if answer.stdout.strip().endswith(str(count)):
            return
        time.sleep(1)
    raise RuntimeError(f"Ray has no {count} nodes: {answer.stdout}{answer.stderr[-2000:]}")


def _wait_for(command: subprocess.Popen[bytes], sidecars: Path, count: int) -> float:
    """Wait until so many shards are done; return the time."""
    while len(_inodes(sidecars)) < count:
        if command.poll() is not None:
            raise RuntimeError(f"embed ended with status {command.returncode} before {count} shards were done.")
        time.sleep(0.02)
    return time.monotonic()


def _inodes(sidecars: Path) -> dict[str, int]:
    found = {}
    for path in sidecars.glob(MANIFESTS):
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = path.stat().st_ino
    return {name: inode for name, inode in found.items() if not name.startswith(".")}


def _kill(process: subprocess.Popen[bytes]) -> int:
    """Kill a process and all that it started; return how many these were."""
    if process.poll() is not None:
        return 0
    found = descendants(process.pid)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    return len(found)


if __name__ == "__main__":
    main()

"""A node of Ray that dies while it embeds: nothing is missing, and nothing that was finished is done again."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.documents.reading import ROOT
from tests.processes import run_python

pytest.importorskip("ray.data")
NETWORK = ["unshare", "--map-root-user", "--net", "ip", "link", "set", "lo", "up"]


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(NETWORK, capture_output=True).returncode != 0,
    reason="no network of its own can be made here",
)
def test_every_shard_is_embedded_when_a_node_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = ["-m", "benchmarks.scale.ray_nodes", "--captions", "60000", "--folder", str(tmp_path / "nodes")]
    printed = run_python(arguments).stdout
    figures = json.loads(printed[printed.index("{") :])  # after what libraries print
    assert figures["shards"] == 12
    assert 4 <= figures["shards_before_the_kill"] < 12
    assert figures["processes_killed"] > 1
    assert (figures["finished_shards_written_again"], figures["left_over"]) == (0, [])
    assert "num_shards: 12" in figures["verify_printed"]
    assert not (tmp_path / "nodes").exists()

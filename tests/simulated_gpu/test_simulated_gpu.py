"""The project on a simulated GPU: tensors of two devices never meet, values are those of a CPU, and waits are counted.

What it cannot see is in docs/scaling.md.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# Of torch, whose private interfaces the device uses.
MINOR_VERSION = "2.13"
CASES = (
    *("wrong device", "losses", "encode", "closed form", "top_k", "embed", "stage 1", "stage 1 in chunks", "stage 2"),
    *("stage 2, shared captions", "stage 2, sigmoid", "stage 2 in chunks", "stage 2, frozen", "stage 2, LoRA"),
)
pytestmark = [
    pytest.mark.skipif(
        ".".join(torch.__version__.split(".")[:2]) != MINOR_VERSION,
        reason=f"the simulated device is written for torch {MINOR_VERSION}, and this is {torch.__version__}",
    ),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the simulated device is compiled with g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU: run make test-cuda"),
]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, Any]]:
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "training"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-m", "tests.simulated_gpu.checks"]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # From 5.25 on, transformers loads compiled kernels for a GPU from the Hub.
    environment["USE_HUB_KERNELS"] = "NO"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    return {line["case"]: line for line in lines}


def test_every_case_ran(outcomes: dict[str, dict[str, Any]]) -> None:
    assert set(outcomes) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_runs_on_the_gpu(outcomes: dict[str, dict[str, Any]], case: str) -> None:
    assert not outcomes[case]["error"], outcomes[case]["error"]
    assert outcomes[case]["operations"] > 0


# A step waits once, before the optimizer changes weights: StepGuard reads whether the loss or gradients are broken.
@pytest.mark.parametrize("case", ["stage 2", "stage 2, sigmoid", "stage 2 in chunks", "stage 2, frozen"])
def test_a_step_of_stage2_waits_once(outcomes: dict[str, dict[str, Any]], case: str) -> None:
    assert outcomes[case]["per_step"] == {"sync: item": 1}

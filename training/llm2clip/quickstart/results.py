"""The content of `results.json`."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import torch
import transformers

from llm2clip.quickstart.data import QuickstartData
from llm2clip.quickstart.ledger import Ledger


def collect_results(
    ledger: Ledger, data: QuickstartData, settings: dict[str, Any], model: Path, seconds: float
) -> dict[str, Any]:
    """Collect the results of all steps of a run that took `seconds` and wrote the folder `model`."""
    steps = {name: step["result"] for name, step in ledger.steps.items()}
    trained = steps["stage2-stage1"]["retrieval"]
    image_rows = {
        "before training": steps["before"][data.query_column],
        "stage 2, raw LLM": steps["stage2-raw"]["retrieval"][data.query_column],
        "stage 2, stage-1 LLM": trained[data.query_column],
    }
    for language, column in data.translations.items():
        image_rows[f"  {language} captions"] = trained[column]
    return {
        "settings": settings,
        "caption_retrieval": {
            "raw LLM, causal": steps["raw"]["causal"],
            "raw LLM, bidirectional": steps["raw"]["bidirectional"],
            "after stage 1": steps["stage1"]["caption_retrieval"],
        },
        "image_retrieval": image_rows,
        "history": {name: steps[name]["history"] for name in ("stage1", "stage2-raw", "stage2-stage1")},
        "model": str(model),
        "model_sample": steps["final"],
        "seconds": {"this run": round(seconds, 1), **ledger.seconds()},
        "reused_steps": ledger.reused,
        "machine": {
            "processor": _processor_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def read_history(folder: Path) -> list[dict[str, float]]:
    """Read the values that the Trainer logged during a run."""
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1].strip() if found else platform.processor() or platform.machine()

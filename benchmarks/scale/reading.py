"""Read the training rows of stage 2 from tars and sidecars: several processes, from the start and from the middle."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scale.data import CAPTIONS_PER_TAR, link_tars
from benchmarks.scale.processes import run_watched
from benchmarks.stage2_inputs import write_vision_tower

BATCH = 256
# Rows that a process reads after its first batch.
ROWS = 50_000
VISION = {"hidden": 64, "layers": 1, "patch": 16, "size": 32}


@dataclass
class ReadTrial:
    """How a data set is read.

    Attributes:
        captions: Number of captions.
        processes: Number of processes.
        workers: DataLoader workers of each; 0 reads in the process itself.
    """

    captions: int
    processes: int = 2
    workers: int = 0


def read(folder: Path, trial: ReadTrial) -> dict[str, Any]:
    """Read a data set whose sidecars exist, and return what was measured.

    Raises:
        FileNotFoundError: There are no sidecars.
        RuntimeError: A process failed, or yielded a row twice.
    """
    sidecars, vision = folder / f"sidecars-{trial.captions}", folder / "vision"
    if not sidecars.is_dir():
        raise FileNotFoundError(f"{sidecars} is missing: run the step embed with the same captions and --keep before.")
    if not vision.exists():
        write_vision_tower(folder, **VISION)
    rows = -(-trial.captions // CAPTIONS_PER_TAR) * CAPTIONS_PER_TAR
    settings = {
        "batches": min(ROWS, rows // (2 * trial.processes)) // BATCH,
        "stage2": {
            "vision_model_name_or_path": str(vision),
            "text_model_name_or_path": str(folder / "tower"),
            "embedding_cache": str(sidecars),
            "sources": [
                {"path": f"{link_tars(folder, trial.captions)}/*.tar", "streaming": True, "caption_columns": ["txt"]}
            ],
            "output_dir": str(folder / "out"),
            "per_device_train_batch_size": BATCH,
            "dataloader_num_workers": trial.workers,
            "max_steps": rows // (BATCH * trial.processes),
            "report_to": "none",
            "use_cpu": True,
        },
    }
    path = folder / "read.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(trial.processes)]
    log = folder / "read.log"
    log.unlink(missing_ok=True)
    watched = run_watched([*launcher, "-m", "benchmarks.scale.read_worker", str(path)], log)
    found = [json.loads((folder / f"read-{rank}.json").read_text()) for rank in range(trial.processes)]
    shutil.rmtree(folder / "out", ignore_errors=True)
    return {
        "captions": trial.captions,
        "processes": trial.processes,
        "workers": trial.workers,
        "rows": sum(figures["rows"] for figures in found),
        "rows_per_second": round(sum(figures["rows"] / figures["seconds"] for figures in found), 1),
        "peak_bytes": watched.peak,
        "lanes": found[0]["lanes"],
        "first_seconds": round(max(figures["first_seconds"] for figures in found), 2),
        "resumed_at": found[0]["resumed_at"],
        "resume_seconds": round(max(figures["resume_seconds"] for figures in found), 2),
        "seconds": round(watched.seconds, 1),
    }

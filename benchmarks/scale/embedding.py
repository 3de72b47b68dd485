"""Embed the captions of a generated data set into sidecars, by several processes that are killed on the way."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.scale.data import CAPTIONS_PER_TAR, link_tars, write_tars, write_text_tower
from benchmarks.scale.processes import Watched, run_watched

ENGINES = ("processes", "ray")
MANIFESTS = "*.emb.manifest"


@dataclass
class Trial:
    """How a data set is embedded.

    Attributes:
        captions: Number of captions.
        processes: Number of processes, or of actors of Ray.
        kills: How often all processes are killed on the way, at equal distances.
    """

    captions: int
    processes: int = 2
    engine: str = "processes"
    kills: int = 0


def embed(folder: Path, trial: Trial) -> dict[str, Any]:
    """Embed a data set, verify the result, and return what was measured.

    Raises:
        RuntimeError: A command failed, or sidecars are missing.
    """
    tower, sidecars, log = folder / "tower", folder / f"sidecars-{trial.captions}", folder / "embed.log"
    written = write_tars(folder / "data", trial.captions)
    if not tower.exists():
        write_text_tower(tower)
    shutil.rmtree(sidecars, ignore_errors=True)
    sidecars.mkdir()
    log.unlink(missing_ok=True)
    shards = -(-trial.captions // CAPTIONS_PER_TAR)
    arguments = _arguments(folder, trial)
    runs = []
    for number in range(1, trial.kills + 1):
        least = shards * number // (trial.kills + 1)
        runs.append(run_watched(arguments, log, partial(_count, sidecars), least))
    runs.append(run_watched(arguments, log, partial(_count, sidecars)))
    verified = run_watched(["-m", "llm2clip", "verify", str(sidecars), "--sources", "false"], log)
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in sidecars.glob(MANIFESTS)]
    seconds, units = map(sum, zip(*(run.cpu_per_unit for run in runs), strict=True))
    rows = sum(manifest["source"]["rows"] for manifest in manifests)
    if (len(manifests), rows) != (shards, shards * CAPTIONS_PER_TAR):
        raise RuntimeError(f"{len(manifests)} of {shards} shards with {rows:,} rows have embeddings.")
    return {
        "captions": trial.captions,
        "processes": trial.processes,
        "engine": trial.engine,
        "kills": trial.kills,
        "tars_written": written,
        "seconds": round(sum(run.seconds for run in runs), 1),
        "rows_per_second": round(_rate(sidecars, runs), 1),
        "cpu_microseconds_per_row": round(seconds / (units * CAPTIONS_PER_TAR) * 1e6, 1),
        "peak_bytes": max(run.peak for run in runs),
        "distinct": sum(manifest["rows"] for manifest in manifests),
        "bytes": sum(path.stat().st_size for path in sidecars.iterdir()),
        "left_over": sorted(path.name for path in sidecars.iterdir() if path.suffix == ".tmp"),
        "verify_seconds": round(verified.seconds, 1),
    }


def _arguments(folder: Path, trial: Trial) -> list[str]:
    recipe = folder / "embed.yaml"
    settings: dict[str, Any] = {
        "text_model_name_or_path": str(folder / "tower"),
        "output_dir": str(folder / f"sidecars-{trial.captions}"),
        "sources": [
            {"path": f"{link_tars(folder, trial.captions)}/*.tar", "streaming": True, "caption_columns": ["txt"]}
        ],
    }
    if trial.engine == "ray":
        settings |= {"engine": "ray", "ray_actors": trial.processes}
    recipe.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = ["-m", "llm2clip", "embed", str(recipe)]
    if trial.engine == "processes" and trial.processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(trial.processes)]
        return [*launcher, *command]
    return command


def _count(sidecars: Path) -> int:
    return sum(1 for _ in sidecars.glob(MANIFESTS))


def _rate(sidecars: Path, runs: list[Watched]) -> float:
    """Return the rows per second between the first and the last shard of each run, without the start-up."""
    ends = sorted(path.stat().st_mtime for path in sidecars.glob(MANIFESTS))
    rows, seconds = 0, 0.0
    for run in runs:
        own = [end for end in ends if run.start <= end <= run.end]
        if len(own) > 1:
            rows += (len(own) - 1) * CAPTIONS_PER_TAR
            seconds += own[-1] - own[0]
    return rows / seconds if seconds else float("nan")

"""How costs grow with a data set: `python -m benchmarks.scale embed read --captions 1000000`.

Steps: `embed` makes tars of tiny captioned pictures and embeds them, and `read` reads them as stage 2 does. What was
measured is appended to scale.jsonl, from which the tables of docs/scaling.md are written; without steps, only the
tables are.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable
from math import nan
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.contest import ROOT
from benchmarks.environments import versions_of
from benchmarks.scale_inputs import CAPTIONS_PER_TAR, write_tars, write_text_tower, write_vision_tower
from benchmarks.watching import run_watched

RECORD, PAGE = Path(__file__).with_suffix(".jsonl"), ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- measured: made by python -m benchmarks.scale -->\n", "<!-- /measured -->\n"
MANIFESTS = "*.emb.manifest"
BATCH, ROWS_PER_READER = 256, 50_000


def embed(
    folder: Path, captions: int, processes: int = 2, engine: str = "processes", kills: int = 0
) -> dict[str, Any]:
    """Embed a data set into sidecars, killed on the way at equal distances, verify them, and return what was measured.

    Args:
        processes: Number of processes, or of actors of Ray.
        engine: `processes` of torchrun, or `ray`.
        kills: How often all processes are killed.

    Raises:
        RuntimeError: A command failed, or sidecars are missing.
    """
    tower, sidecars, log = folder / "tower", folder / f"sidecars-{captions}", folder / "embed.log"
    write_tars(folder / f"data-{captions}", captions)
    if not tower.exists():
        write_text_tower(tower)
    shutil.rmtree(sidecars, ignore_errors=True)
    sidecars.mkdir()
    shards = -(-captions // CAPTIONS_PER_TAR)
    command = ["-m", "llm2clip", "embed", "--text-model-name-or-path", str(tower), "--output-dir", str(sidecars)]
    command += ["--sources", json.dumps([_source(folder, captions)])]
    if engine == "ray":
        command += ["--engine", "ray", "--ray-actors", str(processes)]
    elif processes > 1:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *command]

    def count() -> int:
        return sum(1 for _ in sidecars.glob(MANIFESTS))

    limits = [*(shards * number // (kills + 1) for number in range(1, kills + 1)), None]
    runs = [run_watched(command, log, count, limit) for limit in limits]
    verified = run_watched(["-m", "llm2clip", "verify", str(sidecars), "--sources", "false"], log)
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in sidecars.glob(MANIFESTS)]
    seconds, units = map(sum, zip(*(run.cpu_per_unit for run in runs), strict=True))
    rows = sum(manifest["source"]["rows"] for manifest in manifests)
    if (len(manifests), rows) != (shards, shards * CAPTIONS_PER_TAR):
        raise RuntimeError(f"{len(manifests)} of {shards} shards with {rows:,} rows have embeddings.")
    # Between the first and the last shard of each run, without the start-up.
    ends = sorted(path.stat().st_mtime for path in sidecars.glob(MANIFESTS))
    spans = [[end for end in ends if run.start <= end <= run.end] for run in runs]
    span = sum(ends_of_run[-1] - ends_of_run[0] for ends_of_run in spans if ends_of_run)
    between = sum(len(ends_of_run) - 1 for ends_of_run in spans if ends_of_run) * CAPTIONS_PER_TAR
    return {
        "captions": captions,
        "processes": processes,
        "engine": engine,
        "kills": kills,
        "seconds": round(sum(run.end - run.start for run in runs), 1),
        "rows_per_second": round(between / span, 1) if span else nan,
        "cpu_microseconds_per_row": round(seconds / (units * CAPTIONS_PER_TAR) * 1e6, 1) if units else nan,
        "peak_bytes": max(max(run.peaks.values()) for run in runs),
        "distinct": sum(manifest["rows"] for manifest in manifests),
        "bytes": sum(path.stat().st_size for path in sidecars.iterdir()),
        "left_over": sorted(path.name for path in sidecars.iterdir() if path.suffix == ".tmp"),
        "verify_seconds": round(verified.end - verified.start, 1),
    }


def _source(folder: Path, captions: int) -> dict[str, Any]:
    return {"path": f"{folder}/data-{captions}/*.tar", "streaming": True, "caption_columns": ["txt"]}


def read(folder: Path, captions: int, processes: int = 2, workers: int = 0) -> dict[str, Any]:
    """Read the rows of stage 2 from tars and sidecars, from the start and from the middle; return what was measured.

    Args:
        processes: Number of processes.
        workers: DataLoader workers of each; 0 reads in the process itself.

    Raises:
        FileNotFoundError: There are no sidecars.
        RuntimeError: A process failed, or yielded a row twice.
    """
    sidecars, vision, log = folder / f"sidecars-{captions}", folder / "vision", folder / "read.log"
    if not sidecars.is_dir():
        raise FileNotFoundError(f"{sidecars} is missing: run the step embed with the same captions and --keep before.")
    if not vision.exists():
        write_vision_tower(vision)
    rows = -(-captions // CAPTIONS_PER_TAR) * CAPTIONS_PER_TAR
    settings = {
        "vision_model_name_or_path": str(vision),
        "text_model_name_or_path": str(folder / "tower"),
        "embedding_cache": str(sidecars),
        "sources": [_source(folder, captions)],
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": BATCH,
        "dataloader_num_workers": workers,
        "max_steps": rows // (BATCH * processes),
        "report_to": "none",
        "use_cpu": True,
    }
    (folder / "read.json").write_text(json.dumps(settings), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    watched = run_watched([*launcher, "-m", "benchmarks.scale", "--reader", "--folder", str(folder)], log)
    readers = [json.loads((folder / f"read-{rank}.json").read_text()) for rank in range(processes)]
    return {
        "captions": captions,
        "processes": processes,
        "workers": workers,
        "rows": sum(figures["rows"] for figures in readers),
        "rows_per_second": round(sum(figures["rows"] / figures["seconds"] for figures in readers), 1),
        "peak_bytes": max(watched.peaks.values()),
        "lanes": readers[0]["lanes"],
        "first_seconds": round(max(figures["first_seconds"] for figures in readers), 2),
        "resumed_at": readers[0]["resumed_at"],
        "resume_seconds": round(max(figures["resume_seconds"] for figures in readers), 2),
        "seconds": round(watched.end - watched.start, 1),
    }


def _reader(folder: Path) -> None:
    """Read training rows in one process of several, and write what was measured to `read-RANK.json`."""
    from llm2clip.command_line.processes import leave_process_group
    from llm2clip.command_line.settings import build_config
    from llm2clip.trainers.run_stage2 import build_trainer
    from llm2clip.trainers.stage2_config import Stage2Recipe

    config = build_config(Stage2Recipe, json.loads((folder / "read.json").read_text(encoding="utf-8")))
    trainer: Any = build_trainer(config)
    stream = trainer.train_dataset
    stream.batch_size, stream.start = BATCH, 0
    stream.lanes = lanes = stream.choose_lanes()
    number = min(ROWS_PER_READER, stream.num_rows // (2 * config.world_size)) // BATCH
    times, keys = [time.perf_counter()], set[str]()
    batches = iter(trainer.get_train_dataloader())
    for _ in range(number + 1):
        batch = next(batches)
        assert batch["llm_embeds"].shape[0] == BATCH
        keys |= set(batch["keys"])
        times.append(time.perf_counter())
    if len(keys) != (number + 1) * BATCH:
        raise RuntimeError(f"{len(keys)} rows were read in {(number + 1) * BATCH}.")
    middle = stream.num_rows // (2 * BATCH * config.world_size)
    stream.start, start = middle * lanes.batch, time.perf_counter()
    next(iter(trainer.get_train_dataloader()))
    figures = {"resume_seconds": time.perf_counter() - start, "resumed_at": middle, "lanes": lanes.number}
    figures |= {"first_seconds": times[1] - times[0], "rows": number * BATCH, "seconds": times[-1] - times[1]}
    (folder / f"read-{config.process_index}.json").write_text(json.dumps(figures), encoding="utf-8")
    leave_process_group()


# The title of the table of each step, and its columns with the figures that they show.
TABLES: dict[str, tuple[str, dict[str, str]]] = {
    "embed": (
        "`embed`, width 512",
        {
            "processes": "processes", "engine": "engine", "killed": "kills", "rows/s": "rows_per_second",
            "CPU per row": "cpu_microseconds_per_row", "whole run": "seconds", "largest process": "peak_bytes",
            "on disk": "bytes", "`verify`": "verify_seconds",
        },
    ),
    "read": (
        "stage 2 reads tars and sidecars",
        {
            "processes": "processes", "workers each": "workers", "rows/s": "rows_per_second",
            "largest process": "peak_bytes", "first batch": "first_seconds",
            "first batch when resumed in the middle": "resume_seconds", "lanes": "lanes",
        },
    ),
}  # fmt: skip
KEY = ("engine", "processes", "workers", "captions", "kills")


def _shown(name: str, value: Any) -> str:
    """Write a figure in the unit that its name has."""
    if name.endswith("bytes"):
        return f"{value / 1e9:.2f} GB"
    if name.endswith("seconds"):
        return f"{value:.1f} s" if value < 90 else f"{value / 60:.1f} min"
    if name.startswith("cpu_microseconds"):
        return f"{value:,.0f} µs"
    return f"{value:,.0f}" if isinstance(value, float) else str(value)


def tables(lines: Iterable[str]) -> str:
    """Return the tables of docs/scaling.md, in Markdown, of the newest run of each kind."""
    from llm2clip.command_line.tables import markdown_table

    runs = list(map(json.loads, filter(str.strip, lines)))
    parts = []
    for step, (title, columns) in TABLES.items():
        newest = {tuple(run.get(part, 0) for part in KEY): run for run in runs if run["step"] == step}
        if newest:
            ordered = [newest[key] for key in sorted(newest)]
            dates = sorted(run["date"] for run in ordered)
            days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
            machines = "; ".join(sorted({run["machine"] for run in ordered}))
            cells = [
                [f"{run['captions']:,}", *(_shown(name, run[name]) for name in columns.values())] for run in ordered
            ]
            parts.append(markdown_table([f"{title} ({machines}, {days}), rows", *columns], cells))
    return "\n\n".join(parts)


def fill(page: str, made: str) -> str:
    """Replace the measured tables of the page."""
    page, count = re.subn(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{made}\n\n{END}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{PAGE} has {count} places for the measured tables, not one.")
    return page


def main(arguments: list[str] | None = None) -> None:
    """Measure the steps, record what was measured, and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"what is measured: {', '.join(TABLES)}")
    parser.add_argument("--captions", type=int, default=100_000, help="captions; 10M need 36 GB of disk")
    parser.add_argument("--processes", type=int, default=2, help="processes, or actors of Ray")
    parser.add_argument("--engine", choices=("processes", "ray"), default="processes", help="embed")
    parser.add_argument("--workers", type=int, default=0, help="read: DataLoader workers of each process")
    parser.add_argument("--kills", type=int, default=0, help="embed: how often all processes are killed on the way")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where the data are, until the end")
    parser.add_argument("--keep", action="store_true", help="keep the data, for the next run")
    parser.add_argument("--record", type=Path, default=RECORD, help="another file for the figures; the page stays")
    parser.add_argument("--reader", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.reader:
        _reader(options.folder)
        return
    if unknown := set(options.steps) - set(TABLES):
        parser.error(f"there is no step {', '.join(sorted(unknown))}; choose from {', '.join(TABLES)}.")
    folder, captions = options.folder.absolute() / "llm2clip-scale", options.captions
    try:
        for step in options.steps:
            if step == "embed":
                figures = embed(folder, captions, options.processes, options.engine, options.kills)
            else:
                figures = read(folder, captions, options.processes, options.workers)
            print(json.dumps({"step": step, **figures}, indent=2), file=sys.stderr)
            origin = {"machine": results.machine("cpu"), "load": round(os.getloadavg()[1], 2)}
            origin |= {"date": datetime.date.today().isoformat(), "commit": results.commit()}
            with options.record.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **figures, **origin, "versions": versions_of(None)}) + "\n")
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if options.record == RECORD:
        made = tables(RECORD.read_text(encoding="utf-8").splitlines())
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()

"""The commands that run on several ranks, on small data whose rows and shards the ranks do not divide."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets

from llm2clip.store.store import SIDECAR_MANIFESTS
from tests.builders import small_runs, tiny
from tests.faults.commands import ATTACKED
from tests.faults.content import Content, content
from tests.faults.injection import preloaded
from tests.llm2clip.conftest import Inputs
from tests.llm2clip.evaluation.strange import write_strange
from tests.llm2clip.trainers.stages import TARS, embedded, source, write_tars
from tests.processes import run_python
from tests.processes.strike import Strike, with_strikes

OUT = "out"
STAGES = ("stage1", "mntp", "stage2", "stage2-stream")
EMBEDDINGS = ("cache", "sidecars", "evaluate")
NAMES = (*STAGES, *EMBEDDINGS)
STEPS = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 5, "disable_tqdm": True}
# Rows of maps, and the one of them with the damaged image.
ROWS, DAMAGED = 51, 40
LIBRARY = ["-m", "llm2clip"]


@dataclass
class Jobs:
    """The commands, each of which writes `OUT` in the folder that it is run in.

    Attributes:
        inputs: Models and captions, embedded.
        folder: An existing folder, for recipes, data and unbroken runs.
    """

    inputs: Inputs
    folder: Path
    _made: dict[tuple[str, int], Content] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tars = write_tars(self.folder / "tars")
        embedded(self.inputs, Path(), source(tars), output_dir="")
        write_strange(self.folder)
        tiny.save(self.folder / "model")
        self._write_damaged()
        for name, fields in self._recipes(tars).items():
            # Every JSON file is a YAML file.
            (self.folder / f"{name}.yaml").write_text(json.dumps(fields))

    def _recipes(self, tars: str) -> dict[str, dict[str, Any]]:
        stage1 = {**small_runs.stage1_fields(Path(OUT), self.inputs.llm), **STEPS}
        stage2 = small_runs.stage2_fields(Path(OUT), self.inputs.vision, self.inputs.text, self.inputs.cache)
        stage2 |= {**STEPS, "sources": [small_runs.concepts(max_samples=ROWS)]}
        stream = {"sources": [source(tars)], "embedding_cache": tars, "shuffle_block": 8, "eval_sources": {}}
        embed = {"text_model_name_or_path": self.inputs.text, "output_dir": OUT}
        glosses = {"path": small_runs.GLOSSES, "caption_columns": ["gloss"], "max_samples": 101}
        damaged = {"path": f"{self.folder}/damaged.parquet", "caption_columns": ["caption", "keywords"]}
        of_damaged = stage2 | {"sources": [damaged], "eval_sources": {}, "max_steps": 5}
        return {
            "stage2-damaged": of_damaged,
            # A batch of one rank has the damaged image alone.
            "stage2-skipped": of_damaged
            | {"on_error": "skip", "per_device_train_batch_size": 1, "max_steps": 60, "save_strategy": "no"},
            "frozen-damaged": of_damaged | {"freeze_vision": "all"},
            "stage1": stage1,
            "mntp": {**stage1, "sources": [glosses], "block_size": 32},
            "stage2": stage2,
            "stage2-stream": stage2 | stream,
            "cache": {**embed, "sources": [small_runs.concepts(max_samples=ROWS)], "shard_size": 7},
            "sidecars": {**embed, "sources": [source(tars)]},
        }

    def _write_damaged(self) -> None:
        """Write the rows of stage 2, of which one in the second half has a damaged image."""
        table = small_runs.rows_of_concepts(f":{ROWS}", "train")
        rows = table.cast_column("image", datasets.Image(decode=False)).to_list()
        rows[DAMAGED] |= {"image": {"bytes": b"no image", "path": None}, "key": "damaged-one"}
        datasets.Dataset.from_list(rows).to_parquet(self.folder / "damaged.parquet")

    def arguments(self, name: str) -> list[str]:
        """Return the arguments of `llm2clip`."""
        if name == "evaluate":
            paths = ["--benchmark", f"{self.folder}/strange.py", "--data", f"{self.folder}/benchmarks"]
            return ["evaluate", f"{self.folder}/model", *paths, "--output", OUT, "--num-workers", "0"]
        if name == "evaluate-damaged":
            options = ["--output", OUT, "--num-workers", "0"]
            return ["evaluate", f"{self.folder}/model", "--benchmark", f"{self.folder}/damaged.parquet", *options]
        command = "embed" if name in EMBEDDINGS else "stage2" if name.startswith("frozen") else name.partition("-")[0]
        return [command, f"{self.folder}/{name}.yaml"]

    def run(
        self,
        name: str,
        folder: Path,
        *strikes: Strike,
        options: list[str] | None = None,
        ranks: int = 2,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a folder, which is created."""
        folder.mkdir(exist_ok=True)
        arguments = [*(with_strikes(*strikes) if strikes else LIBRARY), *self.arguments(name), *(options or [])]
        return run_python(arguments, ranks, check, folder, 150, **self.environment)

    @cached_property
    def environment(self) -> dict[str, str]:
        """The environment of processes that run in folders of their own."""
        # The order of a set that is written to a file depends on the seed.
        return preloaded(self.folder, {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "0"})

    def is_whole(self, name: str, folder: Path) -> bool:
        """Whether a reader takes what a command has made in a folder for a whole result."""
        if name == "sidecars":
            return len(list((folder / OUT).glob(SIDECAR_MANIFESTS))) == TARS
        known = {"cache": "embed", "stage2-stream": "stage2"}
        return ATTACKED[known.get(name, name)].is_whole(folder / OUT)

    def unbroken(self, name: str, ranks: int = 2) -> Content:
        """Return what an unbroken run makes; see [`content`]."""
        if (name, ranks) not in self._made:
            folder = self.folder / f"{name}-{ranks}"
            self.run(name, folder, ranks=ranks)
            self._made[name, ranks] = content(folder / OUT)
        return self._made[name, ranks]

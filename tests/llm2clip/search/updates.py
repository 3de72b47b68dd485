"""Rows without a model, and updates of an index that are killed; this module is the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llm2clip.search.folder_items import BINARY, digest
from llm2clip.search.index_manifest import IndexManifest
from llm2clip.search.index_settings import IndexSettings
from llm2clip.search.lance_store import LanceStore
from llm2clip.search.search_index import SearchIndex
from llm2clip.search.store import ID, KEY, REASON, VECTOR, IndexStore
from tests.processes import run_python

# Ends itself when the model is to embed its third batch.
KILLED = """
import json, os, signal, sys
from llm2clip.encoders.ours import OurEncoder
from llm2clip.search.index import IndexConfig, run

forward, calls = OurEncoder.forward_images, []
def killed(self, inputs):
    calls.append(None)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, inputs)
OurEncoder.forward_images = killed
run(IndexConfig(num_workers=0, batch_size=4, part_size=4, **json.loads(sys.argv[1])))
"""


def run_until_killed(**settings: Any) -> None:
    """Run `llm2clip index` in a process that is killed when two parts of four images are stored."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = run_python(["-c", KILLED, json.dumps(settings)], check=False, **environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def new_rows(seed: int, count: int) -> pa.Table:
    """Generate rows with unit embeddings of width 64."""
    generator = np.random.default_rng(seed)
    keys = [f"{seed}-{number}" for number in range(count)]
    embeds = generator.standard_normal((count, 64), dtype=np.float32)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    return with_embeddings(pa.table({KEY: keys, ID: pa.array(map(digest, keys), BINARY)}), embeds)


def with_embeddings(rows: pa.Table, embeds: np.ndarray) -> pa.Table:
    """Add what a store adds to rows, with embeddings in 16 bits."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeds.astype(np.float16).reshape(-1)), embeds.shape[1])
    return rows.append_column(REASON, pa.nulls(len(rows), pa.string())).append_column(VECTOR, vectors)


def build(store: IndexStore, parts: Sequence[pa.Table], settings: IndexSettings) -> None:
    """Build an index of rows."""
    count, width = sum(map(len, parts)), parts[0].schema.field(VECTOR).type.list_size
    manifest = IndexManifest("model", None, "none", width, "float16", {"kind": "folder", "path": "none"}, {})
    with store.lock():
        store.begin(manifest, parts[0].schema, "nothing")
        for rows in parts:
            store.upsert(rows)
        manifest.images, manifest.index = count, settings.index_of(count, width, store.index_types)
        store.commit(manifest, [])


def update(place: str, seed: int) -> None:
    """Replace 500 rows of an index by 2,000 others, or go on with that."""
    store = LanceStore(place)
    with store.lock():
        complete = store.metadata()
        begun = store.metadata(unfinished=True)
        assert complete is not None
        store.begin(begun or complete, new_rows(0, 1).schema, "unfinished" if begun else "commit")
        print("ready", flush=True)
        store.delete(next(store.keys([KEY], written=True))["_rowid"].to_numpy()[:500])
        for number in range(4):
            store.upsert(new_rows(seed + number, 500))
        complete.images = sum(map(len, store.keys([KEY], written=True)))
        store.commit(complete, [])


def kill_updates(place: Path | str, delays: Sequence[float]) -> int:
    """Build an index of 8,000 rows, and kill updates of it after some seconds; return how many did not complete.

    Then complete one. After each, searches find the rows of one complete update.
    """
    build(LanceStore(place), [new_rows(seed, 1000) for seed in range(8)], IndexSettings("ivf_rq"))
    queries = np.array(new_rows(3, 20)[VECTOR].to_pylist(), dtype=np.float32)
    reader, killed = SearchIndex.open(place), 0
    expected = reader.search(queries, 10)
    command = [sys.executable, "-m", "tests.llm2clip.search.updates", str(place)]
    for turn, delay in enumerate(delays):
        with subprocess.Popen([*command, str(100 + 10 * turn)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
        assert reader.search(queries, 10) == expected
        opened = SearchIndex.open(place)
        if len(opened) != 8000:
            break
        killed += 1
        assert opened.search(queries, 10) == expected
    subprocess.run([*command, "900"], check=True, stdout=subprocess.PIPE)
    found = SearchIndex.open(place).search(np.array(new_rows(900, 5)[VECTOR].to_pylist(), np.float32), 1)
    assert [results[0].key for results in found] == [f"900-{number}" for number in range(5)]
    assert reader.search(queries, 10) == expected
    return killed


if __name__ == "__main__":
    update(sys.argv[1], int(sys.argv[2]))

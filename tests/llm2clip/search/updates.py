"""Tables of rows without a model, and updates that are killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from llm2clip.search.folder_items import BINARY, digest
from llm2clip.search.index_manifest import IndexManifest
from llm2clip.search.index_settings import IndexSettings
from llm2clip.search.store import DIGEST, KEY, VECTOR, IndexStore
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
run(IndexConfig(num_workers=0, batch_size=4, shard_size=4, **json.loads(sys.argv[1])))
"""


def run_until_killed(**settings: Any) -> None:
    """Run `llm2clip index` in a process that is killed when two shards of four images are stored."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = run_python(["-c", KILLED, json.dumps(settings)], check=False, **environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def new_rows(seed: int, count: int) -> pa.Table:
    """Generate rows with unit embeddings of width 64."""
    generator = np.random.default_rng(seed)
    keys = [f"{seed}-{number}" for number in range(count)]
    embeds = generator.standard_normal((count, 64), dtype=np.float32)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    return with_embeddings(pa.table({KEY: keys, DIGEST: pa.array(map(digest, keys), BINARY)}), embeds)


def with_embeddings(rows: pa.Table, embeds: np.ndarray) -> pa.Table:
    """Add embeddings in 16 bits to rows."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeds.astype(np.float16).reshape(-1)), embeds.shape[1])
    return rows.append_column(VECTOR, vectors)


def build(store: IndexStore, parts: Sequence[pa.Table], settings: IndexSettings) -> None:
    """Write a table of rows."""
    rows = pa.concat_tables(parts)
    width = rows.schema.field(VECTOR).type.list_size
    manifest = IndexManifest("model", None, "none", width, "float16", {"kind": "folder", "path": "none"}, {})
    manifest.images, manifest.index = len(rows), settings.index_of(len(rows), width, store.index_types)
    store.replace(manifest, rows.schema, iter(rows.to_batches()))

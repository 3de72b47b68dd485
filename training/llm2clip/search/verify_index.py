"""Verification of an index in a folder: whether its table has the rows that its list and its embeddings make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from llm2clip.files.manifests import Fault, Verified
from llm2clip.search.index_manifest import REBUILD, REPAIR
from llm2clip.search.lance_store import MANIFEST, LanceStore
from llm2clip.search.listing import Listing, store_keys
from llm2clip.search.store import DIGEST, KEY, VECTOR
from llm2clip.store import Store


def verify_index(folder: Path) -> Verified:
    """Compare the rows of the table with the list of rows and the stored embeddings.

    The checksums of the embeddings and of the files of the table are compared as those of any store and folder.

    Raises:
        ImportError: LanceDB is not installed.
    """
    verified, store = Verified(), LanceStore(folder)
    try:
        manifest = store.open()
        if manifest is None:
            raise FileNotFoundError(f"the index {folder} has no {MANIFEST}: it is lost, or its first run was stopped")
        listing, rows = Listing(folder / manifest.listing), Store.open(folder / manifest.rows, verify=False)
        skipped = [row for row, *_ in rows.manifest.skipped]
        numbers = np.flatnonzero(~np.isin(rows.find(listing.keys), skipped))
        for batch in store.keys([KEY, DIGEST, VECTOR]):
            start = verified.counts["num_indexed"]
            expected = listing.take(numbers[start : start + len(batch)])
            verified.counts["num_indexed"] += len(batch)
            embeds = rows.read(rows.find(store_keys(batch[DIGEST]))).numpy().reshape(-1)
            found = pa.Table.from_batches([batch])
            is_same = len(expected) == len(batch) and np.array_equal(batch[VECTOR].flatten().to_numpy(), embeds)
            if not is_same or any(found[name] != expected[name] for name in (KEY, DIGEST)):
                verified.faults.append(Fault(f"the table of the index {folder} does not fit its list of rows", REPAIR))
                break
        if not verified.faults and verified.counts["num_indexed"] != len(numbers):
            verified.faults.append(Fault(f"the table of the index {folder} lacks rows of its list", REPAIR))
    except (OSError, KeyError, ValueError) as error:
        if ".lance/" not in str(error):  # what the list of the table's files says already
            fix = REBUILD if REBUILD in str(error) else REPAIR
            verified.faults.append(Fault(str(error).partition("; ")[0], fix))
    return verified

"""Verification of an index in a folder: its files, and its rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llm2clip.files.manifests import Fault, Verified, listed_files
from llm2clip.search.lance_store import LanceStore
from llm2clip.search.store import VECTOR

# By how much the length of an embedding may differ from 1, as it is rounded to 16 bits.
TOLERANCE = 1e-2


def verify_index(folder: Path) -> Verified:
    """Compare the files of an index with their checksums, and read all rows of the version that its manifest names.

    Raises:
        ImportError: LanceDB is not installed.
    """
    fix = f"build it again: llm2clip index IMAGES --model MODEL --output-dir {folder} --overwrite"
    store = LanceStore(folder)
    verified = Verified()
    try:
        listed = listed_files(folder)
        if not any(file.checksum for file in listed.values()):
            verified.remarks.append(f"{folder} has no checksums of its files, since it was written at a URL.")
        verified.faults = [Fault(f"{folder / fault}", fix) for fault in store.faults()]
        verified.counts["num_files"] = len(listed)
        if verified.faults:
            # LanceDB may panic over a damaged table, or wait for ever.
            return verified
        manifest = store.metadata()
        if manifest is None:
            raise FileNotFoundError(f"the index {folder} is not finished")
        for batch in store.keys([VECTOR]):
            embeds = batch[VECTOR].flatten().to_numpy().astype(np.float32).reshape(len(batch), manifest.width)
            lengths = np.linalg.norm(embeds, axis=1)
            verified.counts["num_images"] += len(batch)
            if bad := int((~(np.abs(lengths - 1) <= TOLERANCE)).sum()):
                verified.faults.append(Fault(f"{bad} embeddings of the index {folder} are no unit vectors", fix))
                break
    except (FileNotFoundError, ValueError) as error:
        verified.faults.append(Fault(str(error), fix))
    return verified

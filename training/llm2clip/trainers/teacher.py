"""The teacher of a distillation: what is known of it, and its rows of texts and images, each computed once."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.encoders import Encoder, OurEncoder, load_encoder
from llm2clip.encoders.batches import ContentSet
from llm2clip.store import Store, StoreManifest, build_store
from llm2clip.store.building import ComputedRows, StoreBuild, check_rows
from llm2clip.store.manifest import StoredDtype, StoreError
from llm2clip.store.store import caption_keys
from llm2clip.utils.files import read_json, write_json
from llm2clip.utils.processes import on_main_process, process_state
from llm2clip.utils.repos import hub_ids, local_folders
from modeling_llm2clip.query_encoder_llm2clip import space_identity

logger = logging.getLogger(__name__)

FACTS = "teacher.json"
# Moves the progress bar on by a number of rows.
Advance = Callable[[int], Any]
# Rows between two writes.
SHARD_SIZE = 8192
# Texts that are sorted by length together.
TEXTS = 1024


class Teacher:
    """An encoder of texts, and perhaps of images, that is only loaded when a row of it is missing.

    What is known of it is stored beside its rows. It counts as long as the teacher's files are the same, and where the
    teacher is no longer here.

    Args:
        name, revision, dtype: See [`load_encoder`](llm2clip.encoders.load_encoder).
        folder: Folder of the stored rows.

    Attributes:
        name: How the user named it.
        width: Width of its space.
        fingerprint: Identity of all that its rows of texts depend on.
        space: Identity of its space: of an LLM2CLIP model, its [`space_identity`].
    """

    def __init__(self, name: str, folder: str | Path, revision: str | None = None, dtype: str = "float32") -> None:
        self.name, self.folder, self.revision, self.dtype = name, Path(folder), revision, dtype
        self._facts = on_main_process(self._read_facts)
        self.width: int = self._facts["width"]
        self.fingerprint: str = self._facts["text"]
        self.space: str = self._facts["space"]

    @cached_property
    def encoder(self) -> Encoder:
        """The loaded teacher."""
        return load_encoder(self.name, self.revision, self.dtype)

    def _read_facts(self) -> dict[str, Any]:
        path, given = self.folder / FACTS, [self.name, self.revision, self.dtype]
        files = _states(self.name)
        known = read_json(path) if path.is_file() else {}
        if known.get("teacher") == given and (not files or known["files"] == files):
            logger.info("Reading the rows of the teacher %s in %s.", self.name, self.folder)
            return known
        encoder = self.encoder
        joint = isinstance(encoder, OurEncoder) and encoder.is_joint
        facts = {
            "teacher": given,
            "files": files,
            "width": encoder.width,
            "text": encoder.text_fingerprint(),
            "images": None if isinstance(encoder, OurEncoder) and not joint else encoder.image_fingerprint(),
            "space": space_identity(encoder.model) if joint else encoder.fingerprint(),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, facts)
        return facts

    def texts(self, texts: Sequence[str], dtype: StoredDtype = "float16") -> Store:
        """Return a store that has its rows of texts, of which those that are missing are computed.

        Raises:
            StoreMismatchError: The rows in the folder are those of another teacher.
            NonFiniteError: A row is NaN or infinite; the message names its text.
        """

        def compute(rows: Sequence[int], advance: Advance) -> Tensor:
            parts = []
            for start in range(0, len(rows), TEXTS):
                part = [texts[row] for row in rows[start : start + TEXTS]]
                parts.append(check_rows(self.encoder.encode_text(part), dtype, part.__getitem__))
                advance(len(part))
            return torch.cat(parts)

        return self._build("texts" if dtype == "float16" else "queries", caption_keys(texts), dtype, compute)

    def images(self, images: ContentSet) -> Tensor:
        """Return its rows of images: unit rows, float32 `(images, width)`.

        Raises:
            DamagedImageError: An image cannot be decoded.
        """

        def compute(rows: Sequence[int], advance: Advance) -> Tensor:
            parts = []
            for part in self.encoder.encode_image_parts(images, rows, part_size=64):
                parts.append(part.embeds)
                advance(len(part.rows))
            return torch.cat(parts)

        keys = images.content_keys()
        store = self._build("images", keys, "float32", compute)
        return store.read(store.find(keys))

    def _build(
        self,
        kind: str,
        keys: np.ndarray,
        dtype: StoredDtype,
        compute: Callable[[Sequence[int], Advance], Tensor],
    ) -> Store:
        first = np.sort(np.unique(keys, axis=0, return_index=True)[1])
        state = process_state()
        fingerprint = self._facts["images"] if kind == "images" else self.fingerprint
        made_by = {"fingerprint": fingerprint, "model_dtype": self.dtype}
        folder = self.folder / kind
        manifest = StoreManifest(kind="teacher", encoder=self.name, identity=made_by, width=self.width, dtype=dtype)
        with contextlib.suppress(OSError, StoreError):
            known = Store.open(folder)
            if known.manifest.difference(manifest) is None and (known.find(keys) >= 0).all():
                return known
        build: StoreBuild[Store]
        with build_store(
            folder,
            keys[first],
            manifest,
            title="Images of the teacher" if kind == "images" else "Texts of the teacher",
            shard_size=min(SHARD_SIZE, max(1, math.ceil(len(first) / state.num_processes))),
            wait_for_others=True,
            rank=state.process_index,
            world_size=state.num_processes,
            barrier=state.wait_for_everyone,
        ) as build:
            for number, positions in build:
                rows = compute(first[positions].tolist(), build.bar.update)
                build.write(number, positions, ComputedRows(rows))
        return build.store


def _states(name: str) -> list[list[Any]]:
    """Describe the files of a model that are here, by name, size and time; none if it is not."""
    script = Path(name.rpartition(":")[0])
    folders = local_folders(name) if Path(name).is_dir() or hub_ids(name) else []
    paths = [path for folder in folders for path in sorted(folder.iterdir())]
    files = [path for path in paths if path.suffix in (".safetensors", ".json")]
    files += [script] if script.suffix == ".py" and script.is_file() else []
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]

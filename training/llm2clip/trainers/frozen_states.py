"""Outputs of the frozen layers of a vision tower, computed once per data set and stored on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from functools import partial
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.utils.data import Subset

from llm2clip.data import CaptionImageDataset, SampleIndex, SkippedSample
from llm2clip.data.image_keys import images_state
from llm2clip.data.sampling import EpochDataset
from llm2clip.data.shared_files import table_identity
from llm2clip.embedding.image_batches import forward_images
from llm2clip.trainers.frozen_layers import FrozenLayers
from llm2clip.utils.files import (
    MappedFile,
    allocate,
    digest_json,
    naming,
    read_json,
    remove_unfinished,
    replace,
    write_json,
)
from llm2clip.utils.locks import folder_lock
from llm2clip.utils.manifests import is_intact, sealed
from llm2clip.utils.processes import on_main_process, process_state

logger = logging.getLogger(__name__)

FORMAT = "llm2clip-frozen-states"
MANIFEST = "manifest.json"
STATES = "states.npy"
# Fields of a tower's config that say where it is from and how it trains, not what it computes in evaluation.
NOT_COMPUTED = ("_name_or_path", "transformers_version", "patch_dropout", "initializer_range")
# Seconds to wait for another run that computes the same states: a week, or 20 minutes with several processes, of which
# the others wait in a collective operation, which ends after 30 minutes by default.
PATIENCE, PATIENCE_OF_SEVERAL = 7 * 24 * 3600.0, 20 * 60.0
# Rows that are hashed at once.
ROWS_AT_ONCE = 64


class FrozenStatesDataset(EpochDataset):
    """Captioned images whose pixels are replaced by the outputs of the frozen layers.

    These states are computed on first use, by all processes together, and stored in float16 in `folder`, in one
    subfolder per combination of frozen weights, data and preprocessing, which later runs reuse. Runs that need the
    same states at the same time wait for the one that computes them.

    Args:
        captions: The data set without images, which draws the captions.
        images: Evaluation samples of the same data set in the same order, prepared by `image_processor`.
        batch_size: Images per forward pass.
        num_workers: Worker processes that read images.

    Raises:
        OSError: There is no space for the states.
        ValueError: No image can be read, the states exceed float16, or the tower uses patch dropout, which is
            impossible with stored states.
    """

    def __init__(
        self,
        captions: CaptionImageDataset,
        images: CaptionImageDataset,
        frozen: FrozenLayers,
        image_processor: Any,
        folder: str | Path,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        if getattr(frozen.tower.config, "patch_dropout", 0):
            raise ValueError("patch_dropout does not work with frozen_states_dir; set it to 0.")
        self.captions, self._images = captions, images
        state = process_state()
        # The first process decides for all, which may see the folder at different times.
        found: list[Any] = [None, None]
        with contextlib.ExitStack() as lock:
            if state.is_main_process:
                digest = digest_json(_identity(images, frozen, image_processor))
                if not (Path(folder) / digest / MANIFEST).exists():
                    patience = PATIENCE_OF_SEVERAL if state.num_processes > 1 else PATIENCE
                    lock.enter_context(folder_lock(Path(folder) / f".{digest}", patience))
                # Another run may have finished them meanwhile.
                exists = (Path(folder) / digest / MANIFEST).exists()
                found = [digest, exists]
            digest, exists = broadcast_object_list(found)
            self.folder, unfinished = Path(folder) / digest, Path(folder) / f".{digest}"
            if exists:
                logger.info("reusing the outputs of the frozen layers in %s.", self.folder)
            else:
                self._build(images, frozen, batch_size, num_workers, unfinished / STATES)
        manifest, self.states = open_states(self.folder)
        self.skipped: dict[int, tuple[str, str]] = {row: (key, reason) for row, key, reason in manifest["skipped"]}
        self._file = MappedFile(self.folder / STATES)

    def _build(
        self, images: CaptionImageDataset, frozen: FrozenLayers, batch_size: int, num_workers: int, unfinished: Path
    ) -> None:
        """Compute the states in the file `unfinished` and move it into the folder when it is complete."""
        state = process_state()
        on_main_process(partial(_create, unfinished, (len(images), *frozen.state_shape)))
        states = np.lib.format.open_memmap(unfinished, mode="r+")
        start, stop = (len(images) * (state.process_index + i) // state.num_processes for i in (0, 1))
        frozen.tower.eval()
        device, digest = next(frozen.tower.parameters()).device, hashlib.sha256()

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            output = frozen.compute(inputs["pixel_values"].to(device)).half()
            if not output.isfinite().all():
                raise ValueError("the outputs of the frozen layers exceed float16; unset frozen_states_dir.")
            return output.cpu()

        part, title, skipped = Subset(images, range(start, stop)), "Computing frozen vision layers", []
        for batch in forward_images(part, forward, batch_size, num_workers, title, state.is_main_process):
            first = start + batch.start
            skipped += [(row, *sample) for row, sample in enumerate(batch.skipped, first) if sample is not None]
            if batch.output is not None:
                states[[first + index for index in batch.good]] = batch.output.numpy()
            digest.update(states[first : first + len(batch.skipped)].data)
        states.flush()
        skipped, parts = gather_object(skipped), gather_object([[start, stop, digest.hexdigest()]])
        if len(skipped) == len(images):
            raise ValueError(f"none of the {len(images)} images can be read.")
        if state.is_main_process:
            self.folder.mkdir(exist_ok=True)
            remove_unfinished(self.folder)
            replace(unfinished, self.folder / STATES)
            # Written last: states without a manifest are incomplete.
            header = _header(self.folder / STATES, states.offset)
            fields = {"format": FORMAT, "shape": states.shape, "header": header, "skipped": skipped, "parts": parts}
            write_json(self.folder / MANIFEST, sealed(json.loads(json.dumps(fields))))
        state.wait_for_everyone()

    @property
    def starts(self) -> np.ndarray:
        """See [`ConcatenatedTables`]."""
        return self.captions.starts

    def content_digest(self) -> str:
        return self._images.content_digest()

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: SampleIndex) -> dict[str, Any] | SkippedSample:
        if index.index in self.skipped:
            return SkippedSample(*self.skipped[index.index])
        sample = self.captions[index]
        if isinstance(sample, dict):
            if self._file.is_cut():
                raise ValueError(f"{self._file.path} was cut short while it was open; delete its folder.")
            sample["vision_states"] = torch.from_numpy(np.array(self.states[index.index]))
        return sample


def _create(path: Path, shape: tuple[int, ...]) -> None:
    with naming(path):
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    # The file is sparse until then, and a full disk would end the process at a write into the mapping.
    allocate(path, path.stat().st_size)


def open_states(folder: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Open stored states, mapped into memory.

    Returns:
        Their manifest, and (images, ...) float16. `parts` of the manifest has the first row of each process, the row
        after its last one, and the SHA-256 of the bytes of its rows.

    Raises:
        ValueError: A file is damaged; see [`changed_parts`] for what is not read here.
    """
    path, again = folder / STATES, f"delete {folder}; the next run computes the states again."
    try:
        manifest = read_json(folder / MANIFEST)
        if not is_intact(manifest):
            raise ValueError(f"{folder / MANIFEST} has changed")
        _require_form(manifest)
        offset, content = manifest["header"]
        # Not from the header, which numpy reads as Python.
        states = np.memmap(path, np.float16, "r", offset, tuple(manifest["shape"]))
        if path.stat().st_size != offset + states.nbytes or _header(path, offset) != [offset, content]:
            raise ValueError("its size or its header is not that of the manifest")
    except (OSError, ValueError, TypeError, KeyError, OverflowError, SyntaxError, TokenError) as error:
        raise ValueError(f"{path} is damaged ({error}); {again}") from error
    return manifest, states


def _require_form(manifest: dict[str, Any]) -> None:
    """Raise an error unless the lists of a manifest have entries of the right types."""
    forms = {"skipped": (int, str, str), "parts": (int, int, str)}
    for name, form in forms.items():
        for entry in manifest[name]:
            if len(entry) != len(form) or not all(map(isinstance, entry, form)):
                raise ValueError(f"its {name} has the entry {entry!r:.80}")


def _header(path: Path, offset: int) -> list[Any]:
    """Return the size of the header of a numpy file, and its SHA-256."""
    with path.open("rb") as file:
        return [offset, hashlib.sha256(file.read(offset)).hexdigest()]


def changed_parts(manifest: dict[str, Any], states: np.ndarray) -> list[tuple[int, int]]:
    """Read stored states and return the parts, first row and the one after the last, that are not what was written."""
    return [(start, stop) for start, stop, checksum in manifest["parts"] if _checksum(states[start:stop]) != checksum]


def _checksum(rows: np.ndarray) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(rows), ROWS_AT_ONCE):
        digest.update(rows[start : start + ROWS_AT_ONCE].data)
    return digest.hexdigest()


def _identity(images: CaptionImageDataset, frozen: FrozenLayers, image_processor: Any) -> dict[str, Any]:
    """Everything that the states and the list of skipped images depend on, as JSON values."""
    sample = images.make_sample
    tower: Any = frozen.tower
    config = tower.config.to_dict()
    identity = {
        "layers": frozen.num_layers,
        "weights": frozen.fingerprint(),
        "tower": {key: value for key, value in config.items() if key not in NOT_COMPUTED},
        "state_shape": frozen.state_shape,
        "data": [table_identity(table) for table in images.tables],
        "images": [
            images_state(table, str(columns.image))
            for table, columns in zip(images.tables, images.columns, strict=True)
        ],
        "columns": [columns._asdict() for columns in images.columns],
        "image_processor": image_processor.to_dict(),
        "image_backend": sample.eval_transform.backend if sample.eval_transform is not None else None,
        "on_error": sample.on_error,
        "max_pixels": sample.max_pixels,
    }
    return json.loads(json.dumps(identity, default=str))

"""Read the tensors of a checkpoint in any file format, without running code from pickle files."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm2clip.files.atomic import read_json
from llm2clip.files.library_errors import wrap_read_errors
from llm2clip.models.repos import is_hub_id

Shapes = Mapping[str, tuple[int, ...]]
# Keys under which training code stores the weights in a checkpoint.
STATE_KEYS = ("module", "state_dict", "model", "model_state_dict")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
LFS_POINTER = b"version https://git-lfs"
HUB_FILES = ["*.json", "*.pt", "*.safetensors", "*.bin", "*.model", "*.txt", "README.md", "LICENSE*"]


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a file or folder by name; each tensor of a safetensors file is read when it is accessed.

    Attributes:
        path: The file, or the folder of several files.
        folder: The folder with config, tokenizer and model card, if there is one.
        config: The fields of the folder's config.json; empty if there is none.
        files: The files that contain the tensors.
        origin: The file of each tensor.
        shapes: The shape of each tensor.
    """

    def __init__(self, path: Path, folder: Path | None, files: list[Path]) -> None:
        self.path = path
        self.folder = folder
        config = folder / "config.json" if folder else None
        self.config: dict[str, Any] = read_json(config) if config and config.is_file() else {}
        self.files = files
        self.origin: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._loaded: dict[str, Tensor] = {}
        for file in files:
            if file.suffix == ".safetensors":
                shapes = _safetensors_shapes(file)
            else:
                state = _read_pickle(file)
                self._loaded.update(state)
                shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            self.shapes.update(shapes)
            self.origin.update(dict.fromkeys(shapes, file))
        if not self.shapes:
            raise ValueError(f"{path} contains no tensors.")

    def __getitem__(self, name: str) -> Tensor:
        if name in self._loaded:
            return self._loaded[name]
        with safe_open(self.origin[name], framework="pt") as file:
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.origin

    def __iter__(self) -> Iterator[str]:
        return iter(self.origin)

    def __len__(self) -> int:
        return len(self.origin)


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint.

    Args:
        source: A file, a folder, or a Hub id, which is downloaded. In a folder a `.pt` file is preferred: only that
            file contains the adapter in the EVA02 repos of Microsoft.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: A file is damaged, or contains more than tensors.
    """
    path = Path(source)
    if path.is_file():
        return Checkpoint(path, path.parent if (path.parent / "config.json").is_file() else None, [path])
    if not path.is_dir():
        if not is_hub_id(str(source)):
            raise FileNotFoundError(f"{source} is not a file, a folder or a Hub id (OWNER/NAME).")
        path = Path(snapshot_download(str(source), allow_patterns=HUB_FILES))
    pickles = sorted(path.glob("*.pt"))
    if len(pickles) > 1:
        names = ", ".join(file.name for file in pickles)
        raise ValueError(f"{source} contains several .pt files ({names}); give one of them.")
    if pickles:
        return Checkpoint(pickles[0], path, pickles)
    for name in INDEX_FILES:
        if (path / name).is_file():
            with wrap_read_errors(path / name):
                files = sorted(set(read_json(path / name).get("weight_map", {}).values()))
            missing = [file for file in files if not (path / file).is_file()]
            if missing or not files:
                listed = ", ".join(missing) or "it lists none"
                raise ValueError(f"shards listed in {path / name} are missing: {listed}.")
            return Checkpoint(path, path, [path / file for file in files])
    for name in SINGLE_FILES:
        if (path / name).is_file():
            return Checkpoint(path / name, path, [path / name])
    raise FileNotFoundError(
        f"{source} contains no weights: no .pt file, {', '.join(SINGLE_FILES)} or index of shards."
    )


def compare_tensors(recognized: str, expected: Shapes, actual: Shapes, new: tuple[str, ...] = ()) -> None:
    """Compare the shapes of tensors, by name, with those of the model that they are for.

    Args:
        recognized: What the checkpoint was recognized as, for messages.
        expected: Shapes in the model.
        actual: Shapes of the tensors.
        new: Beginnings of the names of tensors that may be missing.

    Raises:
        ValueError: Tensors are missing, do not belong to the model, or have other shapes.
    """
    absent = [name for name in expected if name not in actual and not name.startswith(new)]
    missing = [f"{name} {expected[name]}" for name in absent]
    unknown = [f"{name} {shape}" for name, shape in actual.items() if name not in expected]
    both = [(name, shape) for name, shape in actual.items() if name in expected]
    wrong = [f"{name} is {shape}, not {expected[name]}" for name, shape in both if shape != expected[name]]
    for names, problem, cause in (
        (missing, "are missing", "The checkpoint is incomplete."),
        (unknown, "do not belong to it", "It is another model, or from modified code."),
        (wrong, "have shapes that differ from its config", "The weights, or the config, are of another model."),
    ):
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ValueError(f"recognized as {recognized}, but {len(names)} tensors {problem}: {shown}. {cause}")


def is_torch_file(path: Path) -> bool:
    """Tell whether a file is one that `torch.save` writes, by the names in its archive."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/data.pkl") for name in archive.namelist())


def _safetensors_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); download it again.") from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    with file.open("rb") as start:
        if start.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{file} is a Git LFS pointer instead of the file; run: git lfs pull")
    try:
        # Memory-mapped, so that optimizer states in the file use no memory.
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch raises whatever broken bytes lead to, KeyError and AttributeError too
        reason = f"it is damaged, or of another format ({(str(error).splitlines() or [type(error).__name__])[0]})"
        advice = "download it again"
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            reason = "it contains more than tensors, and reading it would run code from the file"
            advice = "save only its state_dict, on a machine where you trust the file"
        raise ValueError(f"{file} is not a checkpoint that can be read safely: {reason}; {advice}.") from error
    while isinstance(content, dict) and any(isinstance(content.get(key), dict) for key in STATE_KEYS):
        content = next(content[key] for key in STATE_KEYS if isinstance(content.get(key), dict))
    if not isinstance(content, dict):
        raise ValueError(f"{file} contains a {type(content).__name__} instead of a state dict.")
    # DistributedDataParallel adds `module.` to every name.
    state = {str(name).removeprefix("module."): value for name, value in content.items()}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}

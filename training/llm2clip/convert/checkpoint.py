"""Reading a checkpoint's tensors, whatever file holds them, without running code that a pickle may carry."""

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

from llm2clip.utils.files import read_json

# Where training code puts the weights inside a file of more.
STATE_KEYS = ("module", "state_dict", "model", "model_state_dict")
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
LFS_POINTER = b"version https://git-lfs"
HUB_FILES = ["*.json", "*.pt", "*.safetensors", "*.bin", "*.model", "*.txt", "README.md", "LICENSE*"]


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a file or folder by name; a safetensors file is read tensor by tensor, as they are asked for.

    Attributes:
        path: The file that was read, or the folder of several.
        folder: The folder with its config, tokenizer and model card, where there is one.
        config: The folder's config.json; empty where there is none.
    """

    def __init__(self, path: Path, folder: Path | None, files: list[Path]) -> None:
        self.path = path
        self.folder = folder
        config = folder / "config.json" if folder else None
        self.config: dict[str, Any] = read_json(config) if config and config.is_file() else {}
        self.files = files
        self._origin: dict[str, Path] = {}
        self._loaded: dict[str, Tensor] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            if file.suffix == ".safetensors":
                shapes = _safetensors_shapes(file)
            else:
                state = _read_pickle(file)
                self._loaded.update(state)
                shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            self.shapes.update(shapes)
            self._origin.update(dict.fromkeys(shapes, file))
        if not self.shapes:
            raise ValueError(f"{path} holds no tensors.")

    def origin(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._origin[name]

    def __getitem__(self, name: str) -> Tensor:
        if name in self._loaded:
            return self._loaded[name]
        with safe_open(self._origin[name], framework="pt") as file:
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._origin

    def __iter__(self) -> Iterator[str]:
        return iter(self._origin)

    def __len__(self) -> int:
        return len(self._origin)


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a checkpoint.

    Args:
        source: A file; a folder, where a `.pt` file is preferred (of Microsoft's EVA02 repos only that one holds the
            adapter); or a Hub id, which is downloaded.

    Raises:
        FileNotFoundError: There is nothing to read.
        ValueError: A file is damaged, or holds something else than tensors.
    """
    path = Path(source)
    if path.is_file():
        return Checkpoint(path, path.parent if (path.parent / "config.json").is_file() else None, [path])
    if not path.is_dir():
        if str(source).count("/") != 1 or str(source).startswith((".", "/")):
            raise FileNotFoundError(f"{source} is neither a file, nor a folder, nor a Hub id (owner/name).")
        path = Path(snapshot_download(str(source), allow_patterns=HUB_FILES))
    pickles = sorted(path.glob("*.pt"))
    if len(pickles) > 1:
        raise ValueError(f"{source} holds several .pt files ({', '.join(p.name for p in pickles)}); name one.")
    if pickles:
        return Checkpoint(pickles[0], path, pickles)
    for name in INDEX_FILES:
        if (path / name).is_file():
            files = sorted(set(read_json(path / name).get("weight_map", {}).values()))
            missing = [file for file in files if not (path / file).is_file()]
            if missing or not files:
                listed = ", ".join(missing) or "it names none at all"
                raise ValueError(f"files that {path / name} names are not there: {listed}.")
            return Checkpoint(path, path, [path / file for file in files])
    for name in SINGLE_FILES:
        if (path / name).is_file():
            return Checkpoint(path / name, path, [path / name])
    raise FileNotFoundError(f"{source} holds no weights: no .pt, {', '.join(SINGLE_FILES)} or index of shards.")


def _safetensors_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or truncated ({error}); get it again.") from error


def _read_pickle(file: Path) -> dict[str, Tensor]:
    with file.open("rb") as start:
        if start.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{file} is a Git LFS pointer and not the file itself; run: git lfs pull")
    try:
        # Memory-mapped, so that a file with the optimiser's states beside the weights costs no memory for them.
        mapped = zipfile.is_zipfile(file)
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():
            raise ValueError(
                f"{file} holds more than tensors: reading it would run code from the file, which is refused. Save its "
                "state_dict alone, on a machine where you trust it."
            ) from error
        raise ValueError(f"{file} is no checkpoint of torch, or it is damaged; get it again.") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged or truncated ({str(error).splitlines()[0]}); get it again.") from error
    while isinstance(content, dict):
        inner = next((content[key] for key in STATE_KEYS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__} where a state dict was expected.")
    # DistributedDataParallel puts `module.` before every name.
    state = {str(name).removeprefix("module."): value for name, value in content.items()}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}

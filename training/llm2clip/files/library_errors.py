"""Errors of libraries that are nobody's bug: a damaged file, a full disk or memory, a process that has died."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

# What the processes of a run see when another one has died: gloo, NCCL and the store of torchrun.
PEER = re.compile(
    r"connection (closed|reset) by peer|broken pipe|socket timeout|remote process exited|"
    r"failed to (recv|send)|connection was likely closed|watchdog",
    re.IGNORECASE,
)
PEER_ENDED = "another process of this run has ended; its own message says why"
WORKER_ENDED = (
    "a process that reads data has ended, most often because the memory is full: lower dataloader_num_workers "
    "(num_workers), or, where it says so, give /dev/shm more space"
)
OUT_OF_MEMORY = (
    "the memory of the accelerator is full: lower the batch size, or set tower_chunk_size or activation_checkpointing"
)
# How libraries in Rust word an error of the system.
SYSTEM = re.compile(r"[A-Z][\w /-]+ \(os error \d+\)")
# Errors of writing to an open file, which say nothing of which.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# Errors of torch.save: it cannot open or write its file.
TORCH_WRITES = re.compile(r"PytorchStreamWriter|inline_container|cannot be opened|iostream error")


def explain(error: BaseException) -> str | None:
    """Say in one line what an error of a library is about and what to do; None if it may be a bug."""
    text = str(error)
    if isinstance(error, SafetensorError):
        return text
    if isinstance(error, MemoryError):
        return "the memory of the machine is full."
    if type(error).__name__ == "OutOfMemoryError":  # of torch
        return f"{OUT_OF_MEMORY}. ({text.splitlines()[0]})"
    # The first error of the worker's end is the context of the last one, or it is one of the connection to it.
    causes = f"{error.__cause__ or error.__context__} {text}"
    connection = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
    if "DataLoader worker (pid" in causes or (connection and _comes_through(error, "multiprocessing/connection")):
        return f"{WORKER_ENDED}. ({(text.splitlines() or [type(error).__name__])[0]})"
    if isinstance(error, RuntimeError) and PEER.search(text) and _comes_through(error, "distributed"):
        return f"{PEER_ENDED}. This one cannot go on alone."
    return None


@contextmanager
def wrap_read_errors(path: object, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Raise every error of the block as one that names what is read.

    Broken bytes and wrong fields lead to errors of any class. Those that name the path already pass, as do errors of
    the system about another file, of a missing library and of a full memory.

    Args:
        path: A file, folder or URL.
        kind: The class of the error.
    """
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        names_another = isinstance(error, OSError) and error.filename is not None
        if names_another or (isinstance(error, (OSError, ValueError)) and str(path) in str(error)):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        if not isinstance(error, (OSError, ValueError)) or not reason:
            reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
        raise kind(f"{path} cannot be read: {reason.rstrip('.')}.") from error


@contextmanager
def wrap_write_errors(path: Path) -> Iterator[None]:
    """Raise errors of writing in the block as an OSError that names what is written, a file or a folder.

    The system does not say which file it could not write to; safetensors, torch and tokenizers hide its errors.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            error.filename = os.fspath(path)
        raise
    except Exception as error:
        is_of_torch = isinstance(error, RuntimeError) and TORCH_WRITES.search(str(error))
        is_of_tokenizers = type(error) is Exception and SYSTEM.search(str(error))
        if not (isinstance(error, SafetensorError) or is_of_torch or is_of_tokenizers):
            raise
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error


@contextmanager
def wrap_weight_errors(folders: Callable[[], Iterable[Path]]) -> Iterator[None]:
    """Raise an error of damaged weights in the block, which does not say where they are, as one that names their file.

    Args:
        folders: Finds the folders of models that the block may load; called after such an error.
    """
    try:
        yield
    except SafetensorError as error:
        if (path := _damaged_weights(folders())) is None:
            raise
        raise ValueError(f"{path} is damaged or cut short ({error}); copy, download or build it again.") from error


def _damaged_weights(folders: Iterable[Path]) -> Path | None:
    for folder in folders:
        for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]):
            try:
                with safe_open(path, framework="pt"):
                    pass
            except SafetensorError:
                return path
    return None


def _comes_through(error: BaseException, package: str) -> bool:
    return any(package in entry.filename for entry in traceback.extract_tb(error.__traceback__))

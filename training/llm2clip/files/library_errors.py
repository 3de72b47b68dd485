"""Errors of libraries that are nobody's bug: a damaged file, a full disk or memory, a process that has died."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# What the processes of a run see when another one has died: gloo, NCCL and the store of torchrun.
PEER = re.compile(
    r"connection (closed|reset) by peer|broken pipe|socket timeout|remote process exited|"
    r"failed to (recv|send)|connection was likely closed|watchdog",
    re.IGNORECASE,
)
PEER_ENDED = "another process of this run has ended; its own message says why"
WORKER_ENDED = "a process that reads data has ended; if the memory is full, lower dataloader_num_workers (num_workers)"
# How libraries in Rust word an error of the system.
SYSTEM = re.compile(r"[A-Z][\w /-]+ \(os error \d+\)")
# Errors of writing to an open file, which say nothing of which.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
# Errors of torch.save: it cannot open or write its file.
TORCH_WRITES = re.compile(r"PytorchStreamWriter|inline_container|cannot be opened|iostream error")


def explain(error: BaseException) -> str | None:
    """Return the line of an error of a library that is about the data or machine; None if it may be a bug."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, SafetensorError):
        return first
    if isinstance(error, MemoryError):
        return f"the memory of the machine is full. ({first})"
    if type(error).__name__ == "OutOfMemoryError":  # of torch
        return f"{first} Lower the batch size, or set tower_chunk_size or activation_checkpointing."
    # The first error of the worker's end is the context of the last one, or it is one of the connection to it.
    causes = f"{error.__cause__ or error.__context__} {error}"
    is_lost = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
    if "DataLoader worker (pid" in causes or (is_lost and _comes_through(error, "multiprocessing/connection")):
        return f"{WORKER_ENDED}. ({first})"
    if isinstance(error, RuntimeError) and PEER.search(str(error)) and _comes_through(error, "distributed"):
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


def _comes_through(error: BaseException, package: str) -> bool:
    return any(package in entry.filename for entry in traceback.extract_tb(error.__traceback__))

"""Errors of libraries that are nobody's bug: a damaged file, a full memory, a process that has died."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What the processes of a run see when another one has died: gloo, NCCL and the store of torchrun.
PEER = re.compile(
    r"connection (closed|reset) by peer|broken pipe|socket timeout|remote process exited|"
    r"failed to (recv|send)|connection was likely closed|watchdog",
    re.IGNORECASE,
)
PEER_ENDED = "another process of this run has ended; its own message says why"
WORKER = re.compile(r"DataLoader worker .*?(exited unexpectedly|killed by signal: (?P<signal>[^.]*))", re.DOTALL)
# How libraries in Rust word an error of the system.
SYSTEM = re.compile(r"[A-Z][\w /-]+ \(os error \d+\)")
OUT_OF_MEMORY = (
    "the memory of the accelerator is full: lower the batch size, or set tower_chunk_size or activation_checkpointing"
)


def explain(error: BaseException) -> str | None:
    """Say in one line what an error of a library is about and what to do; None if it may be a bug."""
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    text = str(error)
    if kind.endswith("SafetensorError"):
        return _damaged_weights(error)
    # The first error of the worker's end is the context of the last one.
    if (worker := WORKER.search(f"{error.__cause__ or error.__context__} {text}")) is not None:
        how = f"was killed (signal: {worker['signal']})" if worker["signal"] else "has ended"
        return (
            f"a process that reads data {how}, most often because the memory is full: lower dataloader_num_workers "
            "(num_workers), or, where it says so, give /dev/shm more space."
        )
    # The last is of the socket that the process had.
    ended = (ConnectionError, EOFError, FileNotFoundError)
    if isinstance(error, ended) and _comes_through(error, "multiprocessing/connection"):
        return (
            "a process that reads data has ended, most often because the memory is full: lower "
            "dataloader_num_workers (num_workers)."
        )
    if kind.startswith("torch.") and "OutOfMemoryError" in kind:
        return f"{OUT_OF_MEMORY}. ({text.splitlines()[0]})"
    if type(error) is Exception and (found := SYSTEM.search(text)):  # of the tokenizers library, on a full disk
        path = next(iter(_paths(error, ".json")), None)
        return f"{'a file' if path is None else path} cannot be read or written: {found[0]}."
    if isinstance(error, MemoryError):
        return "the memory of the machine is full."
    if isinstance(error, RuntimeError) and PEER.search(text) and _comes_through(error, "distributed"):
        return f"{PEER_ENDED}. This one cannot go on alone."
    return None


@contextmanager
def wrap_read_errors(path: object, kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Let every error of the block be one that names what is read.

    Libraries raise whatever broken bytes or wrong fields lead to, KeyError and AttributeError too. An error that names
    the path stays as it is, as do those of the system about another file, of a missing library and of a full memory.

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


def _damaged_weights(error: BaseException) -> str:
    """Name the file that the safetensors library could not read, which its error does not."""
    path = next((path for path in _paths(error, "tensors") if path.is_file()), None)
    where = "a file of weights" if path is None else str(path)
    return f"{where} is damaged or cut short ({error}); copy, download or build it again."


def _paths(error: BaseException, ending: str) -> list[Path]:
    """Return the paths with this ending in the calls that the error went through, the innermost first."""
    found: list[Path] = []
    for frame, _ in reversed([*traceback.walk_tb(error.__traceback__)]):
        values: list[Any] = [*frame.f_locals.values()]
        found += [Path(value) for value in values if isinstance(value, (str, Path)) and str(value).endswith(ending)]
    return found


def _comes_through(error: BaseException, package: str) -> bool:
    return any(package in entry.filename for entry in traceback.extract_tb(error.__traceback__))

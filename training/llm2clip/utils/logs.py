"""What a command writes: messages on the terminal, and the log file that receives everything else.

Messages quote captions, file names and errors that others wrote, so that they are made [`printable`].
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from llm2clip.utils.progress import ProgressBar, close_bars, is_main_process, launcher_rank

LOG_FILE, ERROR_FILE = "log.txt", "error.log"
OUR_LOGGERS = ("llm2clip", "modeling_llm2clip", "transformers_modules")
# Warnings of these categories concern the developers of a library and not its users.
DEVELOPER_WARNINGS = ("FutureWarning:", "DeprecationWarning:")
# They print or warn, past our handlers or where the caller has asked for it: torch about enumerations of torchao,
# accelerate about weights that stay on disk.
NOISY = ("torch.utils._pytree", "accelerate.big_modeling")
# Names that a message has.
MAX_NAMED = 20
# What a terminal obeys instead of showing it (escape sequences, in 7 and 8 bits), what turns the direction of the text
# around it, and what no encoding has. Line feed and tab are layout.
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Write out the characters that a terminal would obey, such as `\\u001b`; JSON stays the same JSON."""
    return OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def print_whole(text: str) -> None:
    """Print a text, of which `head` or a pager may have read enough before its end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Otherwise Python reports it once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shortened(names: Sequence[str]) -> str:
    """List the first names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class LogFile(MemoryHandler):
    """All records of a run, in `log.txt` in its output folder.

    The folder is known only after the libraries are imported. Until `open` or `discard`, records are kept.

    Attributes:
        error_folder: Where `error.log` is written; None for a command without an output folder.
    """

    def __init__(self) -> None:
        super().__init__(capacity=1, flushOnClose=False)
        self.error_folder: Path | None = None

    def open(self, folder: str | Path) -> Path:
        """Append all records, also the earlier ones, to `log.txt` in `folder`; returns its path."""
        path = Path(folder) / LOG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _File(path, encoding="utf-8")
        file.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.setTarget(file)
        self.flush()
        return path

    def discard(self) -> None:
        """Drop all records: the run has no output folder."""
        self.setTarget(logging.NullHandler())
        self.flush()

    def write_error(self, command: str, error: BaseException) -> Path | None:
        """Append the traceback of an error to `error.log` in `error_folder`; returns its path.

        Returns None if there is no folder, or if it cannot be written, perhaps because the error is a full disk.
        """
        if self.error_folder is None:
            return None
        process = f"process {launcher_rank()}, id {os.getpid()}"
        head = f"{time.strftime('%Y-%m-%d %H:%M:%S')} llm2clip {command} ({process})\n"
        try:
            self.error_folder.mkdir(parents=True, exist_ok=True)
            # In one write, since all processes of a run append to this file.
            with (self.error_folder / ERROR_FILE).open("a", encoding="utf-8") as file:
                file.write(printable("".join([head, *traceback.format_exception(error), "\n"])))
        except OSError:
            return None
        return self.error_folder / ERROR_FILE

    def remove_errors(self) -> None:
        """Remove the `error.log` of earlier tries, after a success; their tracebacks are in `log.txt` too."""
        if self.error_folder is not None and is_main_process():
            with contextlib.suppress(OSError):
                (self.error_folder / ERROR_FILE).unlink()

    def close(self) -> None:
        if self.target is not None:
            with contextlib.suppress(OSError):  # of what has not been written
                self.target.close()
        super().close()


class _File(logging.FileHandler):
    """A log that ends where the disk is full, with one warning: the command goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.addFilter(lambda record: False)
        print(f"llm2clip: the log {self.baseFilename} cannot be written: {error.strerror}.", file=sys.stderr)


class TerminalHandler(logging.StreamHandler):
    """Our messages on standard error, above the progress bars, and errors of libraries.

    Warnings of libraries appear only where there is no log file for them. Processes other than the first of their
    launcher write warnings alone.
    """

    def __init__(self, file: LogFile) -> None:
        super().__init__()
        self._log_file = file
        self.setFormatter(_Formatter())
        self.addFilter(self._shows)

    def _shows(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] in OUR_LOGGERS:
            return record.levelno >= (logging.INFO if is_main_process() else logging.WARNING)
        has_no_file = isinstance(self._log_file.target, logging.NullHandler)
        if record.levelno != logging.WARNING or not has_no_file or not is_main_process():
            return record.levelno >= logging.ERROR
        return record.name != "py.warnings" or not any(name in record.getMessage() for name in DEVELOPER_WARNINGS)

    def emit(self, record: logging.LogRecord) -> None:
        # A forked process has copies of bars that are not its own.
        with ProgressBar.external_write_mode(self.stream) if is_main_process() else contextlib.nullcontext():
            super().emit(record)


@contextlib.contextmanager
def command_logs() -> Iterator[LogFile]:
    """Direct the logs of all libraries and Python's warnings to the terminal and to the log file that is yielded.

    When the block ends, also by an error, no progress bar is left on the terminal and logging is as before.
    """
    root, ours, file = logging.getLogger(), logging.getLogger("llm2clip"), LogFile()
    handlers = (TerminalHandler(file), file)
    levels = root.level, ours.level
    root.setLevel(logging.INFO)
    ours.setLevel(logging.DEBUG)
    for handler in handlers:
        root.addHandler(handler)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(True)
    try:
        yield file
    finally:
        close_bars()
        logging.captureWarnings(False)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(levels[0])
        ours.setLevel(levels[1])


def quiet_libraries() -> None:
    """Turn off the progress bars of the Hugging Face libraries, and let [`command_logs`] decide on their messages.

    To be called when the libraries are imported: each of them attaches a handler of its own to its logger.
    """
    for name in ("transformers", "datasets", "huggingface_hub"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        # Not imported here: a command that does without one of them must not require it.
        library: Any = sys.modules.get(name)
        if library is not None and name == "transformers":
            library.utils.logging.disable_progress_bar()
        elif library is not None:
            library.utils.disable_progress_bars()

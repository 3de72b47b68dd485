"""What a command writes to the terminal, and the log file that receives everything else."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

from llm2clip.utils.progress import close_bars, is_main_process
from llm2clip.utils.terminal import PrintableFormatter, printable

LOG_FILE = "log.txt"
ERROR_FILE = "error.log"
OUR_LOGGERS = ("llm2clip", "modeling_llm2clip", "transformers_modules")
# Warnings of these categories concern the developers of a library and not its users.
DEVELOPER_WARNINGS = ("FutureWarning:", "DeprecationWarning:")


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
        file.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
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
        path = self.error_folder / ERROR_FILE
        place = f"process {os.environ.get('RANK', '0')}, id {os.getpid()}"
        lines = [f"{time.strftime('%Y-%m-%d %H:%M:%S')} llm2clip {command} ({place})\n"]
        lines += traceback.format_exception(error)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # In one write, since all processes of a run append to this file.
            with path.open("a", encoding="utf-8") as file:
                file.write(printable("".join([*lines, "\n"])))
        except OSError:
            return None
        return path

    def remove_errors(self) -> None:
        """Remove the `error.log` of earlier tries, after a success; their tracebacks are in `log.txt` too."""
        if self.error_folder is not None and is_main_process():
            with contextlib.suppress(OSError):
                (self.error_folder / ERROR_FILE).unlink()

    def close(self) -> None:
        if self.target is not None:
            self.target.close()
        super().close()


class _File(logging.FileHandler):
    """A log that ends where the disk is full, with one warning: the command goes on."""

    is_ended = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.is_ended:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.is_ended = True
        print(f"llm2clip: the log {self.baseFilename} cannot be written: {error.strerror}.", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what has not been written
            super().close()


class TerminalHandler(logging.StreamHandler):
    """Our messages on standard error, and errors of libraries.

    Warnings of libraries appear only where there is no log file for them. Processes other than the first of their
    launcher write warnings alone.
    """

    def __init__(self, file: LogFile) -> None:
        super().__init__()
        self._log_file = file
        self.setFormatter(PrintableFormatter())
        self.addFilter(self._shows)

    def _shows(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] in OUR_LOGGERS:
            return record.levelno >= (logging.INFO if is_main_process() else logging.WARNING)
        has_no_file = isinstance(self._log_file.target, logging.NullHandler)
        if record.levelno != logging.WARNING or not has_no_file or not is_main_process():
            return record.levelno >= logging.ERROR
        return record.name != "py.warnings" or not any(name in record.getMessage() for name in DEVELOPER_WARNINGS)

    def emit(self, record: logging.LogRecord) -> None:
        # A progress bar replaces sys.stderr while it is drawn, so that messages appear above it.
        self.stream = sys.stderr
        super().emit(record)


@contextmanager
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
    # torch prints it, past these handlers, about enumerations of torchao wherever that is installed.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    # It warns that weights stay on disk where the caller has asked for that.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
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

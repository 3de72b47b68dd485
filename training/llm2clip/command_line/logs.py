"""What a command writes: messages on the terminal, and the log file that receives everything else.

Messages quote captions, file names and errors that others wrote, so that they are made [`printable`].
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from llm2clip.command_line.progress import ProgressBar, close_bars, is_main_process

LOG_FILE = "log.txt"
OUR_LOGGERS = ("llm2clip", "modeling_llm2clip", "transformers_modules")
# Warnings of these categories concern the developers of a library and not its users.
DEVELOPER_WARNINGS = ("FutureWarning:", "DeprecationWarning:")
# torch warns of enumerations of torchao, accelerate of weights that stay on disk, where the caller has asked for it.
NOISY = ("torch.utils._pytree", "accelerate.big_modeling")
MAX_NAMED = 20  # names in a message
# Escape sequences of terminals in 7 and 8 bits, marks that change the direction of the text around them, and what no
# encoding has. Line feed and tab are layout.
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Write out the characters that a terminal would obey, such as `\\u001b`; JSON stays the same JSON."""
    return CONTROL_CHARACTERS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def print_whole(text: str) -> None:
    """Print a text; its reader, such as `head` or a pager, may end before the text does."""
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


class _File(logging.FileHandler):
    """A log that ends with one warning when the disk is full; the command goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.addFilter(lambda record: False)
        print(f"llm2clip: the log {self.baseFilename} cannot be written: {error.strerror}.", file=sys.stderr)


class TerminalHandler(logging.StreamHandler):
    """Our messages on standard error, above the progress bars, and errors of libraries.

    Processes other than the first of their launcher write warnings alone.

    Attributes:
        log: `log.txt` of the run, which receives everything; None if there is none.
        shows_warnings: Whether warnings of libraries appear too, because no log file receives them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: Path | None = None
        self.shows_warnings = False
        self.setFormatter(_Formatter())
        self.addFilter(self._shows)

    def open_log(self, folder: str | Path) -> Path:
        """Append all records from now on to `log.txt` in `folder`; returns its path.

        Processes other than the first append only errors with their tracebacks.
        """
        self.log = Path(folder) / LOG_FILE
        self.log.parent.mkdir(parents=True, exist_ok=True)
        file = _File(self.log, encoding="utf-8", delay=not is_main_process())
        if not is_main_process():
            file.addFilter(lambda record: bool(record.exc_info))
        file.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(file)
        return self.log

    def _shows(self, record: logging.LogRecord) -> bool:
        if record.name.partition(".")[0] in OUR_LOGGERS:
            return record.levelno >= (logging.INFO if is_main_process() else logging.WARNING)
        if record.levelno != logging.WARNING or not self.shows_warnings or not is_main_process():
            return record.levelno >= logging.ERROR
        return record.name != "py.warnings" or not any(name in record.getMessage() for name in DEVELOPER_WARNINGS)

    def emit(self, record: logging.LogRecord) -> None:
        # A forked process has copies of bars that are not its own.
        with ProgressBar.external_write_mode(self.stream) if is_main_process() else contextlib.nullcontext():
            super().emit(record)


@contextlib.contextmanager
def command_logs() -> Iterator[TerminalHandler]:
    """Direct the logs of all libraries and Python's warnings to the terminal, and to a log file if one is opened.

    When the block ends, also by an error, no progress bar is left on the terminal and logging is as before.
    """
    root, ours, terminal = logging.getLogger(), logging.getLogger("llm2clip"), TerminalHandler()
    levels, handlers = (root.level, ours.level), [*root.handlers]
    root.setLevel(logging.INFO)
    ours.setLevel(logging.DEBUG)
    root.addHandler(terminal)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(True)
    try:
        yield terminal
    finally:
        close_bars()
        logging.captureWarnings(False)
        for handler in [handler for handler in root.handlers if handler not in handlers]:
            root.removeHandler(handler)
            with contextlib.suppress(OSError):  # of what has not been written
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
        if name in sys.modules:
            utils = importlib.import_module(f"{name}.utils")
            turn_off = utils.logging.disable_progress_bar if name == "transformers" else utils.disable_progress_bars
            turn_off()

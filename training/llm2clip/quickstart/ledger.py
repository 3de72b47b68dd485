"""The record of finished steps and their settings, by which a second run reuses them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llm2clip.command_line.progress import section
from llm2clip.files.atomic import digest_json, read_json, write_json

logger = logging.getLogger(__name__)


class Step(NamedTuple):
    """A step of the quickstart.

    Attributes:
        title: What it does, for the terminal.
        settings: JSON values that determine the result.
        work: Returns the result as JSON values. Its argument is whether to continue an interrupted run.
        after: Names of the steps whose results it depends on.
        folder: The folder that it writes, if any.
    """

    name: str
    title: str
    settings: dict[str, Any]
    work: Callable[[bool], dict[str, Any]]
    after: tuple[str, ...] = ()
    folder: Path | None = None


class Ledger:
    """The finished steps of a run, recorded in `ledger.json` in its folder.

    A step is identified by its settings and those of the steps that it depends on. A finished step with the same
    settings is reused, an interrupted one continues, and a step with other settings starts again in an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.json"
        self.steps: dict[str, dict[str, Any]] = read_json(self.path) if self.path.exists() else {}
        self.reused: list[str] = []

    def run(self, step: Step, number: str = "") -> dict[str, Any]:
        """Run a step, or reuse the result of an earlier run; returns the result.

        Args:
            number: Its place among the steps, for the terminal.

        Raises:
            FileExistsError: The folder exists and was not written by an earlier run.
        """
        name, folder, title = step.name, step.folder, f"{number} {step.title}".strip()
        digest = digest_json([name, step.settings, {other: self.steps[other]["digest"] for other in step.after}])
        known = self.steps.get(name, {})
        same = known.get("digest") == digest
        if same and "result" in known and (folder is None or folder.exists()):
            self.reused.append(name)
            logger.info("%s: reused from an earlier run (%.0f s then).", title, known["seconds"])
            return known["result"]
        resume = same and "result" not in known
        if folder is not None and folder.exists() and not resume:
            if not known:
                raise FileExistsError(f"{folder} was not written by the quickstart; choose another output_dir.")
            shutil.rmtree(folder)
        self.steps[name] = {"digest": digest}
        write_json(self.path, self.steps)
        start = time.monotonic()
        with section(f"{title} (continuing an interrupted run)" if resume else title):
            result = step.work(resume)
        # The models of a step: those in circles of references, and the pages that glibc keeps for later.
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.steps[name] |= {"result": result, "seconds": round(time.monotonic() - start, 1)}
        write_json(self.path, self.steps)
        return result

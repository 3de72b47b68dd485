"""The record of finished steps and their settings, by which a second run reuses them."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm2clip.utils.files import digest_json, read_json, write_json
from llm2clip.utils.progress import section

logger = logging.getLogger(__name__)


class Ledger:
    """The finished steps of a run, recorded in `ledger.json` in its folder.

    A step is identified by its settings and those of the steps that it depends on. A finished step with the same
    settings is reused, an interrupted one continues, and a step with other settings starts again in an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.json"
        self.steps: dict[str, dict[str, Any]] = read_json(self.path) if self.path.exists() else {}
        self.reused: list[str] = []

    def run(
        self,
        name: str,
        title: str,
        settings: dict[str, Any],
        work: Callable[[bool], dict[str, Any]],
        *,
        after: Sequence[str] = (),
        folder: Path | None = None,
    ) -> dict[str, Any]:
        """Run a step, or reuse the result of an earlier run; returns the result.

        Args:
            name: Name of the step.
            title: What the step does, for the terminal.
            settings: JSON values that determine the result.
            work: Returns the result as JSON values. Its argument is whether to continue an interrupted run.
            after: Names of the steps whose results this one depends on.
            folder: The folder that the step writes, if any.

        Raises:
            FileExistsError: The folder exists and was not written by an earlier run.
        """
        digest = digest_json([name, settings, {other: self.steps[other]["digest"] for other in after}])
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
            result = work(resume)
        self.steps[name] |= {"result": result, "seconds": round(time.monotonic() - start, 1)}
        write_json(self.path, self.steps)
        return result

    def seconds(self) -> dict[str, float]:
        """Return the duration of each finished step."""
        return {name: step["seconds"] for name, step in self.steps.items() if "seconds" in step}

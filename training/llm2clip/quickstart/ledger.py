"""Which steps of a run are done, and with which settings, so that a second run reuses them."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm2clip.utils.files import write_json

logger = logging.getLogger(__name__)


class Ledger:
    """The finished steps of a run, in `ledger.json` in its folder.

    A step is identified by its settings and those of the steps before it that it names. A step whose settings are the
    same is not run again; one that was started with the same settings and killed goes on; one with other settings
    starts anew, its folder emptied.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.json"
        self.steps: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.reused: list[str] = []

    def run(
        self,
        name: str,
        title: str,
        settings: dict[str, Any],
        work: Callable[[bool], dict[str, Any]],
        *,
        after: tuple[str, ...] = (),
        folder: Path | None = None,
    ) -> dict[str, Any]:
        """Do a step, or reuse what an earlier run made.

        Args:
            name: The step.
            title: What it does, for people.
            settings: What decides its result, as JSON values.
            work: Does it; gets whether to go on with a run that was killed, and returns the result as JSON values.
            after: Steps that the result depends on.
            folder: What the step writes, if it writes a folder.

        Returns:
            The step's result.

        Raises:
            FileExistsError: The folder is there, but is not of an earlier run.
        """
        upstream = {other: self.steps[other]["digest"] for other in after}
        text = json.dumps([name, settings, upstream], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        known = self.steps.get(name, {})
        same = known.get("digest") == digest
        if same and "result" in known and (folder is None or folder.exists()):
            self.reused.append(name)
            logger.info("%s: reused from an earlier run (%.0f s then).", title, known["seconds"])
            return known["result"]
        resume = same and "result" not in known
        logger.info("%s%s ...", title, " (going on where it stopped)" if resume else "")
        if folder is not None and folder.exists() and not resume:
            if not known:
                raise FileExistsError(
                    f"{folder} is there already, but no quickstart made it; choose another output_dir."
                )
            shutil.rmtree(folder)
        self.steps[name] = {"digest": digest}
        self._write()
        start = time.monotonic()
        result = work(resume)
        self.steps[name] |= {"result": result, "seconds": round(time.monotonic() - start, 1)}
        self._write()
        logger.info("%s: %.0f s.", title, self.steps[name]["seconds"])
        return result

    def seconds(self) -> dict[str, float]:
        """How long each finished step took."""
        return {name: step["seconds"] for name, step in self.steps.items() if "seconds" in step}

    def _write(self) -> None:
        write_json(self.path, self.steps)

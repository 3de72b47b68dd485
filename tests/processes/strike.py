"""`python -m tests.processes.strike STRIKES ARGUMENTS` runs `llm2clip ARGUMENTS`, and something befalls some ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tests.faults.injection import Plan

STRUCK = "struck: "


@dataclass(frozen=True)
class Strike:
    """What befalls a rank of a run.

    Attributes:
        rank: Whom.
        kind: kill: SIGKILL; stop: SIGSTOP, and SIGCONT after `seconds`; sleep: it is busy for `seconds`; disk: its
            changes of a folder fail or kill it, by `plan`.
        event: When: at the optimizer step, or at the call of a text or vision tower, with the number `at`, from 1.
        plan: The fields of a [`Plan`]; the process has to have been started with its library in C.
    """

    rank: int
    kind: Literal["kill", "stop", "sleep", "disk"]
    event: Literal["step", "call"] = "step"
    at: int = 1
    seconds: float = 3.0
    plan: dict[str, Any] = field(default_factory=dict)

    def below(self, root: Path) -> Strike:
        """Return the strike whose plan is for a folder."""
        return replace(self, plan={"root": str(root), "log": str(root.with_suffix(".changes")), **self.plan})

    def arm(self) -> None:
        """Let it happen to this process from now on."""
        if self.kind == "disk":
            Plan(**self.plan).arm()
        elif self.event == "step":
            _count_steps(self._count())
        else:
            _count_calls(self._count())

    def moment(self, errors: str) -> float:
        """Return when it happened, in seconds since the epoch, by what a run has written to standard error."""
        if self.kind == "disk":
            return Path(self.plan["log"]).stat().st_mtime
        [moment] = re.findall(rf"{STRUCK}{self.kind} ([\d.]+)", errors)
        return float(moment)

    def _count(self) -> Callable[..., None]:
        number = 0

        def count(*_: object) -> None:
            nonlocal number
            number += 1
            if number == self.at:
                self._happen()

        return count

    def _happen(self) -> None:
        print(f"{STRUCK}{self.kind} {time.time()}", file=sys.stderr, flush=True)
        if self.kind == "sleep":
            time.sleep(self.seconds)
        elif self.kind == "stop":
            subprocess.Popen(["sh", "-c", f"sleep {self.seconds}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def with_strikes(*strikes: Strike) -> list[str]:
    """Return the arguments of a python that runs a command with strikes."""
    return ["-m", "tests.processes.strike", json.dumps([asdict(strike) for strike in strikes])]


def _count_steps(count: Callable[..., None]) -> None:
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    register_optimizer_step_pre_hook(count)


def _count_calls(count: Callable[..., None]) -> None:
    from torch.nn.modules.module import register_module_forward_pre_hook

    from modeling_llm2clip import EVA02VisionModel, LLM2CLIPTextModel

    def of_towers(module: object, inputs: object) -> None:
        if isinstance(module, EVA02VisionModel | LLM2CLIPTextModel):
            count()

    register_module_forward_pre_hook(of_towers)


def main() -> int:
    """Run a command with strikes."""
    from llm2clip import cli

    for fields in json.loads(sys.argv[1]):
        strike = Strike(**fields)
        if strike.rank == int(os.environ["RANK"]):
            strike.arm()
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())

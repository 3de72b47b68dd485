"""A folder belongs to one run at a time, and a dead process keeps no lock."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from llm2clip.encoders import embed
from llm2clip.files import locks
from llm2clip.files.locks import folder_lock
from llm2clip.quickstart import quickstart
from llm2clip.quickstart.config import QuickstartConfig
from llm2clip.trainers import run_mntp, run_stage1, run_stage2
from llm2clip.trainers.mntp_config import MNTPRecipe
from llm2clip.trainers.stage1_config import Stage1Recipe
from llm2clip.trainers.stage2_config import Stage2Recipe
from tests.llm2clip.files.locks import another_run

HOLD = "import sys, time\nfrom llm2clip.files.locks import folder_lock\n"
HOLD += "with folder_lock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(600)\n"


def test_a_lock_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"another run .*{tmp_path}"):
            folder_lock(tmp_path, patience=0).__enter__()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with folder_lock(tmp_path, patience=0):
        pass


def test_a_lock_may_be_entered_again_and_ends_with_the_outer_block(tmp_path: Path) -> None:
    with folder_lock(tmp_path), folder_lock(tmp_path / ".." / tmp_path.name, patience=0):
        pass
    with another_run(tmp_path), pytest.raises(ValueError, match="another run"):
        folder_lock(tmp_path, patience=0).__enter__()


@pytest.mark.parametrize(
    ("run", "config", "fields"),
    [
        (run_mntp.run, MNTPRecipe, {"model_name_or_path": "llm", "sources": [{}]}),
        (run_stage1.run, Stage1Recipe, {"model_name_or_path": "llm", "sources": [{}]}),
        (run_stage2.run, Stage2Recipe, {"sources": [{}]}),
        (embed.run, embed.EmbedConfig, {}),
        (quickstart.run, QuickstartConfig, {}),
    ],
)
def test_every_stage_refuses_a_folder_that_another_run_uses(
    run: Any, config: Any, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.0)
    with another_run(tmp_path), pytest.raises(ValueError, match="another run"):
        run(config(output_dir=str(tmp_path), **fields))


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: FileLock, timeout: float) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with folder_lock(tmp_path):
        assert "has no file locks" in caplog.text

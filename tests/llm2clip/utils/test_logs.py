"""What a command shows on the terminal and what it keeps in the log file."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest

from llm2clip.utils.logs import LOG_FILE, command_logs, quiet_libraries

OURS, LIBRARY = logging.getLogger("llm2clip.somewhere"), logging.getLogger("some_library")


def test_the_terminal_shows_our_messages_and_the_file_has_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with command_logs() as file:
        LIBRARY.warning("while importing")
        file.open(tmp_path / "run")
        OURS.info("our message")
        OURS.debug("our detail")
        LIBRARY.info("its message")
        LIBRARY.warning("its warning")
        LIBRARY.error("its error")
        warnings.warn("it will change", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "our message\nits error\n"
    text = (tmp_path / "run" / LOG_FILE).read_text()
    for message in ("while importing", "our message", "our detail", "its message", "its warning", "it will change"):
        assert message in text
    assert "WARNING some_library: while importing" in text


def test_a_second_run_appends_to_the_log(tmp_path: Path) -> None:
    for number in range(2):
        with command_logs() as file:
            file.open(tmp_path)
            OURS.info("run %d", number)
    assert [line.rpartition(": ")[2] for line in (tmp_path / LOG_FILE).read_text().splitlines()] == ["run 0", "run 1"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_log_that_cannot_be_written_ends_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / LOG_FILE).symlink_to("/dev/full")
    with command_logs() as file:
        file.open(tmp_path)
        for number in range(3):
            OURS.info("step %d", number)
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert shown.count(f"{LOG_FILE} cannot be written: No space left on device.") == 1
    assert "step 2" in shown


def test_without_a_file_warnings_of_libraries_are_shown_but_not_those_for_their_developers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with command_logs() as file:
        LIBRARY.warning("while importing")
        file.discard()
        LIBRARY.warning("its warning")
        warnings.warn("it will change", FutureWarning, stacklevel=1)
        warnings.warn("look at this", UserWarning, stacklevel=1)
    shown = capsys.readouterr().err
    assert shown.startswith("its warning\n")
    assert "look at this" in shown
    assert "it will change" not in shown


def test_other_processes_of_a_launcher_show_our_warnings_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    with command_logs() as file:
        file.discard()
        OURS.info("our message")
        OURS.warning("our warning")
        LIBRARY.warning("its warning")
    assert capsys.readouterr().err == "our warning\n"


def test_logging_is_restored_when_the_command_ends() -> None:
    root = logging.getLogger()
    before = list(root.handlers), root.level
    with pytest.raises(ValueError, match="broken"), command_logs():
        raise ValueError("broken")
    assert (list(root.handlers), root.level) == before


def test_hugging_face_libraries_lose_their_bars_and_handlers() -> None:
    from datasets.utils import are_progress_bars_disabled
    from huggingface_hub.utils import are_progress_bars_disabled as are_hub_bars_disabled
    from transformers.utils import logging as transformers_logging

    quiet_libraries()
    assert are_progress_bars_disabled()
    assert are_hub_bars_disabled()
    assert not transformers_logging.is_progress_bar_enabled()
    assert logging.getLogger("transformers").propagate

"""What a command shows on the terminal and what it keeps in the log file."""

from __future__ import annotations

import io
import json
import logging
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from llm2clip.command_line.logs import CONTROL_CHARACTERS, LOG_FILE, command_logs, printable
from llm2clip.command_line.tables import print_table

OURS, LIBRARY = logging.getLogger("llm2clip.somewhere"), logging.getLogger("some_library")
HOSTILE = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202eabc \udce9 a\rb"


def test_the_terminal_shows_our_messages_and_the_file_has_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with command_logs() as terminal:
        LIBRARY.warning("while importing")
        terminal.open_log(tmp_path / "run")
        OURS.info("our message")
        OURS.debug("our detail")
        LIBRARY.info("its message")
        LIBRARY.warning("its warning")
        LIBRARY.error("its error")
        warnings.warn("it will change", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "our message\nits error\n"
    text = (tmp_path / "run" / LOG_FILE).read_text()
    for message in ("our message", "our detail", "its message", "its warning", "it will change"):
        assert message in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_log_that_cannot_be_written_ends_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / LOG_FILE).symlink_to("/dev/full")
    with command_logs() as terminal:
        terminal.open_log(tmp_path)
        for number in range(3):
            OURS.info("step %d", number)
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert shown.count(f"{LOG_FILE} cannot be written: No space left on device.") == 1
    assert "step 2" in shown


def test_only_what_a_terminal_obeys_is_written_out() -> None:
    assert printable(HOSTILE) == r"\u001b[31mred\u001b]0;title\u0007 \u009b2J \u202eabc \udce9 a\u000db"
    kept = "two\nlines\tand \u3000 \u00a0 \u200d \U0001f468\u200d\U0001f469 \u0645\u06cc\u200c\u062e\u0648"
    assert printable(kept) == kept
    # JSON stays the same JSON.
    text = printable(json.dumps({"caption": HOSTILE}, ensure_ascii=False))
    assert json.loads(text) == {"caption": HOSTILE}
    assert not CONTROL_CHARACTERS.search(text)


def test_tables_and_logs_are_printable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What pytest captures goes to another process, which takes no lone surrogates.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    out = io.StringIO()
    print_table(Console(file=out, width=300), HOSTILE, ["", HOSTILE], [(HOSTILE, "1")])
    with command_logs() as terminal:
        terminal.open_log(tmp_path)
        OURS.warning("the caption %s", HOSTILE)
    for text in (out.getvalue(), capsys.readouterr().err, (tmp_path / LOG_FILE).read_text()):
        assert "red" in text
        assert not CONTROL_CHARACTERS.search(text)

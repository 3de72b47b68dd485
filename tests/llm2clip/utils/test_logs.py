"""What a command shows on the terminal and what it keeps in the log file."""

from __future__ import annotations

import io
import json
import logging
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from llm2clip.utils.logs import LOG_FILE, OBEYED, command_logs, printable, quiet_libraries
from llm2clip.utils.tables import print_table

OURS, LIBRARY = logging.getLogger("llm2clip.somewhere"), logging.getLogger("some_library")
HOSTILE = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202eabc \udce9 a\rb"


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


@pytest.mark.parametrize("name", ["RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"])
def test_an_error_is_of_the_process_that_its_launcher_numbers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "3")
    with command_logs() as file:
        file.error_folder = tmp_path
        assert file.write_error("embed", ValueError("broken")) == tmp_path / "error.log"
    assert "llm2clip embed (process 3, id " in (tmp_path / "error.log").read_text()


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


def test_only_what_a_terminal_obeys_is_written_out() -> None:
    assert printable(HOSTILE) == r"\u001b[31mred\u001b]0;title\u0007 \u009b2J \u202eabc \udce9 a\u000db"
    kept = "two\nlines\tand \u3000 \u00a0 \u200d \U0001f468\u200d\U0001f469 \u0645\u06cc\u200c\u062e\u0648"
    assert printable(kept) == kept
    # JSON stays the same JSON.
    text = printable(json.dumps({"caption": HOSTILE}, ensure_ascii=False))
    assert json.loads(text) == {"caption": HOSTILE}
    assert not OBEYED.search(text)


def test_tables_and_logs_are_printable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What pytest captures goes to another process, which takes no lone surrogates.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    out = io.StringIO()
    print_table(Console(file=out, width=300), HOSTILE, ["", HOSTILE], [(HOSTILE, "1")])
    with command_logs() as file:
        file.error_folder = tmp_path
        file.open(tmp_path)
        logging.getLogger("llm2clip.test").warning("the caption %s", HOSTILE)
        file.write_error("embed", ValueError(HOSTILE))
    shown = [
        out.getvalue(),
        capsys.readouterr().err,
        (tmp_path / "log.txt").read_text(),
        (tmp_path / "error.log").read_text(),
    ]
    for text in shown:
        assert "red" in text
        assert not OBEYED.search(text)

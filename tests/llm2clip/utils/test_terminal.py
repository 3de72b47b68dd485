"""What others wrote does not reach the terminal as orders."""

from __future__ import annotations

import io
import json
import logging

import pytest
from rich.console import Console

from llm2clip.utils.logs import command_logs
from llm2clip.utils.tables import print_table
from llm2clip.utils.terminal import OBEYED, printable

HOSTILE = "\x1b[31mred\x1b]0;title\x07 \x9b2J \u202eabc \udce9 a\rb"


def test_only_what_a_terminal_obeys_is_written_out() -> None:
    assert printable(HOSTILE) == r"\u001b[31mred\u001b]0;title\u0007 \u009b2J \u202eabc \udce9 a\u000db"
    kept = "two\nlines\tand \u3000 \u00a0 \u200d \U0001f468\u200d\U0001f469 \u0645\u06cc\u200c\u062e\u0648"
    assert printable(kept) == kept


def test_json_stays_the_same_json() -> None:
    value = {"caption": HOSTILE}
    text = printable(json.dumps(value, ensure_ascii=False))
    assert json.loads(text) == value
    assert not OBEYED.search(text)


def test_tables_and_logs_are_printable(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What pytest captures goes to another process, which takes no lone surrogates.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    folder = tmp_path_factory.mktemp("run")
    out = io.StringIO()
    print_table(Console(file=out, width=300), HOSTILE, ["", HOSTILE], [(HOSTILE, "1")])
    with command_logs() as file:
        file.error_folder = folder
        file.open(folder)
        logging.getLogger("llm2clip.test").warning("the caption %s", HOSTILE)
        file.write_error("embed", ValueError(HOSTILE))
    shown = [
        out.getvalue(),
        capsys.readouterr().err,
        (folder / "log.txt").read_text(),
        (folder / "error.log").read_text(),
    ]
    for text in shown:
        assert "red" in text
        assert not OBEYED.search(text)

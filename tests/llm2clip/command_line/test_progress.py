"""The progress bar on a terminal, in a file, inside another bar, in a second process and after an error."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from llm2clip.command_line import progress
from llm2clip.command_line.progress import ProgressBar, track


class Terminal(io.StringIO):
    """A terminal in place of standard error."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What is on it at the end: a carriage return goes back to the beginning of a line."""
        return [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in self.getvalue().split("\n")]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    screen = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=screen))
    monkeypatch.setattr(progress, "DRAW_INTERVAL", 0.0)
    return screen


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advances the time that the bars see."""
    now = [100.0]
    for name in ("tqdm.std.time", "llm2clip.command_line.progress.time.monotonic"):
        monkeypatch.setattr(name, lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_a_terminal_shows_count_rate_status_and_time_left_and_then_one_line(
    terminal: Terminal, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), ProgressBar("Stage 1", 1800, "step") as bar:
        clock(60.0)
        bar.set_postfix_str("loss 2.5000", refresh=False)
        bar.update(120)
    assert "| 120/1800 [01:00<14:00,  2.00step/s, loss 2.5000]" in terminal.getvalue()
    assert terminal.lines() == [""]
    assert caplog.messages == ["Stage 1: 120 steps in 01:00, 2.00step/s, loss 2.5000"]


def test_a_file_gets_one_line_per_interval_and_one_at_the_end(
    clock: Callable[[float], None], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO), ProgressBar("Embedding", 1000, "image") as bar:
        bar.set_postfix_str("2 skipped", refresh=False)
        for _ in range(7):
            clock(10.0)
            bar.update(100)
    assert caplog.messages == [
        "Embedding:  30% 300/1000 [00:30<01:10, 10.00image/s, 2 skipped]",
        "Embedding:  60% 600/1000 [01:00<00:40, 10.00image/s, 2 skipped]",
        "Embedding: 700 images in 01:10, 10.00image/s, 2 skipped",
    ]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("variable", ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_only_the_first_process_of_a_launcher_reports(
    variable: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, "1")
    with caplog.at_level(logging.DEBUG):
        assert list(track(range(2), "Work", "step")) == [0, 1]
    assert not caplog.messages
    assert not terminal.getvalue()

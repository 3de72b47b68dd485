"""The progress bar on a terminal, in a file, inside another bar, in a second process and after an error."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from llm2clip.utils import progress
from llm2clip.utils.progress import close_bars, format_rate, format_seconds, progress_bar, section, track

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 80 columns in place of standard error, which shows every update."""
    screen = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=80))
    monkeypatch.setattr(progress, "DRAW_INTERVAL", 0.0)
    return screen


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advances the time that the bars see."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def shown(screen: io.StringIO) -> str:
    """What was written, without the escape sequences."""
    return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", screen.getvalue())


def test_a_terminal_of_80_columns_shows_count_rate_status_and_time_left_in_one_line(
    terminal: io.StringIO, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), progress_bar("Stage 1", 1800, "step") as bar:
        clock(60.0)
        bar.update(120, status="loss 2.5000")
    lines = re.split(r"[\r\n]+", shown(terminal))
    line = next(line for line in lines if "loss" in line)
    assert line.startswith("Stage 1 ━")
    assert line.rstrip().endswith("120 of 1,800, 2.0 steps/s, loss 2.5000, 14:00 left")
    assert max(map(len, lines)) <= 80
    assert caplog.messages == ["Stage 1: 120 steps in 1:00, 2.0 steps/s, loss 2.5000"]
    assert terminal.getvalue().count(HIDE_CURSOR) == terminal.getvalue().count(SHOW_CURSOR) == 1


def test_a_bar_inside_a_bar_is_a_second_line_of_one_display_and_leaves_no_message(
    terminal: io.StringIO, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), progress_bar("Outer", 2) as outer:
        assert list(track(range(3), "Inner")) == [0, 1, 2]
        outer.update(1)
    assert "Inner" in shown(terminal)
    assert terminal.getvalue().count(HIDE_CURSOR) == 1
    assert [message.partition(":")[0] for message in caplog.messages] == ["Outer"]


def test_an_error_leaves_the_terminal_as_it_was(terminal: io.StringIO, caplog: pytest.LogCaptureFixture) -> None:
    stream = sys.stderr

    def fail() -> None:
        with progress_bar("Work", 2):
            assert sys.stderr is not stream
            raise ValueError("broken")

    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="broken"):
        fail()
    assert sys.stderr is stream
    assert SHOW_CURSOR in terminal.getvalue()
    assert not caplog.messages


def test_close_bars_removes_the_bar_of_an_iteration_that_was_given_up(terminal: io.StringIO) -> None:
    stream = sys.stderr
    iterator = track(range(3), "Work")
    next(iterator)
    assert sys.stderr is not stream
    close_bars()
    assert sys.stderr is stream
    assert list(iterator) == [1, 2]


def test_messages_appear_above_the_bar(terminal: io.StringIO) -> None:
    with progress_bar("Work", 2) as bar:
        print("a warning", file=sys.stderr)
        bar.update(1)
    assert "a warning\nWork" in shown(terminal)


def test_a_file_gets_one_line_per_interval_and_one_at_the_end(
    clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), progress_bar("Embedding", 1000, "image") as bar:
        for _ in range(7):
            clock(10.0)
            bar.update(advance=100, status="2 skipped")
    assert caplog.messages == [
        "Embedding: 300 of 1,000, 10.0 images/s, 2 skipped, 1:10 left",
        "Embedding: 600 of 1,000, 10.0 images/s, 2 skipped, 0:40 left",
        "Embedding: 700 images in 1:10, 10.0 images/s, 2 skipped",
    ]


def test_the_rate_of_a_resumed_run_does_not_count_what_was_done_before(
    clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), progress_bar("Stage 2", 100, "step", initial=80) as bar:
        clock(40.0)
        bar.update(90)
    assert caplog.messages[0] == "Stage 2: 90 of 100, 4.0 s/step, 0:40 left"


@pytest.mark.parametrize("show", [False, None])
def test_nothing_is_shown_without_a_terminal_unless_asked_for(
    show: bool | None, clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), progress_bar("Work", 2, show=show) as bar:
        clock(60.0)
        bar.update(1)
    assert not caplog.messages


def test_only_the_first_process_of_a_launcher_reports(
    terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.DEBUG):
        assert list(track(range(2), "Work")) == [0, 1]
    assert not caplog.messages
    assert not terminal.getvalue()


def test_a_section_shows_its_title_and_duration_and_keeps_the_lines_of_its_bars_for_the_log_file(
    clock: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), section("1/8 Weights"):
        for _ in track(range(2), "Loading"):
            clock(1.0)
    assert [record.message for record in caplog.records if record.levelno == logging.INFO] == [
        "1/8 Weights",
        "    done in 0:02",
    ]
    assert "Loading: 2 in 0:02, 1.0 it/s" in caplog.messages


def test_rates_and_durations_are_formatted_for_people() -> None:
    assert [format_rate(12.34, "image"), format_rate(0.25, "step"), format_rate(2.0)] == [
        "12.3 images/s",
        "4.0 s/step",
        "2.0 it/s",
    ]
    assert [format_seconds(value) for value in (5, 65, 3661)] == ["0:05", "1:05", "1:01:01"]


@pytest.mark.parametrize("variable", progress.RANKS)
def test_one_process_of_any_launcher_is_the_main_one(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in progress.RANKS:
        monkeypatch.delenv(name, raising=False)
    assert progress.is_main_process()
    monkeypatch.setenv(variable, "1")
    assert not progress.is_main_process()
    monkeypatch.setenv(variable, "0")
    assert progress.is_main_process()

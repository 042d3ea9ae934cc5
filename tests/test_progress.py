"""Progress: silent for libraries, readable in a log, never on stdout, never in the way of an error."""

import os
import pty
import re
import subprocess
import sys

import pytest

from rankwise.progress import Track, on_terminal, say, silent

TRACKS = pytest.mark.parametrize("track", [silent, on_terminal], ids=["silent", "on_terminal"])


@TRACKS
def test_an_error_passes_through(track: Track, capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with track("work", 3) as advance:
            advance()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert capfd.readouterr().out == ""


@TRACKS
@pytest.mark.parametrize("total", [0, 1, 5])
def test_any_number_of_steps(track: Track, total: int, capfd: pytest.CaptureFixture[str]) -> None:
    with track("work", total) as advance:
        for _ in range(total):
            advance()
    assert capfd.readouterr().out == ""


def test_silent_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with silent("work", 2) as advance:
        advance()
    assert capfd.readouterr() == ("", "")


def test_a_log_gets_plain_text_with_the_count(capfd: pytest.CaptureFixture[str]) -> None:
    with on_terminal("input moments", 3) as advance:
        advance()
        advance()
    err = capfd.readouterr().err
    assert "input moments" in err
    assert "2/3" in err
    assert "\x1b" not in err  # no colours, no cursor movements
    assert len([line for line in err.splitlines() if line.strip()]) <= 2


def test_a_log_says_what_is_being_done_before_it_is_done(capfd: pytest.CaptureFixture[str]) -> None:
    """Hours may lie between the start of a step and its end."""
    with on_terminal("input moments", 3):
        assert "input moments" in capfd.readouterr().err


def test_steps_one_after_the_other(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("input moments", "factors"):
        with on_terminal(name, 1) as advance:
            advance()
    err = capfd.readouterr().err
    assert err.index("input moments") < err.index("factors")
    assert err.count("1/1") == 2


@TRACKS
def test_work_may_say_where_it_stands(track: Track, capfd: pytest.CaptureFixture[str]) -> None:
    with track("masks", 40) as advance:
        for step in range(40):
            advance()
            say(advance, f"ratio {step / 100}")
    lines = [line for line in capfd.readouterr().err.splitlines() if "ratio" in line]
    assert lines == ([] if track is silent else [f"masks {n}/40: ratio {(n - 1) / 100}" for n in range(4, 41, 4)])


def test_a_track_that_only_counts_hears_nothing() -> None:
    say(lambda: None, "ratio 0.8")


ON_A_TERMINAL = """
from rankwise.progress import on_terminal
with on_terminal("input moments", 4) as advance:
    for _ in range(4):
        advance()
"""


def test_a_terminal_gets_a_bar_with_time_left() -> None:
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_TERMINAL], stderr=follower, stdout=subprocess.PIPE, env=environment, check=True
    )
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert done.stdout == b""
    assert "\x1b[" in shown  # it is redrawn in place
    assert "4/4" in shown
    assert re.search(r"left\s+(\x1b\[[0-9;]*m)?\s*\d+:\d\d:\d\d", shown)

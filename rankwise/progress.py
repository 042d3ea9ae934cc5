"""Progress of long work, reported through one small callable so that libraries stay silent."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

TENTHS = 10  # how often work that reports figures writes a line where there is no bar to write them beside

Advance = Callable[[], None]
Track = Callable[[str, int], AbstractContextManager[Advance]]


def say(advance: Advance, text: str) -> None:
    """Report where work stands, beside its bar; a track that only counts hears nothing of it."""
    if isinstance(advance, Bar):
        advance.say(text)


class Bar:
    """One step forward when called; `say` puts a short text beside the bar, or now and then a line into a log."""

    def __init__(self, bars: Any, name: str, total: int) -> None:
        self._bars, self._name, self._total, self._done = bars, name, total, 0
        self._task = bars.add_task(name, total=total, note="")

    def __call__(self) -> None:
        """Advance by one step."""
        self._done += 1
        self._bars.advance(self._task)

    def say(self, text: str) -> None:
        """Show `text` with the step that was just done."""
        if self._bars.console.is_terminal:
            self._bars.update(self._task, note=text)
        elif self._done % max(1, self._total // TENTHS) == 0:
            self._bars.console.print(f"{self._name} {self._done}/{self._total}: {text}", highlight=False)


@contextmanager
def silent(name: str, total: int) -> Iterator[Advance]:
    """Track nothing (the default of the Python API)."""
    yield lambda: None


@contextmanager
def on_terminal(name: str, total: int) -> Iterator[Advance]:
    """A rich progress bar with time left on stderr; a plain line at start and end where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        console.print(f"{name}: {total} steps", highlight=False)
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, *times, console=console) as bars:
        yield Bar(bars, name, total)

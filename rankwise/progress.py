"""Progress of long work, reported through one small callable so that libraries stay silent."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Advance = Callable[[], None]
Track = Callable[[str, int], AbstractContextManager[Advance]]


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
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=console) as bars:
        task = bars.add_task(name, total=total)
        yield lambda: bars.advance(task)

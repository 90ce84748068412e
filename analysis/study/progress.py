"""Progress display with the remaining time."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

#: Seconds between two lines about the same unit, without a terminal.
_LINES_APART = 120


class WorkProgress:
    """A progress bar in multiply-adds, with the remaining time; a line now and then if there is no terminal.

    The remaining time assumes that the remaining work proceeds at the average rate so far, across all stages.

    Parameters
    ----------
    total
        Work of the whole run.
    console
        Where to draw; standard error by default.

    Attributes
    ----------
    total
        Work of the whole run.
    """

    def __init__(self, total: float, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._done = 0.0
        self.total = max(total, 1.0)
        self._started = self._said = time.monotonic()
        self._name = ""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=self.total, left="")
        self._rows: dict[str, TaskID] = {}

    def __enter__(self) -> WorkProgress:
        """Start drawing."""
        self._started = self._said = time.monotonic()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop drawing."""
        self._bar.stop()

    def stage(self, name: str, more: str = "", *, said: bool = True) -> None:
        """Show what is running.

        Parameters
        ----------
        name
            Description.
        more
            What follows it; shown only without a bar.
        said
            Whether to print a line if there is no bar.
        """
        self._bar.update(self._task, description=name)
        self._name = name
        if said:
            self._say(name + more)

    def worker(self, name: str, title: str = "", work: float = 0.0, done: float = 0.0) -> None:
        """Show what one of several workers does, in a row of its own; nothing without a terminal.

        Parameters
        ----------
        name
            Name of the worker.
        title
            What it runs; empty if it runs nothing.
        work, done
            How much work that is, and how much of it is done; no work if that is unknown.
        """
        row = self._rows.get(name)
        if row is None:
            row = self._rows[name] = self._bar.add_task(name, left="")
        if not done:
            self._bar.reset(row)
        self._bar.update(row, description=f"  {name}: {title}", total=work or None, completed=done, visible=bool(title))
        self._bar.update(self._task, description=f"{len(self._rows)} worker{'s' * (len(self._rows) > 1)}")

    def advance(self, work: float) -> None:
        """Add completed work."""
        self._done = min(max(self._done + work, 0.0), self.total)
        self._bar.update(self._task, completed=self._done, left=self.left())
        if time.monotonic() - self._said >= _LINES_APART:
            self._say(self._name)

    def _say(self, what: str) -> None:
        if not self.console.is_terminal:
            self._said = time.monotonic()
            left = f" ({self.left()})" if self.left() else ""
            share = f"{100 * self._done / self.total:3.0f} %"
            self.console.print(f"[{share}] {what}{left}", highlight=False, markup=False, soft_wrap=True)

    def left(self) -> str:
        """Return the remaining time in words, or an empty string if it is too early to tell."""
        elapsed = time.monotonic() - self._started
        if self._done < 0.01 * self.total or elapsed < 2:
            return ""
        seconds = elapsed * (self.total - self._done) / self._done
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"

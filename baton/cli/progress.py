"""Progress of an import on a terminal; plain lines where there is no terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from baton.model_import.progress import Unit


class _AmountColumn(ProgressColumn):
    """Bytes as sizes, anything else as counts."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes = DownloadColumn()
        self._counts = MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        column = self._sizes if unit is Unit.BYTES else self._counts
        return column.render(task)


class TerminalProgress:
    """An ImportProgress; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            _AmountColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> TerminalProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._finish_stage()
        self._progress.stop()

    def start_stage(self, description: str, total: int | None, unit: Unit) -> None:
        self._finish_stage()
        if not self._console.is_terminal:
            self._console.print(f"{description} ...", highlight=False, soft_wrap=True)
        self._task = self._progress.add_task(description, total=total, unit=unit)

    def update(self, completed: int) -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=completed)

    def note(self, message: str) -> None:
        self._progress.console.print(message, highlight=False, soft_wrap=True)

    def _finish_stage(self) -> None:
        """A stage whose total was an estimate still ends at its end."""
        if self._task is not None:
            done = self._progress.tasks[self._task].completed
            self._progress.update(self._task, total=done)

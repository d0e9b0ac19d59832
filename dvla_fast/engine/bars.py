"""Live bars for the stages of a run. On a narrow terminal bars and words give way, not numbers."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text


class _Words(TextColumn):
    """Words in one line, cut where there is no room for them."""

    def render(self, task: Task) -> Text:
        words = super().render(task)
        words.no_wrap, words.overflow = True, "ellipsis"
        return words


def live_bars(console: Console) -> Progress:
    """Return the display: a task has a description, and the field ``note``."""

    def kept() -> Column:
        return Column(no_wrap=True)

    def shrinking() -> Column:
        return Column(no_wrap=False, min_width=1)

    return Progress(
        _Words("[bold]{task.description:<12}", table_column=shrinking()),
        BarColumn(bar_width=min(32, max(6, console.width - 90)), table_column=shrinking()),
        TaskProgressColumn(table_column=kept()),
        TimeElapsedColumn(table_column=kept()),
        TextColumn("left", table_column=kept()),
        TimeRemainingColumn(elapsed_when_finished=False, table_column=kept()),
        _Words("{task.fields[note]}", style="dim", markup=False, table_column=shrinking()),
        console=console,
    )

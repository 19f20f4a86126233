"""What a command shows while it works: on stderr, so that stdout stays free for results."""

from __future__ import annotations

import os
from typing import Any


class Console:
    """Shows a run on stderr: a line per event and, on a terminal, progress bars."""

    def __init__(self) -> None:
        from rich.console import Console as Screen
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        # Of several processes that torchrun started the first one speaks.
        self.console = Screen(stderr=True, highlight=False, quiet=os.environ.get("RANK", "0") != "0")
        columns = (
            TextColumn("  {task.description:18}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._progress = Progress(*columns, console=self.console, transient=True)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Console:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def step(self, what: str, done: int, total: int, note: str = "") -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total, note=note)
        self._progress.update(self._tasks[what], completed=done, total=total, note=note)
        if done >= total:
            self._progress.remove_task(self._tasks.pop(what))

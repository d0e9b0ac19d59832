"""How far a run is: live bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

# Seconds of work without a line, off a terminal, after which one says how far it is.
_SILENCE = 30.0


class Progress:
    """Progress of a run in stages: live bars with time left on a terminal, else plain lines.

    Args:
        stages: share of the total time that each stage is expected to take; they sum to 1. Drives
            the overall bar when there is more than one stage.
        enabled: False prints nothing.
        clock: seconds that pass.
    """

    def __init__(
        self,
        stages: dict[str, float],
        *,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stages = stages
        self._clock = clock
        self._finished = self._done = 0.0
        self._earlier = 0.0  # share of the whole run that earlier processes did
        self._found = 0  # units of the current stage that reach() was told of as an earlier one's
        self._current: str | None = None
        self._total = 1
        self._start = self._shown = clock()  # _shown: when a line was printed last
        self._rich: Any = None
        self._tasks: dict[str, Any] = {}
        self.enabled = enabled
        self._live = enabled and sys.stderr.isatty()

    def __enter__(self) -> Progress:
        if self._live:
            try:
                from rich.console import Console

                from dvla_fast.engine.bars import live_bars
            except ImportError:
                self._live = False
                return self
            self._rich = live_bars(Console(stderr=True))
            self._rich.__enter__()
            if len(self._stages) > 1:
                self._tasks["all"] = self._rich.add_task("whole run", total=1.0, note="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._rich is not None:
            self._rich.__exit__(kind, value, trace)

    def begin(self, stage: str, total: int, done: int = 0) -> None:
        """Start a stage of ``total`` units, ``done`` of them finished in an earlier process."""
        if self._current is not None:
            self._finished += self._stages.get(self._current, 0.0)
        self._current, self._total, self._done = stage, max(1, total), done
        self._earlier += self._share(done)
        if self._rich is not None:
            self._tasks[stage] = self._rich.add_task(stage, total=total, completed=done, note="")
        self._update_overall()

    def advance(self, count: float = 1) -> None:
        """Count finished units of the current stage."""
        self._done += count
        if self._rich is not None:
            self._rich.advance(self._tasks[self._current or ""], count)
        self._update_overall()
        self.tick()

    def skip(self, count: float) -> None:
        """Count units that an earlier process finished: they say nothing of the time left."""
        self._earlier += self._share(count)
        self.advance(count)

    def reach(self, stage: str, done: int, total: int, earlier: int = 0) -> None:
        """Say that ``done`` of ``total`` units of a stage are finished; begins it where need be.

        Args:
            earlier: how many of ``done`` an earlier process finished.
        """
        if stage != self._current:
            self.begin(stage, total)
            self._found = 0
        self.skip(earlier - self._found)
        self._found = earlier
        self.advance(done - self._done)

    def tick(self, text: str = "") -> None:
        """Show that work goes on: off a terminal, by a line where there was none for a while."""
        if self._rich is not None:
            if text:
                self.note(text)
        elif self.enabled and self._clock() - self._shown >= _SILENCE:
            self._line(text)

    def note(self, text: str) -> None:
        """Show the newest figures of the current stage; off a terminal, print one line."""
        if self._rich is None:
            if self.enabled:
                self._line(text)
        elif self._current is None:  # no stage has begun
            self._rich.console.print(text, markup=False, highlight=False)
        else:
            self._rich.update(self._tasks[self._current], note=text)

    def _line(self, text: str) -> None:
        self._shown = self._clock()
        left = self.seconds_left()
        time_left = f", about {left:.0f} s left" if left is not None else ""
        share = f"{100 * self.fraction():.0f} %"
        said = ": ".join(filter(None, (self._current, text)))
        print(f"[{share:>5}{time_left}] {said}", file=sys.stderr, flush=True)

    def fraction(self) -> float:
        """Return the finished share of the whole run, in [0, 1]."""
        return min(1.0, self._finished + self._share(self._done))

    def seconds_left(self) -> float | None:
        """Estimate the seconds left from the share done here; None while that says nothing."""
        left, here = 1 - self.fraction(), self.fraction() - self._earlier
        return (self._clock() - self._start) * left / here if here > 0.02 else None

    def _share(self, count: float) -> float:
        """What units of the current stage are of the whole run."""
        return self._stages.get(self._current or "", 0.0) * count / self._total

    def _update_overall(self) -> None:
        if "all" in self._tasks:
            self._rich.update(self._tasks["all"], completed=self.fraction())

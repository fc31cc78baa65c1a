"""What a run shows while it works: a live bar on a terminal, plain lines everywhere else."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunProgress:
    """Steps done, loss, tokens per second and time left. Use as a context manager.

    Args:
      total: steps of the whole run.
      start: steps done before.
      console: where to show it, by default standard error: standard output is for results.
      interval: seconds between two plain lines where the console is not a terminal.
      clock: seconds, rising.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        console: Console | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._start, self._interval, self._clock = total, start, interval, clock
        self._console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._began = self._printed = clock()
        self._bar = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=total, completed=start, status="")

    def __enter__(self) -> "RunProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Reports that `step` steps are done; `loss` is in nats."""
        status = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=step, status=status)
            return
        now = self._clock()
        if step < self._total and now - self._printed < self._interval:
            return
        self._printed = now
        left = (now - self._began) / max(step - self._start, 1) * (self._total - step)
        self.say(f"step {step}/{self._total}  {status}  {duration(left)} left")

    def say(self, message: str) -> None:
        """A line of its own, above the bar if there is one."""
        self._console.print(message, markup=False)


def duration(seconds: float) -> str:
    """Seconds as "45s", "3m05s" or "2h07m"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"

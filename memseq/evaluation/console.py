"""What a run shows while it works: bars on a terminal, plain lines elsewhere, the time left on
both.

Both go to standard error; standard output is for results.
"""

import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress

from memseq.evaluation.jobs import Job
from memseq.evaluation.verdict import number
from memseq.evaluation.workers import Event
from memseq.training.progress import duration

QUIET_SECONDS = 20.0  # between two plain lines about a job that is still going


class Progress:
    """How much of all the work is done. `costs` are the jobs' estimated CPU-seconds."""

    def __init__(self, costs: Mapping[Job, float]):
        self.costs = dict(costs)
        self.done: dict[Job, float] = dict.fromkeys(costs, 0.0)
        self.started = time.monotonic()

    def update(self, event: Event) -> None:
        self.done[event.job] = 1.0 if event.rows is not None else event.step / event.steps

    @property
    def share(self) -> float:
        total = sum(self.costs.values())
        return sum(self.costs[job] * done for job, done in self.done.items()) / total

    def left(self) -> str:
        """The time left, in words, once enough is done to tell."""
        passed = time.monotonic() - self.started
        if self.share < 0.02 or passed < 5:
            return "time left not known yet"
        return f"about {duration(passed * (1 - self.share) / self.share)} left"


def outcome(rows: Sequence[Mapping], headline: str) -> str:
    """What came of a job, in a few words."""
    found = [row["scores"].get(headline) for row in rows if row["status"] == "ok"]
    values = sorted(value for value in found if value is not None)
    wrong = [row for row in rows if row["status"] != "ok"]
    text = "  ".join(number(value) for value in values)
    if wrong:
        text += f"  {len(wrong)} failed: {wrong[0]['error']}"
    return text.strip()


class Plain:
    """Lines for a log: one when a job ends, and now and then one about those still going."""

    def __init__(self, progress: Progress, names: Mapping[Job, str], headlines: Mapping[str, str]):
        self.progress, self.names, self.headlines = progress, names, headlines
        self.ended = 0
        self.spoke = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def hear(self, event: Event) -> None:
        self.progress.update(event)
        name = self.names[event.job]
        if event.rows is not None:
            self.ended += 1
            count = f"[{self.ended}/{len(self.names)}]"
            result = outcome(event.rows, self.headlines[event.job.task])
            left = "" if self.ended == len(self.names) else f"; {self.progress.left()}"
            self._say(f"{count} {name}: {result}{left}")
        elif time.monotonic() - self.spoke > QUIET_SECONDS:
            step = f"{name}: step {event.step} of {event.steps}"
            step += "" if event.loss is None else f", loss {event.loss:.3f}"
            self._say(f"{self.progress.share:.0%} done; {step}; {self.progress.left()}")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        self.spoke = time.monotonic()


class Bars:
    """A bar for the whole and one for each job under way, below the lines of those that ended."""

    def __init__(self, progress: Progress, names: Mapping[Job, str], headlines: Mapping[str, str]):
        self.progress, self.names, self.headlines = progress, names, headlines
        self.width = max(map(len, names.values()))
        self.rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(file=sys.stderr, highlight=False),
        )
        self.whole = self.rich.add_task("All".ljust(self.width), total=1.0, note="")
        self.bars: dict[Job, int] = {}

    def __enter__(self):
        self.rich.start()
        return self

    def __exit__(self, *error):
        for bar in self.bars.values():
            self.rich.remove_task(bar)
        self.rich.stop()

    def hear(self, event: Event) -> None:
        self.progress.update(event)
        name = self.names[event.job]
        if event.job not in self.bars:
            self.bars[event.job] = self.rich.add_task(name.ljust(self.width), total=1.0, note="")
        if event.rows is not None:
            self.rich.remove_task(self.bars.pop(event.job))
            result = outcome(event.rows, self.headlines[event.job.task])
            self.rich.console.print(f"{name.ljust(self.width)}  {result}", markup=False)
        else:
            note = f"step {event.step} of {event.steps}"
            if event.loss is None:
                note = "compiling"
            elif event.step < event.steps:
                note += f", loss {event.loss:.3f}"
            else:
                note = "testing"
            share = event.step / event.steps
            self.rich.update(self.bars[event.job], completed=share, note=note)
        self.rich.update(self.whole, completed=self.progress.share, note=self.progress.left())


def console(progress: Progress, names: Mapping[Job, str], headlines: Mapping[str, str]):
    """The live view that suits standard error."""
    return (Bars if sys.stderr.isatty() else Plain)(progress, names, headlines)

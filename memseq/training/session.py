"""What surrounds a training run: its folder, signals, a stopwatch and the profiler's window."""

import contextlib
import fcntl
import logging
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import absl.logging
import jax


def quiet_storage() -> None:
    """Leaves it to the error that is raised to say what is wrong with a checkpoint.

    Beside raising it, orbax logs a traceback, and where one array cannot be read or written, the
    work on the others, then abandoned, shows one each. For commands, which report in one sentence.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def hook(args):
        text = str(args.exc_value)
        if text != "Event loop is closed" and "reading array index" not in text:
            show(args)

    sys.unraisablehook = hook


@contextlib.contextmanager
def claim_folder(folder: pathlib.Path) -> Iterator[None]:
    """Makes the folder and holds it for this process; the system lets go when the process ends.

    Raises:
      OSError: the folder cannot be made or written, or another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(
                f"{folder} is in use by another run; wait for it or choose another folder"
            ) from None
        yield


class StopSignals:
    """Turns SIGTERM and the first Ctrl-C into a wish to stop after the current step.

    Attributes:
      signal: the signal that came, or None. A second Ctrl-C interrupts at once.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._before = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


class Stopwatch:
    """Wall time by what it was spent on, in seconds.

    >>> clock = Stopwatch()
    >>> with clock("data"):
    ...     pass
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        before = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - before

    def total(self) -> float:
        return time.monotonic() - self._began

    def split(self) -> dict[str, float]:
        """Seconds by name, the rest as "other", and "total"."""
        total = self.total()
        other = total - sum(self.seconds.values())
        return {**self.seconds, "other": other, "total": total}


class Profile:
    """Traces the steps after `options.start` up to `options.stop`; equal is off."""

    def __init__(self, folder: pathlib.Path, options: Mapping[str, int]):
        if not 0 <= options["start"] <= options["stop"]:
            raise ValueError(
                f"profile: got start {options['start']} and stop {options['stop']}, "
                "expected 0 <= start <= stop"
            )
        self._folder, self._start, self._stop = str(folder), options["start"], options["stop"]
        self._running = False

    def before(self, step: int) -> None:
        """To be called before the step that follows `step` finished ones is dispatched."""
        if self._running and step >= self._stop:
            self.close()
        if not self._running and self._start <= step < self._stop:
            jax.profiler.start_trace(self._folder)
            self._running = True

    def close(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

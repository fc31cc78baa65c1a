"""Numbers of a run: JSON lines, which are the source of truth, and the same for TensorBoard.

`metrics.jsonl` holds only what the run's config and seed determine, so the file of a run that was
killed and resumed is the file of a run that was not. What depends on the machine goes to
`timing.jsonl`.
"""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter


class JsonLines:
    """A file of one JSON object a line, each on disk as soon as it is written.

    Args:
      path: made if it is missing; lines already there stay.
      last_step: drop the lines of later steps, and a last line that was cut short.
    """

    def __init__(self, path: str | pathlib.Path, *, last_step: int | None = None):
        self.path = pathlib.Path(path)
        if self.path.exists():
            self._cut(last_step)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line. Numbers that are not finite become null, which JSON can hold.

        Raises:
          OSError: the line cannot be written.
        """
        with _naming(self.path):
            self._file.write(json.dumps(_plain(dict(line))) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _cut(self, last_step: int | None) -> None:
        lines = [
            line
            for line in read_lines(self.path)
            if last_step is None or line.get("step", 0) <= last_step
        ]
        fresh = self.path.with_name(self.path.name + ".new")
        with fresh.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)


class EventFile:
    """An event file for TensorBoard, written at once and in this thread, so that errors are seen.

    Args:
      folder: made if it is missing; each run of the program adds a file.
      first_step: events of other files from this step on are no longer shown.
    """

    def __init__(self, folder: str | pathlib.Path, *, first_step: int):
        self._path = pathlib.Path(folder, f"events.out.tfevents.{time.time_ns()}.{os.getpid()}")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = RecordWriter(str(self._path))
        self._write(Event(file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.SessionStatus.Value("START"))
        self._write(Event(session_log=start, step=first_step))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """One event with a scalar for each name. Raises OSError if it cannot be written."""
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in numbers.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with _naming(self._path):
            self._writer.write(event.SerializeToString())
            self._writer.flush()


class Metrics:
    """The metrics of a run in its work folder. Use as a context manager.

    Args:
      workdir: the run's folder; receives metrics.jsonl, timing.jsonl and tensorboard/.
      last_step: the step that the run goes on from, 0 for a fresh run; later lines are dropped.
    """

    def __init__(self, workdir: str | pathlib.Path, *, last_step: int):
        workdir = pathlib.Path(workdir)
        self._lines = JsonLines(workdir / "metrics.jsonl", last_step=last_step if last_step else -1)
        self._timing = JsonLines(workdir / "timing.jsonl")
        self._events = EventFile(workdir / "tensorboard", first_step=last_step + 1)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind, error, trace) -> None:
        # Closing fails again where writing failed; the first error is the one to hear about.
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            for file in (self._lines, self._timing, self._events):
                file.close()

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line {"kind", "step", ...values} and the same numbers on TensorBoard as kind/name."""
        self._lines.write({"kind": kind, "step": step, **values})
        self._show(kind, step, values)

    def write_timing(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """As `write`, for numbers that depend on the machine."""
        self._timing.write({"kind": kind, "step": step, **values})
        self._show(kind, step, values)

    def _show(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        numbers = {
            f"{kind}/{name}": value
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        self._events.write(step, numbers)


def read_lines(path: str | pathlib.Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line cut short by a kill is left out.

    Raises:
      ValueError: another line is not a JSON object.
    """
    lines = pathlib.Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        complete = number < len(lines)  # what follows the last newline was cut short, or is empty
        if complete and line:
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(value, dict):
                raise ValueError(f"{path}, line {number}: expected an object, got {line[:40]!r}")
            yield value


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Adds to the error of a full disk which file could not be written."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

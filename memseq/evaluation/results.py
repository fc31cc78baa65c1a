"""A run's folder: its rows, what made them, and the report.

    results.jsonl   one JSON object a line for each (memory, task, seed), written when it is known
    run.json        the command, the resolved config, versions, time
    report.html     the page, made from these two files and nothing else
    recall.png      its main figure

A trained row has `kind` "trained" and
- what it is: memory, title, layer, shape and paper (of the layer), task, task_description, seed;
- how it ended: status "ok" or "failed", error;
- what came out: accuracy (of the test), scores (by name), counts ((sum, count) of each score),
  by_position (accuracy at each position), validation_accuracy, learning_rate (the one chosen on
  validation), sweep (an object for each rate), curve ([step, training loss in nats]);
- beside it: chance, ceiling, train_length, test_length, test_examples, steps, batch, parameters,
  state_bytes (of one sequence at the test's length);
- cost: wall_seconds, cpu_seconds (the seed's share), program_* (all seeds and rates together);
- origin: config_hash, revision, versions, device, host, finished.

A closed-form row has `kind` "closed_form", memory (the rule), task "capacity", seed 0, draws (over
which its numbers are means), scores and points.
"""

import datetime
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

RESULTS, MANIFEST, REPORT, PICTURE = "results.jsonl", "run.json", "report.html", "recall.png"


class Folder:
    """The folder of one run."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.results = self.path / RESULTS
        self.report = self.path / REPORT
        self.picture = self.path / PICTURE
        self.manifest = self.path / MANIFEST

    def create(self) -> None:
        """Make the folder and see that it can be written.

        Raises:
          ValueError: it is a file, or holds other things than a run.
          OSError: it cannot be made or written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out folder {str(self.path)!r} is a file")
        self.path.mkdir(parents=True, exist_ok=True)
        strangers = sorted(set(os.listdir(self.path)) - {RESULTS, MANIFEST, REPORT, PICTURE})
        if strangers and not self.results.exists():
            raise ValueError(
                f"out folder {str(self.path)!r} holds other things than a run "
                f"({strangers[0]!r}); give a new folder"
            )
        # An unwritable folder is an error now, not after the training.
        self.results.open("a").close()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows and see them on the disk before returning."""
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        with open(self.results, "r+b") as file:
            # A run killed while it wrote leaves half a line: cut it off before it spoils the next
            whole = file.read()
            file.seek(whole.rfind(b"\n") + 1)
            file.truncate()
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """All finished rows; half a line at the end is left out.

        Raises:
          ValueError: there are no results, or a line that is not a row.
        """
        if not self.results.is_file():
            raise ValueError(f"there is no {RESULTS} in {str(self.path)!r}")
        lines = self.results.read_text(encoding="utf-8").split("\n")
        rows = []
        for number, line in enumerate(lines[:-1], 1):
            try:
                row = json.loads(line)
                row["kind"], row["memory"], row["task"], row["seed"], row["status"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{self.results}, line {number}: not a row of results") from error
            rows.append(row)
        return rows

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_whole(self.manifest, json.dumps(manifest, indent=2, allow_nan=False) + "\n")

    def read_manifest(self) -> dict[str, Any]:
        """What `write_manifest` wrote; empty if there is none."""
        if not self.manifest.is_file():
            return {}
        try:
            return json.loads(self.manifest.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.manifest} is not JSON: {error}") from error


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
    """Write a file all at once: whoever reads it sees the old content or the new."""
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def dated(parent: str | os.PathLike, now: datetime.datetime | None = None) -> pathlib.Path:
    """A folder in `parent`, named for the time, that does not exist yet."""
    stamp = (now or datetime.datetime.now()).strftime("%Y-%m-%d_%H-%M-%S")
    path, again = pathlib.Path(parent) / stamp, 1
    while path.exists():
        again += 1
        path = pathlib.Path(parent) / f"{stamp}_{again}"
    return path

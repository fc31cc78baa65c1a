"""The tables of a report as lists of text, for the terminal and the page alike."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from memseq.evaluation import capacity, frontier
from memseq.evaluation.figures import Data
from memseq.evaluation.verdict import number, spread

Table = tuple[list[str], list[list[str]]]  # header, lines


def leaderboard(data: Data) -> Table:
    """A line a memory: headline scores (median, lowest to highest), parameters, bytes, seconds."""
    tasks = [task for task in data.tasks if data.of(task) or data.of(task, failed=True)]
    header = ["memory", *(_score_name(data, task) for task in tasks)]
    header += ["parameters", "state", "CPU s a seed"]
    lines = []
    for label, title in data.titles.items():
        cells = [title]
        for task in tasks:
            found = spread(data.rows, label, task, data.headlines[task])
            failed = len(data.of(task, label, failed=True))
            text = str(found) if found else "-"
            cells.append(f"{text}, {failed} failed" if failed else text)
        lines.append(cells + _costs([row for task in tasks for row in data.of(task, label)]))
    return header, lines


def _costs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return ["-", "-", "-"]
    largest = max(rows, key=lambda row: row["state_bytes"])
    seconds = sum(row["cpu_seconds"] for row in rows) / len({row["seed"] for row in rows})
    size = frontier.size(largest["state_bytes"])
    return [f"{largest['parameters']:,}", size, f"{seconds:.0f}"]


def _score_name(data: Data, task: str) -> str:
    score = data.headlines[task]
    return task if score == "accuracy" else f"{task} {score}"


def cells(data: Data, task: str) -> Table:
    """Medians by the size of the example, where the task counts them apart ("64x16")."""
    rows = data.of(task)
    names = [name for name in (rows[0]["scores"] if rows else ()) if re.fullmatch(r"\d+x\d+", name)]
    names.sort(key=lambda name: [int(part) for part in name.split("x")])
    if not names:
        return [], []
    lines = []
    for label, title in data.titles.items():
        found = [spread(data.rows, label, task, name) for name in names]
        lines.append([title, *(str(value) if value else "-" for value in found)])
    return ["memory", *names], lines


def closed_form(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line a rule: accuracy by load, of rewritten keys (and stale answers), and noise."""
    unique, again = capacity.points(rows, "unique"), capacity.points(rows, "rewrite")
    if not unique:
        return [], []
    loads = [point["load"] for point in next(iter(unique.values()))]
    pairs = [point["pairs"] for point in next(iter(again.values()), [])]
    header = ["rule", *(f"N/d={load:g}" for load in loads)]
    header += [f"rewritten, N={count}" for count in pairs] + ["SNR at N=d"]
    lines = []
    for rule, points in unique.items():
        line = [capacity.TITLES.get(rule, rule), *(f"{p['accuracy']:.3f}" for p in points)]
        line += [f"{p['accuracy']:.3f} ({p['stale']:.3f})" for p in again.get(rule, [])]
        ratio = next((point["snr_db"] for point in points if point["load"] == 1), None)
        line.append("-" if ratio is None else "exact" if ratio >= 99 else f"{ratio:.1f} dB")
        lines.append(line)
    return header, lines


def memories(data: Data, config: Mapping[str, Any]) -> Table:
    """What was compared: the shape of each memory's state, its options and its source."""
    lines = []
    for label, title in data.titles.items():
        row = next((r for r in data.rows if (r["memory"], r["kind"]) == (label, "trained")), None)
        if row is not None:
            options = config["memories"][label]["options"]
            given = ", ".join(f"{name} {value}" for name, value in options.items())
            lines.append([title, row["shape"], given, row["paper"]])
    return ["memory", "its state", "options", "source"], lines


def runs(data: Data) -> Table:
    """Every run, finished or failed."""
    header = ["task", "memory", "seed", "accuracy", "rate", "CPU s", "settings"]
    lines = [
        [
            row["task"],
            row["title"],
            str(row["seed"]),
            "failed" if row["accuracy"] is None else number(row["accuracy"]),
            "-" if row.get("learning_rate") is None else f"{row['learning_rate']:g}",
            f"{row.get('cpu_seconds', 0):.1f}",
            row["config_hash"],
        ]
        for row in data.rows
        if row["kind"] == "trained"
    ]
    return header, lines


def as_text(table: Table) -> str:
    """Columns for a terminal: the first to the left, the others to the right."""
    header, lines = table
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [header, ["-" * width for width in widths], *lines]
    )

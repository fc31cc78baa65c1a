"""Figures of the trained memories: who remembers what, how it errs, how far it carries, at which
size.

Each function takes a `Data` and returns a `Canvas`, or None where the rows have nothing to show. A
seed is a dot; a median is a line or a bar and says so.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from memseq.evaluation.canvas import INK, PAPER, SOFT, Canvas, Panel
from memseq.evaluation.verdict import number, spread, where

WIDTH = 900.0
LABELS = 200.0  # room for the memories' names on the left

# Colours that stay apart for colour-blind readers (Okabe and Ito 2008), and a shape for each.
STYLES = (
    ("#3b4654", "circle"),
    ("#e69f00", "square"),
    ("#009e73", "diamond"),
    ("#56b4e9", "up"),
    ("#0072b2", "down"),
    ("#cc79a7", "pentagon"),
    ("#d55e00", "cross"),
)
# The memories of configs/recall look the same in every report, whatever else is compared.
KNOWN = (
    "softmax_attention",
    "linear_attention",
    "gated_linear_attention",
    "delta_net",
    "delta_net_2",
    "gated_delta_net",
    "mamba2",
)
RIGHT, KEPT, STALE, OTHER, WRONG = "#0072b2", "#8cc4e8", "#e69f00", "#c3c9d0", "#b3261e"


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows and what the config says about them.

    Attributes:
      rows: all rows of the run.
      titles: memory -> name in prose, in the order of the report.
      tasks: task -> name in prose, in that order.
      headlines: task -> the score that ranks its memories.
      questions: task -> what it asks, in a few words.
    """

    rows: Sequence[Mapping[str, Any]]
    titles: Mapping[str, str]
    tasks: Mapping[str, str]
    headlines: Mapping[str, str]
    questions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def of(self, task: str, memory: str | None = None, failed: bool = False) -> list[Mapping]:
        """Trained rows of a task, those that finished or those that failed."""
        return [
            row
            for row in self.rows
            if row["task"] == task
            and row["kind"] == "trained"
            and memory in (None, row["memory"])
            and (row["status"] != "ok") == failed
        ]

    def style(self, memory: str) -> tuple[str, str]:
        """(colour, shape)."""
        if memory in KNOWN:
            return STYLES[KNOWN.index(memory)]
        others = [label for label in self.titles if label not in KNOWN]
        taken = {label for label in self.titles if label in KNOWN}
        free = [style for label, style in zip(KNOWN, STYLES, strict=True) if label not in taken]
        order = free + list(STYLES)
        return order[others.index(memory) % len(order)]


def scores(data: Data) -> Canvas | None:
    """The main figure: every memory's headline score on every task, a dot a seed, beside each
    other.
    """
    tasks = [task for task in data.tasks if data.of(task)]
    if not tasks:
        return None
    row_height, top = 36.0, 64.0
    height = top + row_height * len(data.titles) + 44
    canvas = Canvas(WIDTH, height, "Score of every memory on every task, a dot for each seed")
    for i, label in enumerate(data.titles):
        y = top + row_height * (i + 0.5)
        colour, shape = data.style(label)
        canvas.dot(10, y, 5.5, colour, shape)
        canvas.text(24, y + 4.5, data.titles[label], size=13)
    gap = 34.0
    width = (WIDTH - LABELS - 10 - gap * (len(tasks) - 1)) / len(tasks)
    for i, task in enumerate(tasks):
        left = LABELS + i * (width + gap)
        panel = Panel(canvas, left, top, width - 46, row_height * len(data.titles), (0, 1), (0, 1))
        _score_panel(data, panel, task, row_height)
    return canvas


def _score_panel(data: Data, panel: Panel, task: str, row_height: float) -> None:
    score, canvas = data.headlines[task], panel.canvas
    example = data.of(task)[0]
    at = where(task, score).removeprefix(f"on {task}").strip()
    if example["train_length"] != example["test_length"]:
        at += f" (trained on {example['train_length']})"
    panel.title(data.tasks[task], data.questions.get(task, ""))
    ticks = [(t, f"{t:g}") for t in (0, 0.25, 0.5, 0.75, 1)]
    panel.ticks_x(ticks, f"accuracy {at}".strip(), grid=True)
    bottom = panel.top + panel.height
    chance = panel.at_x(example["chance"])
    canvas.line(((chance, panel.top - 2), (chance, bottom)), SOFT, dashed=True)
    canvas.text(chance + 4, bottom - 3, "chance", SOFT, size=10.5)
    for i, label in enumerate(data.titles):
        y = panel.top + row_height * (i + 0.5)
        if i:
            line = y - row_height / 2
            canvas.line(((panel.left, line), (panel.left + panel.width, line)), "#eef1f4")
        colour, shape = data.style(label)
        found = spread(data.rows, label, task, score)
        broken = len(data.of(task, label, failed=True))
        if found:
            x = panel.at_x(found.median)
            low, high = panel.at_x(found.low), panel.at_x(found.high)
            canvas.line(((low, y), (high, y)), colour, width=2, opacity=0.5)
            for row in data.of(task, label):
                value = row["scores"].get(score)
                if value is not None:
                    note = f"{data.titles[label]}, seed {row['seed']}: {value:.4f}"
                    canvas.dot(panel.at_x(value), y, 5, colour, shape, opacity=0.7, note=note)
            canvas.line(((x, y - 10), (x, y + 10)), INK, width=2)
            text = number(found.median)
            canvas.text(panel.left + panel.width + 8, y + 4.5, text, size=13, bold=True)
        if broken:
            text = f"{broken} failed"
            canvas.text(panel.left + panel.width - 4, y - 7, text, WRONG, size=10.5, anchor="end")
        elif not found:
            canvas.text(panel.left + 6, y + 4, "no run", SOFT, size=11)


def parts(data: Data, task: str, prefix: str = "") -> Canvas | None:
    """What the answers were: right after an update, right and kept, an older value, anything else.

    `prefix` names an extra test of the same models ("half: "); bars are means over seeds.
    """
    names = [prefix + name for name in ("updated", "kept", "stale", "other")]
    rows = [row for row in data.of(task) if prefix + "stale" in row["counts"]]
    if not rows:
        return None
    row_height, top = 30.0, 44.0
    canvas = Canvas(
        WIDTH,
        top + row_height * len(data.titles) + 26,
        "What was answered, as shares of the queries",
    )
    panel = Panel(
        canvas, LABELS, top, WIDTH - LABELS - 56, row_height * len(data.titles), (0, 1), (0, 1)
    )
    colours = (RIGHT, KEPT, STALE, OTHER)
    legend = (
        "right, after an update",
        "right, was never updated",
        "stale: an older value of the key",
        "any other answer",
    )
    x = LABELS
    for colour, text in zip(colours, legend, strict=True):
        canvas.rect(x, 12, 12, 12, colour)
        canvas.text(x + 17, 22, text, SOFT, size=11.5)
        x += 30 + 6.1 * len(text)
    panel.ticks_x([(t, f"{t:.0%}") for t in (0, 0.25, 0.5, 0.75, 1)], grid=True)
    for i, label in enumerate(data.titles):
        y = panel.top + row_height * i
        canvas.text(
            LABELS - 12, y + row_height / 2 + 4, data.titles[label], size=12.5, anchor="end"
        )
        own = [row for row in rows if row["memory"] == label]
        if not own:
            canvas.text(LABELS + 6, y + row_height / 2 + 4, "no finished run", SOFT, size=11)
            continue
        shares = [statistics.mean(_part(row, name, prefix) for row in own) for name in names]
        left = 0.0
        for share, colour, name in zip(shares, colours, legend, strict=True):
            start, end = panel.at_x(left), panel.at_x(min(left + share, 1.0))
            note = f"{data.titles[label]}, {name}: {share:.3f}"
            if share > 0:
                canvas.rect(start, y + 5, end - start, row_height - 10, colour, note=note)
            if end - start > 38:
                ink = PAPER if colour == RIGHT else INK
                middle = (start + end) / 2
                text = f"{share:.0%}"
                canvas.text(middle, y + row_height / 2 + 4, text, ink, size=11.5, anchor="middle")
            left += share
    return canvas


def _part(row: Mapping[str, Any], name: str, prefix: str) -> float:
    """A count as a share of all queries (a score `updated` is one of the updated queries)."""
    return row["counts"][name][0] / row["counts"][prefix + "accuracy"][1]


def by_position(data: Data, task: str) -> Canvas | None:
    """Accuracy at every position of a longer test, with the end of what was trained marked."""
    rows = [row for row in data.of(task) if row["by_position"]]
    if not rows or rows[0]["train_length"] == rows[0]["test_length"]:
        return None
    trained, tested = rows[0]["train_length"], rows[0]["test_length"]
    canvas = Canvas(WIDTH, 306, "Accuracy at every position, within and beyond the trained length")
    panel = Panel(canvas, 62, 40, WIDTH - 62 - 226, 226, (1, tested), (0, 1.0))
    panel.ticks_y([(t, f"{t:g}") for t in (0, 0.25, 0.5, 0.75, 1)], "accuracy")
    ticks = [t for t in (1, 8, 16, 32, 64, 128, 256, 512) if t <= tested]
    panel.ticks_x([(t, str(t)) for t in ticks], "position")
    edge = panel.at_x(trained + 0.5)
    canvas.rect(panel.left, panel.top, edge - panel.left, panel.height, "#f0f4f8")
    panel.ticks_y([(t, "") for t in (0.25, 0.5, 0.75, 1)])
    canvas.text(edge - 6, panel.top - 8, "trained", SOFT, size=11.5, anchor="end")
    canvas.text(edge + 6, panel.top - 8, "longer than any training example", SOFT, size=11.5)
    canvas.line(((edge, panel.top - 18), (edge, panel.top + panel.height)), SOFT, dashed=True)
    chance = panel.at_y(rows[0]["chance"])
    canvas.line(((panel.left, chance), (panel.left + panel.width, chance)), SOFT, dashed=True)
    canvas.text(panel.left + 6, chance + 14, "chance", SOFT, size=10.5)
    ends = []
    for label in data.titles:
        own = [row["by_position"] for row in rows if row["memory"] == label]
        if not own:
            continue
        medians = [
            (i + 1, statistics.median(values))
            for i, values in enumerate(zip(*own, strict=True))
            if None not in values
        ]
        if not medians:
            continue
        colour, shape = data.style(label)
        canvas.line((panel.at(*point) for point in medians), colour, width=2, opacity=0.9)
        tail = statistics.mean(value for _, value in medians[-max(1, len(medians) // 8) :])
        ends.append((panel.at_y(tail), label, colour, shape))
    for y, label, colour, shape in _apart(ends, 19):
        x = panel.left + panel.width + 16
        canvas.dot(x, y, 5, colour, shape)
        canvas.text(x + 12, y + 4, data.titles[label], size=12)
    return canvas


def _apart(ends: list[tuple], step: float) -> list[tuple]:
    """Labels moved as little as keeps them `step` apart, in the order of their heights."""
    ends = sorted(ends)
    # Heights less their place in the queue must not fall: neighbours that would are averaged.
    blocks: list[list[float]] = []
    for i, end in enumerate(ends):
        blocks.append([end[0] - i * step])
        while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    heights = [_mean(block) for block in blocks for _ in block]
    return [(y + i * step, *end[1:]) for i, (y, end) in enumerate(zip(heights, ends, strict=True))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

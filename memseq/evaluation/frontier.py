"""The figure of scores against the bytes of state that they take."""

import math
from collections.abc import Sequence

from memseq.evaluation.canvas import INK, Canvas, Panel
from memseq.evaluation.figures import WIDTH, Data
from memseq.evaluation.verdict import spread


def figure(data: Data) -> Canvas | None:
    """Score against the bytes of state that it takes; the line is the best median at a size or
    below.
    """
    tasks = [task for task in data.tasks if data.of(task)]
    if not tasks:
        return None
    legend_rows = math.ceil(len(data.titles) / 3)
    canvas = Canvas(WIDTH, 330 + 20 * legend_rows, "Score against state bytes")
    gap = 60.0
    width = (WIDTH - 62 - gap * (len(tasks) - 1) - 16) / len(tasks)
    sizes = [row["state_bytes"] for task in tasks for row in data.of(task)]
    low, high = min(sizes) / 2, max(sizes) * 2
    for i, task in enumerate(tasks):
        panel = Panel(canvas, 62 + i * (width + gap), 40, width, 220, (low, high), (0, 1.04), True)
        panel.title(data.tasks[task])
        panel.ticks_y([(t, f"{t:g}") for t in (0, 0.25, 0.5, 0.75, 1)], "" if i else "accuracy")
        powers = range(math.ceil(math.log2(low)), math.floor(math.log2(0.9 * high)) + 1)
        panel.ticks_x([(2**p, size(2**p)) for p in powers], "state bytes of one sequence")
        panel.base_line()
        best: list[tuple[float, float]] = []
        for label in data.titles:
            found = spread(data.rows, label, task, data.headlines[task])
            if not found:
                continue
            colour, shape = data.style(label)
            own = data.of(task, label)
            for row in own:
                value = row["scores"].get(data.headlines[task])
                if value is not None:
                    note = f"{data.titles[label]}, seed {row['seed']}: {value:.3f}"
                    x, y = panel.at(row["state_bytes"], value)
                    canvas.dot(x, y, 5, colour, shape, opacity=0.75, note=note)
            best.append((own[0]["state_bytes"], found.median))
        canvas.line((panel.at(*point) for point in hull(best, high)), INK, width=1.2, dashed=True)
    for i, label in enumerate(data.titles):
        x, y = 72 + (i % 3) * 275, 322 + 20 * (i // 3)
        canvas.dot(x, y, 5, *data.style(label))
        canvas.text(x + 12, y + 4, data.titles[label], size=12)
    return canvas


def hull(points: Sequence[tuple[float, float]], end: float) -> list[tuple[float, float]]:
    """The staircase of the best value at a size or below, up to the size `end`."""
    stairs: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not stairs or y > stairs[-1][1]:
            if stairs:
                stairs.append((x, stairs[-1][1]))
            stairs.append((x, y))
    return [*stairs, (end, stairs[-1][1])] if stairs else []


def size(count: float) -> str:
    """Bytes in the largest unit that leaves at least 1."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024 or unit == "MiB":
            return f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError("unreachable")

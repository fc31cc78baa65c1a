"""Figures of the training: every seed's loss, and how much the learning rate decides."""

import math
import statistics

from memseq.evaluation.canvas import SOFT, Canvas, Panel
from memseq.evaluation.figures import WIDTH, WRONG, Data


def losses(data: Data, task: str) -> Canvas | None:
    """A small panel a memory: the loss of every seed, with the level of a chance guesser."""
    rows = data.of(task) + data.of(task, failed=True)
    rows = [row for row in rows if row["curve"]]
    if not rows:
        return None
    columns = min(4, len(data.titles))
    gap, height, top = 26.0, 92.0, 34.0
    width = (WIDTH - 60 - gap * (columns - 1)) / columns
    pitch = height + 62
    lines = math.ceil(len(data.titles) / columns)
    canvas = Canvas(WIDTH, top + pitch * lines - 16, "Training loss of every seed")
    guess = -math.log(next((row["chance"] for row in rows if row.get("chance")), 1.0))
    highest = max(guess, max(loss for row in rows for _, loss in row["curve"])) * 1.05
    steps = max(step for row in rows for step, _ in row["curve"])
    ticks = [t for t in range(0, int(highest) + 1, 1 if highest < 6 else 2)]
    if highest < 1.5:
        ticks = [0, 0.5, 1]
    for i, label in enumerate(data.titles):
        left = 40 + (i % columns) * (width + gap)
        panel = Panel(
            canvas, left, top + pitch * (i // columns), width, height, (0, steps), (0, highest)
        )
        colour, shape = data.style(label)
        canvas.dot(left + 5, panel.top - 13, 4.5, colour, shape)
        canvas.text(left + 16, panel.top - 9, data.titles[label], size=11.5, bold=True)
        panel.ticks_y([(t, "" if i % columns else f"{t:g}") for t in ticks if t <= highest])
        last_line = i + columns >= len(data.titles)
        panel.ticks_x([(t, str(t)) for t in (0, steps)], "step" if last_line else "")
        level = panel.at_y(guess)
        canvas.line(((left, level), (left + width, level)), SOFT, dashed=True)
        for row in rows:
            if row["memory"] != label:
                continue
            failed = row["status"] != "ok"
            note = f"{data.titles[label]}, seed {row['seed']}" + (", diverged" if failed else "")
            points = [panel.at(step, loss) for step, loss in row["curve"]]
            ink = WRONG if failed else colour
            canvas.line(points, ink, width=1.6, opacity=0.85, note=note)
            if failed:
                canvas.dot(*points[-1], 4, WRONG, "cross", note=row["error"] or "failed")
    return canvas


def learning_rates(data: Data) -> Canvas | None:
    """Validation accuracy at every learning rate: a dot a seed, a line through the medians."""
    tasks = [task for task in data.tasks if data.of(task)]
    rates = sorted(
        {copy["learning_rate"] for task in tasks for row in data.of(task) for copy in row["sweep"]}
    )
    if len(rates) < 2:
        return None
    canvas = Canvas(WIDTH, 300, "Validation accuracy against the learning rate")
    gap = 60.0
    width = (WIDTH - 62 - gap * (len(tasks) - 1) - 16) / len(tasks)
    margin = (rates[-1] / rates[0]) ** 0.12
    for i, task in enumerate(tasks):
        panel = Panel(
            canvas,
            62 + i * (width + gap),
            40,
            width,
            205,
            (rates[0] / margin, rates[-1] * margin),
            (0, 1.04),
            log_x=True,
        )
        panel.title(data.tasks[task])
        label = "" if i else "validation accuracy"
        panel.ticks_y([(t, f"{t:g}") for t in (0, 0.25, 0.5, 0.75, 1)], label)
        panel.ticks_x([(rate, f"{rate:g}") for rate in rates], "learning rate")
        panel.base_line()
        for memory in data.titles:
            _rate_line(data, panel, task, memory, rates)
    return canvas


def _rate_line(data: Data, panel: Panel, task: str, memory: str, rates: list[float]) -> None:
    colour, shape = data.style(memory)
    medians = []
    place = list(data.titles).index(memory) - (len(data.titles) - 1) / 2
    for rate in rates:
        copies = [
            (row["seed"], copy)
            for row in data.of(task, memory) + data.of(task, memory, failed=True)
            for copy in row["sweep"]
            if copy["learning_rate"] == rate
        ]
        x = panel.at_x(rate) + 4 * place  # side by side, or the dots would cover each other
        values = [copy["validation"] for _, copy in copies if copy["validation"] is not None]
        for seed, copy in copies:
            name = f"{data.titles[memory]}, seed {seed}, rate {rate:g}"
            if copy["validation"] is None:
                canvas_y = panel.at_y(0.0)
                note = f"{name}: diverged at step {copy['failed_at']}"
                panel.canvas.dot(x, canvas_y, 4, WRONG, "cross", note=note)
            else:
                y = panel.at_y(copy["validation"])
                note = f"{name}: {copy['validation']:.3f}"
                panel.canvas.dot(x, y, 3.6, colour, shape, opacity=0.75, note=note)
        if values:
            medians.append((x, panel.at_y(statistics.median(values))))
    if len(medians) > 1:
        panel.canvas.line(medians, colour, width=1.4, opacity=0.6)

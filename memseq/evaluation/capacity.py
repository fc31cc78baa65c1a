"""The closed-form capacity probe in a report: its rows, its tables and its figure."""

import collections
import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

from memseq.evaluation.canvas import SOFT, Canvas, Panel
from memseq.evaluation.figures import WIDTH
from memseq.evaluation.jobs import machine
from memseq.tasks import capacity

TITLES = {
    "hebb": "Hebbian",
    "decay": "Hebbian with decay",
    "delta": "Delta rule",
    "least_squares": "Least squares",
    "softmax": "Softmax",
}
PROSE = {"hebb": "the Hebbian rule", "decay": "the decaying rule", "delta": "the delta rule"}
# The colours of the trained memories that follow the rule.
STYLES = {
    "hebb": ("#e69f00", "square"),
    "decay": ("#009e73", "diamond"),
    "delta": ("#0072b2", "down"),
    "least_squares": ("#cc79a7", "pentagon"),
    "softmax": ("#3b4654", "circle"),
}


def rows(variant: str) -> list[dict[str, Any]]:
    """One row a rule: `scores` by name, and all `points` of `memseq.tasks.capacity.table`.

    The first size and correlation of the preset give the named scores.
    """
    points = capacity.table(variant)
    first = (points[0]["dim"], points[0]["correlation"])
    by_rule = collections.defaultdict(list)
    for point in points:
        by_rule[point["rule"]].append(point)
    about = {
        "kind": "closed_form",
        "task": "capacity",
        "seed": 0,
        "draws": capacity.Setting().seeds,  # every number is a mean over these
        "status": "ok",
        "error": None,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **machine(),
    }
    return [
        {
            **about,
            "memory": rule,
            "title": TITLES.get(rule, rule),
            "scores": _scores(
                point for point in found if (point["dim"], point["correlation"]) == first
            ),
            "points": found,
        }
        for rule, found in by_rule.items()
    ]


def _scores(points) -> dict[str, float]:
    scores = {}
    for point in points:
        if point["table"] == "unique":
            scores[f"unique N/d={point['load']:g}"] = point["accuracy"]
            scores[f"snr_db N/d={point['load']:g}"] = point["snr_db"]
        elif point["table"] == "rewrite":
            scores[f"rewrite N={point['pairs']}"] = point["accuracy"]
            scores[f"stale N={point['pairs']}"] = point["stale"]
        else:
            scores[f"forgetting octile={point['octile']}"] = point["accuracy"]
    return scores


def points(rows: Sequence[Mapping[str, Any]], table: str) -> dict[str, list[dict[str, Any]]]:
    """Rule -> its points of one table, at the first size and correlation of the preset."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "closed_form":
            own = [point for point in row["points"] if point["table"] == table]
            first = own and (own[0]["dim"], own[0]["correlation"])
            found[row["memory"]] = [p for p in own if (p["dim"], p["correlation"]) == first]
    return {rule: own for rule, own in found.items() if own}


def figure(rows: Sequence[Mapping[str, Any]]) -> Canvas | None:
    """Accuracy and signal-to-noise ratio against load, and accuracy by age."""
    unique, aged = points(rows, "unique"), points(rows, "forgetting")
    if not unique:
        return None
    canvas = Canvas(WIDTH, 346, "Closed-form capacity of five memory rules")
    width, gap, top, height = 228.0, 68.0, 54.0, 190.0
    loads = sorted({point["load"] for own in unique.values() for point in own})
    dim = next(iter(unique.values()))[0]["dim"]
    span = (loads[0] / 1.15, loads[-1] * 1.15)
    recall = Panel(canvas, 50, top, width, height, span, (0, 1.04), True)
    recall.title("How many pairs it holds", "accuracy, every key bound once")
    recall.ticks_y([(t, f"{t:g}") for t in (0, 0.25, 0.5, 0.75, 1)])
    noise = Panel(canvas, 50 + width + gap, top, width, height, span, (5, 22), True)
    noise.title("Signal to noise, in decibel", "of what is read; exact recall is not drawn")
    noise.ticks_y([(t, f"{t}") for t in (6, 9, 12, 15, 18, 21)])
    for panel in (recall, noise):
        panel.ticks_x([(load, f"{load:g}") for load in loads], "pairs per dimension, N/d")
        panel.base_line()
    age = Panel(canvas, 50 + 2 * (width + gap), top, width, height, (0.7, 8.3), (0, 1.04))
    pairs = next(iter(aged.values()))[0]["pairs"]
    age.title("What it forgets", f"accuracy by age, N = {pairs} pairs, d = {dim}")
    age.ticks_y([(t, f"{t:g}") for t in (0, 0.25, 0.5, 0.75, 1)])
    age.ticks_x([(1, "oldest"), (8, "newest")], "eighth of the pairs")
    age.base_line()
    # N/d law: the power of N - 1 other values, spread over d * d numbers
    law = [noise.at(x, 10 * math.log10(dim / x)) for x in loads]
    canvas.line(law, SOFT, width=1.2, dashed=True)
    canvas.text(law[-1][0] - 6, law[-1][1] + 16, "3 dB a doubling", SOFT, size=10.5, anchor="end")
    for rule, own in unique.items():
        _line(recall, rule, [(p["load"], p["accuracy"]) for p in own])
        _line(noise, rule, [(p["load"], p["snr_db"]) for p in own if p["snr_db"] < noise.y[1]])
        _line(age, rule, [(p["octile"], p["accuracy"]) for p in aged.get(rule, [])])
    x = 50.0
    for rule in unique:
        canvas.dot(x + 5, 326, 5, *STYLES.get(rule, (SOFT, "circle")))
        canvas.text(x + 16, 330, TITLES.get(rule, rule), size=12)
        x += 44 + 6.6 * len(TITLES.get(rule, rule))
    return canvas


def _line(panel: Panel, rule: str, values: list[tuple[float, float]]) -> None:
    colour, shape = STYLES.get(rule, (SOFT, "circle"))
    places = [panel.at(*value) for value in values]
    if len(places) > 1:
        panel.canvas.line(places, colour, width=1.8)
    for (x, y), (load, value) in zip(places, values, strict=True):
        note = f"{TITLES.get(rule, rule)}, {load:g}: {value:.3f}"
        panel.canvas.dot(x, y, 4.2, colour, shape, note=note)

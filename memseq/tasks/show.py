"""`memseq tasks list` and `memseq tasks show NAME`: the tasks, and an annotated example of one."""

import argparse
import inspect
import shutil
import textwrap
from collections.abc import Sequence
from types import ModuleType

import jax
import numpy as np

from memseq import tasks
from memseq.tasks import base

NOTHING = "."
# Runs of this many columns that differ in their position only are shown as their ends.
RUN = 4


def main(args: argparse.Namespace) -> int:
    """Prints what `args` asks for: `action`, "list" or "show"; then `name`, `variant`, `seed`.

    Returns the exit status, 0. Raises `ValueError` for a task, variant or seed that does not exist.
    """
    base.check_name("action", args.action, ("list", "show"))
    width = max(40, shutil.get_terminal_size((100, 24)).columns)
    if args.action == "list":
        print(listing(width))
    else:
        print(shown(args.name, args.variant, args.seed, width))
    return 0


def listing(width: int) -> str:
    """A table of all tasks at their default variant."""
    rows = []
    for name, cls in tasks.REGISTRY.items():
        task = cls.preset()
        numbers = (f"{task.chance:.3f}", f"{task.ceiling:.3f}", task.length, task.vocab_size)
        rows.append((name, *map(str, numbers), ", ".join(cls.VARIANTS), cls.SUMMARY))
    for name, probe in tasks.PROBES.items():
        numbers = (f"{probe.CHANCE:.3f}", f"{probe.CEILING:.3f}", "-", "-")
        rows.append((name, *numbers, ", ".join(probe.VARIANTS), probe.SUMMARY))
    head = ("task", "chance", "ceiling", "length", "ids", "variants", "")
    *columns, summaries = zip(head, *rows, strict=True)
    cells = [_align(column, left=number in (0, 5)) for number, column in enumerate(columns)]
    lines = []
    for *line, summary in zip(*cells, summaries, strict=True):
        lines.append("  ".join(line).rstrip())
        indent = {"initial_indent": "    ", "subsequent_indent": "    "}
        lines += textwrap.wrap(summary, width, **indent)
    note = "Numbers are those of the first variant. An annotated example: memseq tasks show NAME"
    return "\n".join([*lines, "", *textwrap.wrap(note, width)])


def shown(name: str, variant: str | None, seed: int, width: int) -> str:
    """A task's sizes and levels and its `example(jax.random.key(seed))`; or a probe's tables."""
    base.check_name("name", name, [*tasks.REGISTRY, *tasks.PROBES])
    if not 0 <= base.check_integer("seed", seed, 0) < 2**32:
        raise ValueError(f"seed: expected a whole number below 2**32, got {seed}")
    if name in tasks.PROBES:
        return probe_text(name, tasks.PROBES[name], variant, width)
    task = tasks.get(name, variant)
    example = jax.tree.map(np.asarray, jax.jit(task.example)(jax.random.key(seed)))
    facts = [
        ("variant", f"{task.variant} (of: {', '.join(task.VARIANTS)})"),
        ("setting", task.details()),
        ("tested on", task.eval_variant().details() if task.test else ""),
        ("length", f"{task.length} positions, {int(example['mask'].sum())} scored in this example"),
        ("vocabulary", f"{task.vocab_size} token ids"),
        ("chance", _level(task.chance, type(task), "chance")),
        ("ceiling", _level(task.ceiling, type(task), "ceiling")),
    ]
    rows, constant, legend = example_rows(task, example)
    lines = [*textwrap.wrap(f"{name}: {task.SUMMARY}", width), "", *_facts(facts, width), ""]
    title = f"Example with seed {seed}"
    lines += textwrap.wrap(f"{title} ({', '.join(constant)})" if constant else title, width)
    return "\n".join([*lines, "", *_blocks(rows, width), *_facts(legend, width)])


def example_rows(
    task: base.Task, example: base.Example
) -> tuple[dict[str, list[str]], list[str], list[tuple[str, str]]]:
    """Rows of one text for each position; what is the same at all of them; what the rows mean."""
    meta, mask = example["meta"], example["mask"]
    roles = [task.ROLES[role] for role in meta["role"]]
    rows = {
        "position": [str(position) for position in range(task.length)],
        "role": [NOTHING if role == "filler" else role for role in roles],
        "input": [str(token) for token in example["inputs"]],
        "target": [
            str(token) if scored else NOTHING
            for token, scored in zip(example["targets"], mask, strict=True)
        ],
    }
    constant = []
    legend = [("target", f"the token wanted as the answer; {NOTHING} where nothing is scored")]
    for entry, meaning in task.META.items():
        texts = [_text(value) for value in meta[entry]]
        if len(set(texts)) == 1:
            constant += [] if texts[0] == NOTHING else [f"{entry}: {texts[0]}"]
            continue
        rows[entry] = texts
        legend.append((entry, meaning))
    return rows, constant, legend


def probe_text(name: str, probe: ModuleType, variant: str | None, width: int) -> str:
    """A closed-form probe and its tables, a line for each setting and a column for each rule."""
    variant = next(iter(probe.VARIANTS)) if variant is None else variant
    rows = probe.table(variant)
    facts = [
        ("variant", f"{variant} (of: {', '.join(probe.VARIANTS)})"),
        ("chance", _level(probe.CHANCE, probe, "chance")),
        ("ceiling", _level(probe.CEILING, probe, "ceiling")),
    ]
    lines = [*textwrap.wrap(f"{name}: {probe.SUMMARY}", width), "", *_facts(facts, width)]
    for title in dict.fromkeys(row["table"] for row in rows):
        chosen = [row for row in rows if row["table"] == title]
        values = [key for key in ("accuracy", "snr_db", "stale") if key in chosen[0]]
        other = [key for key in chosen[0] if key not in ("table", "rule", "state_bytes", *values)]
        settings = [key for key in other if len({row[key] for row in chosen}) > 1]
        fixed = [f"{key} {chosen[0][key]:g}" for key in other if key not in settings]
        rules = list(dict.fromkeys(row["rule"] for row in chosen))
        grid: dict[tuple, dict[str, str]] = {}
        for row in chosen:
            cell = " ".join(f"{row[key]:.{1 if key == 'snr_db' else 3}f}" for key in values)
            grid.setdefault(tuple(f"{row[key]:g}" for key in settings), {})[row["rule"]] = cell
        left = [_align(column) for column in zip(settings, *grid, strict=True)]
        right = [_align([rule, *(cells[rule] for cells in grid.values())]) for rule in rules]
        head = f"{title}: {', '.join(values)}" + (f" ({', '.join(fixed)})" if fixed else "")
        lines += ["", *textwrap.wrap(head, width)]
        room = width - sum(len(column[0]) + 2 for column in left)
        at_once = max(1, room // (max(len(column[0]) for column in right) + 2))
        for first in range(0, len(right), at_once):
            columns = [*left, *right[first : first + at_once]]
            lines += ["", *map("  ".join, zip(*columns, strict=True))]
    return "\n".join(lines)


def _level(value: float, documented: object, name: str) -> str:
    """A chance level or ceiling, with the paragraph of the docstring that says why it is that."""
    start = f"{name.capitalize()} is "
    paragraphs = (inspect.getdoc(documented) or "").split("\n\n")
    reasons = [text.removeprefix(start) for text in paragraphs if text.startswith(start)]
    return ": ".join([f"{value:.3f}", *reasons]).replace("`", "")


def _text(value: np.ndarray) -> str:
    """One entry of `meta` at one position."""
    if value.ndim:
        return "/".join(str(item) for item in value if item >= 0) or NOTHING
    if value.dtype == bool:
        return "yes" if value else NOTHING
    return NOTHING if value == -1 else str(value)


def _align(column: Sequence[str], left: bool = False) -> list[str]:
    width = max(map(len, column))
    return [text.ljust(width) if left else text.rjust(width) for text in column]


def _facts(facts: Sequence[tuple[str, str]], width: int) -> list[str]:
    """Lines of a name and its text, the text wrapped in a column of its own."""
    start = max(len(name) for name, _ in facts) + 4
    lines = []
    for name, text in facts:
        if text:
            wrapped = textwrap.wrap(text, max(width - start, 24))
            lines.append(f"  {name}".ljust(start) + ("\n" + " " * start).join(wrapped))
    return lines


def _blocks(rows: dict[str, list[str]], width: int) -> list[str]:
    """Rows of columns, cut into blocks that are no wider than `width`; rows with nothing to say in
    one are left out."""
    columns = _shorten(list(zip(*rows.values(), strict=True)))
    label = max(map(len, rows)) + 2
    cell = max(len(text) for column in columns for text in column) + 1
    at_once = max(1, (width - label) // cell)
    lines = []
    for first in range(0, len(columns), at_once):
        for name, texts in zip(
            rows, zip(*columns[first : first + at_once], strict=True), strict=True
        ):
            if set(texts) - {NOTHING, ""}:
                lines.append(name.ljust(label) + "".join(text.rjust(cell) for text in texts))
        lines.append("")
    return lines


def _shorten(columns: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """`columns` with the inside of long runs of equal ones (but for the first row, the position) as
    one of dots."""
    short: list[tuple[str, ...]] = []
    start = 0
    for end in range(1, len(columns) + 1):
        if end < len(columns) and columns[end][1:] == columns[start][1:]:
            continue
        run = columns[start:end]
        dots = ("..", *("" for _ in run[0][1:]))
        short += run if len(run) < RUN else [run[0], dots, run[-1]]
        start = end
    return short

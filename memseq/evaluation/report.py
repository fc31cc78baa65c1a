"""The report of a run: a page with its figures inside, a picture, and what the terminal shows."""

import datetime
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from memseq.evaluation import capacity, curves, figures, frontier, tables, verdict
from memseq.evaluation.canvas import Canvas
from memseq.evaluation.figures import Data
from memseq.evaluation.page import PAGE
from memseq.evaluation.results import Folder, write_whole
from memseq.evaluation.tables import Table
from memseq.evaluation.verdict import Outcome, number
from memseq.training.progress import duration

Manifest = Mapping[str, Any]

CAPTIONS = {
    "scores": """
        Every memory is one layer of the same width in the same model, trained for the same
        number of steps. A mark is a seed, the black bar the median, whose value stands at
        the right. The dashed line is what guessing reaches.""",
    "leaderboard": """
        Median over seeds (lowest to highest, where they differ). State is what one sequence
        carries after the last position of the test, counted from its own arrays.""",
    "position": """
        Median over seeds of the accuracy at each position of the test. The shaded part is as long
        as the training examples; a memory that has learned the rule, and not the length, goes on
        at 1.""",
    "parts": """
        What was answered, as shares of all queries (means over seeds). A stale answer is a value
        that the key had before: the memory kept it and did not let go of it.""",
    "also": """
        The same models, without more training, on the preset “{}”: only some of the keys are
        updated, and the others have to be kept.""",
    "frontier": """
        Upper left is better. The dashed line is the best median at a size or below: what lies
        under it is beaten by something that is no larger.""",
    "capacity": """
        Random unit keys are bound to random values and read back; means over 8 draws. Rules that
        add hold more pairs that are bound once; the delta rule, which makes room for what it
        writes, keeps up with rewriting (table). So both belong in a comparison.""",
    "closed_form": """
        Share of the values read back right among 256 candidates: N pairs in d = 32 dimensions, then
        keys that are bound four times, with the share of older values in brackets. Linear attention
        is Hebbian, gated linear attention and Mamba-2 are with decay, the mesa layer is least
        squares.""",
    "losses": """
        {}: training loss in nats, a line a seed, at the learning rate that validation
        chose. The dashed line is the loss of guessing at chance. A long plateau before the
        fall is a memory that has not found its keys yet; a line that still falls at the end
        would gain from more steps.""",
    "rates": """
        Validation accuracy at each learning rate: a mark a seed, a line through the medians. Each
        seed is reported at its own best rate; the tests were not looked at for that choice.""",
    "runs": """
        Accuracy over all scored positions of the test, at the rate that validation chose.""",
}


def write(folder: Folder) -> None:
    """Write the page and the picture of a run from what its folder holds.

    Raises:
      ValueError: the folder holds no run, or one whose files are damaged.
    """
    rows, manifest = folder.rows(), folder.read_manifest()
    data = data_of(rows, manifest)
    write_whole(folder.report, page(data, manifest))
    main = figures.scores(data)
    if main is not None:
        main.png(folder.picture)


def data_of(rows: Sequence[Mapping[str, Any]], manifest: Manifest) -> Data:
    """The rows that the run's config asks for, with its names and in its order."""
    config = manifest["config"]

    def of_tasks(key: str) -> dict[str, str]:
        return {label: config["tasks"][label][key] for label in config["on"]}

    return Data(
        rows=[
            row
            for row in rows
            if row["kind"] == "closed_form"
            or (row["memory"] in config["compare"] and row["task"] in config["on"])
        ],
        titles={label: config["memories"][label]["title"] for label in config["compare"]},
        tasks=of_tasks("title"),
        headlines=of_tasks("headline"),
        questions=of_tasks("question"),
    )


def outcomes(data: Data, manifest: Manifest) -> list[Outcome]:
    """The config's claims beside the numbers."""
    return verdict.judge(manifest["config"]["claims"], data.rows, _names(data))


def _names(data: Data) -> dict[str, str]:
    return {**capacity.PROSE, **data.titles}


def summary(rows: Sequence[Mapping[str, Any]], manifest: Manifest) -> str:
    """What the terminal shows at the end: the tables and the verdict."""
    data = data_of(rows, manifest)
    text = [tables.as_text(tables.leaderboard(data))]
    for task, title in data.tasks.items():
        by_size = tables.cells(data, task)
        if by_size[1]:
            text += [f"{title}, by length and pairs:", tables.as_text(by_size)]
    closed_form = tables.closed_form(rows)
    if closed_form[1]:
        text.append(
            "Closed form, values read back; of keys bound 4 times the newest (an older one):"
        )
        text.append(tables.as_text(closed_form))
    judged = outcomes(data, manifest)
    text.append(verdict.sentence(judged, data.rows, data.titles, data.headlines))
    return "\n\n".join(text)


def page(data: Data, manifest: Manifest) -> str:
    """The whole page as HTML; it needs nothing from outside itself."""
    judged = outcomes(data, manifest)
    sections = [
        _figure(figures.scores(data), "scores"),
        _table(tables.leaderboard(data), "leaderboard"),
        _folded("The memories", _table(tables.memories(data, manifest["config"]))),
        *(_task(data, task, manifest["config"]["tasks"][task]["also"]) for task in data.tasks),
        _section(
            "Score against the size of the memory", _figure(frontier.figure(data), "frontier")
        ),
        _section(
            "The bare rules, without training",
            _figure(capacity.figure(data.rows), "capacity"),
            _table(tables.closed_form(data.rows), "closed_form"),
        ),
        _section(
            "Training",
            *(
                _figure(curves.losses(data, task), "losses", data.tasks[task])
                for task in data.tasks
            ),
            _figure(curves.learning_rates(data), "rates"),
        ),
        _folded("Every run", _table(tables.runs(data), "runs")),
        _reproduce(data, manifest),
    ]
    return PAGE.substitute(
        title="What remembers what",
        kicker=html.escape(_kicker(data, manifest)),
        verdict=html.escape(verdict.sentence(judged, data.rows, data.titles, data.headlines)),
        claims=_claims(judged, _names(data)),
        failed=_failed(data),
        body="\n".join(section for section in sections if section),
    )


def _kicker(data: Data, manifest: Manifest) -> str:
    started = datetime.datetime.fromisoformat(manifest["started"])
    seeds = len({row["seed"] for row in data.rows if row["kind"] == "trained"})
    parts = [
        "memseq recall",
        f"{started.day} {started:%B %Y}",
        f"{len(data.titles)} memories",
        " and ".join(data.tasks.values()),
        f"{seeds} seed{'' if seeds == 1 else 's'}",
    ]
    return " · ".join(parts)


def _claims(judged: Sequence[Outcome], titles: Mapping[str, str]) -> str:
    """The expectations one by one, each with what was measured."""
    if not judged:
        return ""
    lines = []
    for outcome in judged:
        state = "holds" if outcome.holds else "fails"
        text = html.escape(verdict.statement(outcome.claim, titles))
        value = "not measured" if outcome.value is None else number(outcome.value)
        lines.append(f'<tr class="{state}"><td>{state}</td><td>{text}</td><td>{value}</td></tr>')
    head = "<tr><th></th><th>expected of the medians</th><th>measured</th></tr>"
    body = "".join(lines)
    return f'<table class="claims"><thead>{head}</thead><tbody>{body}</tbody></table>'


def _failed(data: Data) -> str:
    items = []
    for row in data.rows:
        if row["status"] != "ok":
            text = f"{row['title']} on {row['task']}, seed {row['seed']}: {row['error']}"
            items.append(f"<li>{html.escape(text)}</li>")
    if not items:
        return ""
    return f'<div class="failed"><b>Failed runs</b><ul>{"".join(items)}</ul></div>'


def _task(data: Data, task: str, also: Sequence[str]) -> str:
    rows = data.of(task)
    if not rows:
        return ""
    about = html.escape(rows[0]["task_description"])
    return _section(
        data.tasks[task],
        f'<p class="note">{about[0].upper()}{about[1:]}.</p>',
        _figure(figures.by_position(data, task), "position"),
        _figure(figures.parts(data, task), "parts"),
        *(_figure(figures.parts(data, task, f"{name}: "), "also", name) for name in also),
        _table(tables.cells(data, task)),
    )


def _section(title: str, *content: str) -> str:
    """A heading and what stands under it; nothing if there is nothing."""
    if not any(content):
        return ""
    return "\n".join([f"<h2>{html.escape(title)}</h2>", *filter(None, content)])


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>" if content else ""


def _caption(name: str, *words: str) -> str:
    return html.escape(" ".join(CAPTIONS[name].format(*words).split()))


def _figure(canvas: Canvas | None, caption: str, *words: str) -> str:
    if canvas is None:
        return ""
    text = _caption(caption, *words)
    return f"<figure>{canvas.svg()}<figcaption>{text}</figcaption></figure>"


def _table(table: Table, caption: str = "") -> str:
    header, lines = table
    if not lines:
        return ""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in lines
    )
    text = f'<p class="caption">{_caption(caption)}</p>' if caption else ""
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{whole}</div>{text}'


def _reproduce(data: Data, manifest: Manifest) -> str:
    trained = [row for row in data.rows if row["kind"] == "trained"]
    seconds = sum(row.get("cpu_seconds", 0) for row in trained)
    facts = {
        "revision": manifest["revision"] or "not a git checkout",
        "versions": ", ".join(f"{name} {text}" for name, text in manifest["versions"].items()),
        "device": f"{manifest['device']}, {manifest['host']}",
        "cost": f"{duration(seconds)} of CPU time",
        "numbers": "results.jsonl, one row for each memory, task and seed",
    }
    items = "".join(f"<dt>{name}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items())
    config = html.escape(json.dumps(manifest["config"], indent=2, sort_keys=True))
    return _section(
        "How to reproduce",
        f"<pre>{html.escape(manifest['command'])}</pre><dl>{items}</dl>",
        _folded("The whole config", f"<pre>{config}</pre>"),
    )

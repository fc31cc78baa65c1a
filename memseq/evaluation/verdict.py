"""From rows to numbers, and from numbers to one sentence.

Nothing here is written in advance: a claim is a line of the config, its outcome and its clause come
  from the medians over seeds, and where a claim fails the sentence says so.
"""

import dataclasses
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Spread:
    """A score over seeds: median, lowest and highest."""

    median: float
    low: float
    high: float
    values: tuple[float, ...]

    def __str__(self) -> str:
        shown = {number(value) for value in (self.low, self.median, self.high)}
        if len(shown) == 1:
            return shown.pop()
        return f"{number(self.median)} ({number(self.low)} to {number(self.high)})"


def number(value: float) -> str:
    """Three decimals below 0.1 of 0 and 1, where they tell, and two in between."""
    return f"{value:.3f}" if value > 0.9 or value < 0.1 else f"{value:.2f}"


def spread(rows: Iterable[Row], memory: str, task: str, score: str) -> Spread | None:
    """The score's spread over the finished seeds; None if no seed has it."""
    values = tuple(
        row["scores"][score]
        for row in rows
        if (row["memory"], row["task"], row["status"]) == (memory, task, "ok")
        and row["scores"].get(score) is not None
    )
    if not values:
        return None
    return Spread(statistics.median(values), min(values), max(values), values)


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a run should show: `task score: memory [- other] >= bound`, or `<=`."""

    text: str
    task: str
    score: str
    memory: str
    other: str | None
    at_least: bool
    bound: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A claim beside the numbers.

    `value` is a median or a difference of two, None if it was not measured; `subject` and
    `predicate` say so in prose.
    """

    claim: Claim
    value: float | None
    holds: bool
    subject: str
    predicate: str


CLAIM = re.compile(
    r"(?P<task>\w+) (?P<score>[^:]+): (?P<memory>\w+)( - (?P<other>\w+))? "
    r"(?P<sign>[<>]=) (?P<bound>-?[\d.]+)"
)


def parse_claim(text: str) -> Claim:
    """Raises `ValueError` for a text that is not a claim."""
    found = CLAIM.fullmatch(text.strip())
    if not found:
        raise ValueError(
            f"claim {text!r}: expected 'TASK SCORE: MEMORY >= NUMBER' (or <=, or MEMORY - MEMORY)"
        )
    part = found.groupdict()
    return Claim(
        text.strip(),
        part["task"],
        part["score"],
        part["memory"],
        part["other"],
        part["sign"] == ">=",
        float(part["bound"]),
    )


def judge(claims: Sequence[str], rows: Sequence[Row], titles: Mapping[str, str]) -> list[Outcome]:
    """Hold every claim against the medians of `rows`; `titles` are the memories' names."""
    return [_judge(parse_claim(text), rows, titles) for text in claims]


def _judge(claim: Claim, rows: Sequence[Row], titles: Mapping[str, str]) -> Outcome:
    subject = prose(titles.get(claim.memory, claim.memory))
    first = spread(rows, claim.memory, claim.task, claim.score)
    if first is None:
        return Outcome(claim, None, False, subject, "has no finished run")
    limit = f"expected at {'least' if claim.at_least else 'most'} {claim.bound:g}"
    if claim.other is None:
        value = first.median
        holds = value >= claim.bound if claim.at_least else value <= claim.bound
        verb = {
            (True, True): "reaches",
            (True, False): "reaches only",
            (False, True): "stays at",
            (False, False): "gets to",
        }[claim.at_least, holds]
        predicate = f"{verb} {first}" + ("" if holds else f" ({limit})")
        return Outcome(claim, value, holds, subject, predicate)
    name = prose(titles.get(claim.other, claim.other))
    other = spread(rows, claim.other, claim.task, claim.score)
    if other is None:
        return Outcome(claim, None, False, name, "has no finished run")
    value = first.median - other.median
    holds = value >= claim.bound if claim.at_least else value <= claim.bound
    only = "only " if claim.at_least and 0 <= value and not holds else ""
    predicate = f"is {only}{abs(value):.2f} {'above' if value >= 0 else 'below'} {name}"
    return Outcome(claim, value, holds, subject, predicate + ("" if holds else f" ({limit} above)"))


def prose(title: str) -> str:
    """A title inside a sentence: "Linear attention (no positions)" is no name, "DeltaNet" is."""
    common, _, rest = title.partition(" (")
    if re.fullmatch(r"[A-Z][a-z]+( [a-z]+)*", common):
        return title[0].lower() + title[1:]
    return title


def statement(claim: Claim, titles: Mapping[str, str]) -> str:
    """A claim in words, for a table."""
    first = prose(titles.get(claim.memory, claim.memory))
    sign = "≥" if claim.at_least else "≤"
    if claim.other:
        first += f" above {prose(titles.get(claim.other, claim.other))}, by"
    return f"{where(claim.task, claim.score)}: {first} {sign} {claim.bound:g}"


def sentence(
    outcomes: Sequence[Outcome],
    rows: Sequence[Row],
    titles: Mapping[str, str],
    headlines: Mapping[str, str],
) -> str:
    """The verdict: what held and what did not, in the numbers of this run.

    Args:
      outcomes: of `judge`; without any, the sentence names the best memory of each task.
      rows: all rows; failed ones are counted.
      titles: memory -> name in prose.
      headlines: task -> the score by which its memories are ranked.
    """
    trained = [row for row in rows if row["kind"] == "trained"]
    seeds = len({row["seed"] for row in trained})
    failed = sum(row["status"] != "ok" for row in trained)
    over = f"over {seeds} seeds" if seeds > 1 else "with one seed"
    if outcomes:
        wrong = [outcome for outcome in outcomes if not outcome.holds]
        right = [outcome for outcome in outcomes if outcome.holds]
        parts = []
        if wrong:
            fail = "fails" if len(wrong) == 1 else "fail"
            parts.append(
                f"{len(wrong)} of {len(outcomes)} expectations {fail} {over}: {_clauses(wrong)}"
            )
            if right:
                parts.append(f"what held: {_clauses(right)}")
        else:
            parts.append(f"All {len(outcomes)} expectations hold {over}: {_clauses(right)}")
        text = "; ".join(parts)
    else:
        leaders = [_leader(rows, task, score, titles) for task, score in headlines.items()]
        text = f"{over[0].upper()}{over[1:]}: " + "; ".join(filter(None, leaders))
        if not any(leaders):
            text = "No run finished"
    if failed:
        text += f"; {failed} of {len(trained)} runs failed"
    return text + "."


def where(task: str, score: str) -> str:
    """A score in prose: "on rewrite", "on parity at positions 33 to 64"."""
    if task == "capacity":
        kind, _, at = score.partition(" ")
        kinds = {"unique": "with keys bound once", "rewrite": "with keys bound four times"}
        return f"in closed form {kinds.get(kind, kind)} ({at.replace('=', ' = ')})"
    if re.fullmatch(r"\d+-\d+", score):
        return f"on {task} at positions {score.replace('-', ' to ')}"
    return f"on {task}" if score == "accuracy" else f"on {task} ({score})"


def _clauses(outcomes: Sequence[Outcome]) -> str:
    """What is said of one score stands together, and of one memory under its name once."""
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for outcome in outcomes:
        key = (outcome.claim.task, outcome.claim.score)
        groups.setdefault(key, {}).setdefault(outcome.subject, []).append(outcome.predicate)
    return "; ".join(
        f"{where(*key)}, {_listed([f'{name} {_listed(said)}' for name, said in subjects.items()])}"
        for key, subjects in groups.items()
    )


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _leader(rows, task: str, score: str, titles) -> str | None:
    found = {memory: spread(rows, memory, task, score) for memory in titles}
    ranked = sorted((memory for memory in found if found[memory]), key=lambda m: -found[m].median)
    if not ranked:
        return None
    first, last = ranked[0], ranked[-1]
    text = f"{where(task, score)}, {prose(titles[first])} remembers best, {found[first]}"
    if first != last:
        text += f", and {prose(titles[last])} least, {found[last]}"
    return text

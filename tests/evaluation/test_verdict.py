"""The verdict says what the numbers say, also when they are not what was hoped for."""

import pytest

from memseq.evaluation import capacity, verdict
from tests.evaluation import harness


@pytest.fixture(scope="module")
def settings():
    return harness.config()


@pytest.fixture(scope="module")
def good(settings):
    return harness.rows(settings)


def judged(settings, rows):
    titles = {label: settings.memories[label].title for label in settings.compare}
    found = verdict.judge(settings.claims, rows, {**capacity.PROSE, **titles})
    headlines = {label: settings.tasks[label].headline for label in settings.on}
    return found, verdict.sentence(found, rows, titles, headlines)


def test_all_hold(settings, good):
    found, text = judged(settings, good)
    assert [outcome.holds for outcome in found] == [True] * len(settings.claims)
    assert text.startswith(f"All {len(settings.claims)} expectations hold over 3 seeds: ")
    assert (
        "on rewrite, DeltaNet (write to 1) reaches 0.980 (0.975 to 0.985) "
        "and is 0.63 above linear attention" in text
    )
    assert "on parity at positions 33 to 64, DeltaNet (write to 2) reaches 0.990" in text
    assert "DeltaNet (write to 1) stays at 0.50" in text
    assert text.endswith(".") and text.count(". ") == 0  # one sentence


@pytest.mark.parametrize(
    ("memory", "task", "value", "said"),
    [
        ("delta_net", "rewrite", 0.9, "DeltaNet (write to 1) reaches only 0.90"),
        ("linear_attention", "rewrite", 0.9, "is only 0.08 above linear attention"),
        ("linear_attention", "rewrite", 0.99, "is 0.01 below linear attention"),
        ("delta_net_2", "parity", 0.8, "DeltaNet (write to 2) reaches only 0.80"),
        ("delta_net", "parity", 0.7, "DeltaNet (write to 1) gets to 0.70"),
        ("softmax_attention", "parity", 0.61, "softmax attention (RoPE) gets to 0.61"),
    ],
)
def test_a_failing_claim_is_named(settings, memory, task, value, said):
    rows = harness.rows(settings, {**harness.GOOD, (memory, task): value})
    found, text = judged(settings, rows)
    assert sum(not outcome.holds for outcome in found) == 1
    assert text.startswith(f"1 of {len(found)} expectations fails over 3 seeds: ")
    wrong, right = text.split("; what held: ")
    assert said in wrong and "expected at" in wrong
    assert said not in right


def test_medians_decide(settings, good):
    """One bad seed of three does not turn a median, two do."""
    rows = [dict(row, scores=dict(row["scores"])) for row in good]
    own = [r for r in rows if (r["memory"], r["task"]) == ("delta_net_2", "parity")]
    own[0]["scores"]["33-64"] = 0.5
    assert all(outcome.holds for outcome in judged(settings, rows)[0])
    own[1]["scores"]["33-64"] = 0.5
    found, text = judged(settings, rows)
    assert [o.claim.memory for o in found if not o.holds] == ["delta_net_2"]
    assert "reaches only 0.50 (0.50 to 0.995)" in text


def test_failed_runs_count(settings, good):
    rows = [
        harness.broken(row) if (row["memory"], row["task"]) == ("delta_net", "rewrite") else row
        for row in good
    ]
    found, text = judged(settings, rows)
    assert [o.value for o in found if not o.holds] == [None, None]
    assert "DeltaNet (write to 1) has no finished run" in text
    assert text.endswith("3 of 42 runs failed.")


def test_one_seed(settings):
    assert "hold with one seed: " in judged(settings, harness.rows(settings, seeds=1))[1]


def test_without_claims_the_best_is_named(settings, good):
    titles = {label: settings.memories[label].title for label in settings.compare}
    text = verdict.sentence([], good, titles, {"rewrite": "accuracy", "parity": "33-64"})
    assert text == (
        "Over 3 seeds: on rewrite, DeltaNet (write to 1) remembers best, 0.980 (0.975 to 0.985), "
        "and linear attention least, 0.35 (0.34 to 0.35); "
        "on parity at positions 33 to 64, DeltaNet (write to 2) remembers best, "
        "0.990 (0.985 to 0.995), and DeltaNet (write to 1) least, 0.50 (0.49 to 0.51)."
    )
    rows = [harness.broken(row) for row in good if row["kind"] == "trained"]
    text = verdict.sentence([], rows, titles, {"rewrite": "accuracy"})
    assert text == "No run finished; 42 of 42 runs failed."


def test_statement(settings):
    claim = verdict.parse_claim("parity 33-64: delta_net - linear_attention >= 0.25")
    assert verdict.statement(claim, {"linear_attention": "Linear attention"}) == (
        "on parity at positions 33 to 64: delta_net above linear attention, by ≥ 0.25"
    )


@pytest.mark.parametrize(
    "text", ["rewrite: delta_net >= 0.9", "rewrite accuracy: delta_net > 0.9", "", "a b: c >= x"]
)
def test_bad_claims(text):
    with pytest.raises(ValueError, match="expected 'TASK SCORE: MEMORY >= NUMBER'"):
        verdict.parse_claim(text)


def test_number():
    assert [verdict.number(x) for x in (0.9991, 0.5, 0.05)] == ["0.999", "0.50", "0.050"]

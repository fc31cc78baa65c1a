"""Rewriting: which value is the right one, which are stale, and what the scores say of each."""

import jax
import numpy as np
import pytest

from memseq import tasks
from memseq.tasks import recall

MIXED = {
    "vocab_size": 96,
    "length": 96,
    "pairs": 5,
    "updates": (0, 2, 5),
    "rewrites": (1, 3),
}


def draw(task, size=60):
    return jax.tree.map(np.asarray, task.batch(jax.random.key(0), "train", 0, size))


def writes_of(drawn, row):
    """Key -> its values in the order of writing, read from the inputs alone."""
    updates, rewrites = (int(drawn["meta"][name][row, 0]) for name in ("updates", "rewrites"))
    pairs = int(drawn["mask"][row].sum())
    context = drawn["inputs"][row, : 2 * (pairs + updates * rewrites)]
    values = {}
    for key, value in zip(context[::2].tolist(), context[1::2].tolist(), strict=True):
        values.setdefault(key, []).append(value)
    return values, context.size


@pytest.mark.parametrize(("order", "noise"), [("block", "zero"), ("interleaved", "disjoint")])
def test_latest_value_is_the_target(order, noise):
    task = tasks.get("rewrite", order=order, noise=noise, filler_tokens=8, gap=2, **MIXED)
    drawn = draw(task)
    meta = drawn["meta"]
    for row in range(60):
        values, context = writes_of(drawn, row)
        rewrites = int(meta["rewrites"][row, 0])
        asked = np.flatnonzero(drawn["mask"][row])
        assert sorted(drawn["inputs"][row, asked].tolist()) == sorted(values)
        assert asked.min() >= context + 2 * task.gap and (asked % 2 == 0).all()
        everything = [value for list_ in values.values() for value in list_]
        assert len(set(everything)) == len(everything)
        assert sum(len(v) > 1 for v in values.values()) == meta["updates"][row, 0]
        for at in asked:
            mine = values[int(drawn["inputs"][row, at])]
            assert len(mine) in (1, 1 + rewrites)
            assert drawn["targets"][row, at] == mine[-1]
            assert bool(meta["updated"][row, at]) == (len(mine) > 1) != bool(meta["kept"][row, at])
            assert [v for v in meta["older"][row, at] if v >= 0] == mine[:-1]
            written = at - meta["lag"][row, at]
            assert drawn["inputs"][row, written] == mine[-1] and written < context
            assert meta["age"][row, at] == (context - 1 - written) // 2
    quiet = ~drawn["mask"]
    assert not meta["updated"][quiet].any() and not meta["kept"][quiet].any()
    np.testing.assert_array_equal(meta["older"][quiet], -1)


def test_block_order():
    drawn = draw(tasks.get("rewrite", order="block", **MIXED))
    for row in range(60):
        updates, rewrites = (int(drawn["meta"][name][row, 0]) for name in ("updates", "rewrites"))
        context = 2 * (5 + updates * rewrites)
        keys = drawn["inputs"][row, :context:2].tolist()
        versions = drawn["meta"]["version"][row, :context:2].tolist()
        assert len(set(keys[:5])) == 5
        assert versions == [0] * 5 + [r for r in range(1, rewrites + 1) for _ in range(updates)]
        rounds = [set(keys[5 + r * updates : 5 + (r + 1) * updates]) for r in range(rewrites)]
        assert all(one == rounds[0] and len(one) == updates for one in rounds)


def test_interleaved_order_mixes_first_writes_and_rewrites():
    task = tasks.get("rewrite", order="interleaved", updates=4)
    drawn = draw(task, 2000)
    versions = drawn["meta"]["version"][:, :24:2]
    # Where a rewrite may come: anywhere but first. In block order it could not be before the ninth.
    assert (versions[:, 0] == 0).all()
    assert (versions[:, 1:] == 1).any(axis=0).all()
    # The chance that the second write is of the same key as the first: 4 keys of 8 are there twice.
    np.testing.assert_allclose(
        (versions[:, 1] == 1).mean(), 2 / 12 * 4 / 11 * 12 / 2 / 6, atol=0.03
    )


def test_which_keys_are_rewritten_does_not_depend_on_the_order_of_writing():
    drawn = draw(tasks.get("rewrite", "half"), 2000)
    pair = drawn["meta"]["pair"][drawn["meta"]["updated"]]
    np.testing.assert_allclose(np.bincount(pair, minlength=8) / 2000, 0.5, atol=0.06)


def test_slots_of_queries_are_uniform_and_independent_of_the_writes():
    drawn = draw(tasks.get("rewrite"), 3000)
    used = drawn["mask"][:, 32::2].mean(axis=0)
    np.testing.assert_allclose(used, 0.5, atol=0.05)
    lag = drawn["meta"]["lag"][drawn["mask"]].astype(float)
    age = drawn["meta"]["age"][drawn["mask"]]
    at = np.argwhere(drawn["mask"])[:, 1]
    assert abs(np.corrcoef(at, age)[0, 1]) < 0.04
    np.testing.assert_array_equal(lag, at - (31 - 2 * age))


def test_power_law_of_the_slots():
    drawn = draw(tasks.get("rewrite", pairs=1, updates=1, power_a=0.01), 4000)
    used = drawn["mask"][:, 4::2].mean(axis=0)
    weight = np.arange(1, 31) ** -0.99
    np.testing.assert_allclose(used, weight / weight.sum(), atol=0.035)


def rates(task, drawn, answer):
    scores = task.scores(answer.astype(np.int32), drawn)
    return {name: float(total) / max(float(count), 1) for name, (total, count) in scores.items()}


def test_scores():
    task = tasks.get("rewrite", "half", rewrites=2)
    drawn = draw(task)
    meta, targets = drawn["meta"], drawn["targets"]
    right = rates(task, drawn, targets)
    assert (right["updated"], right["kept"], right["stale"], right["other"]) == (1, 1, 0, 0)
    for version in (0, 1):  # a memory that never overwrites, and one that lags behind by one write
        old = rates(task, drawn, np.where(meta["updated"], meta["older"][..., version], targets))
        assert (old["updated"], old["kept"], old["stale"], old["other"]) == (0, 1, 0.5, 0)
        assert old["accuracy"] == 0.5 and old["sequence_accuracy"] == 0
    lost = rates(task, drawn, np.where(meta["kept"], 0, targets))
    assert (lost["updated"], lost["kept"], lost["stale"], lost["other"]) == (1, 0, 0, 0.5)


def test_shares_of_all_queries_add_up():
    task = tasks.get("rewrite", **MIXED)
    drawn = draw(task)
    rng = np.random.default_rng(0)
    older = drawn["meta"]["older"].max(axis=-1)
    choice = rng.integers(0, 3, older.shape)
    answer = np.where(choice == 0, drawn["targets"], np.where(choice == 1, older, 7))
    scores = task.scores(answer.astype(np.int32), drawn)
    total, count = scores["accuracy"]
    assert float(scores["updated"][0] + scores["kept"][0]) == float(total)
    assert float(scores["updated"][1] + scores["kept"][1]) == float(count)
    assert float(total + scores["stale"][0] + scores["other"][0]) == float(count)
    assert float(scores["stale"][0]) > 0 and float(scores["other"][0]) > 0
    for name in ("updated", "stale"):
        parts = [scores[f"{name} R={number}"] for number in (1, 3)]
        assert float(sum(part[0] for part in parts)) == float(scores[name][0])
        assert float(sum(part[1] for part in parts)) == float(scores["updated"][1])


def test_a_value_of_another_key_is_not_stale():
    task = tasks.get("rewrite")
    drawn = draw(task)
    older = drawn["meta"]["older"][..., 0]
    shifted = drawn["targets"].copy()
    for row in range(60):
        at = np.flatnonzero(drawn["mask"][row])
        shifted[row, at] = np.roll(older[row, at], 1)
    wrong = rates(task, drawn, shifted)
    assert (wrong["stale"], wrong["other"]) == (0, 1)


def test_chance_is_one_hit_in_a_sequence():
    task = tasks.get("rewrite")
    drawn = draw(task, 200)
    last = np.broadcast_to(drawn["inputs"][:, 31:32], drawn["inputs"].shape)
    assert rates(task, drawn, last)["accuracy"] == task.chance == 1 / 8
    older = np.broadcast_to(drawn["inputs"][:, 1:2], drawn["inputs"].shape)
    assert rates(task, drawn, older)["accuracy"] == 0


def test_random_filler_and_a_memory_that_stores_it():
    task = tasks.get("rewrite", vocab_size=32, length=40, pairs=3, updates=2, noise="random", gap=4)
    drawn = draw(task, 4000)
    hits = 0
    for row, at in np.argwhere(drawn["mask"]):
        inputs = drawn["inputs"][row]
        follow = [
            inputs[j + 1] for j in range(at - 1) if inputs[j] == inputs[at] and inputs[j + 1] >= 16
        ]
        hits += follow[-1] == drawn["targets"][row, at]
    np.testing.assert_allclose(hits / 12000, task.overwriting_accuracy, atol=0.015)
    assert task.ceiling == 1.0 and task.overwriting_accuracy < 0.9
    assert "stores filler" in task.describe()


def test_no_updates():
    task = tasks.get("rewrite", updates=0)
    drawn = draw(task)
    assert drawn["meta"]["kept"][drawn["mask"]].all()
    assert drawn["meta"]["older"].shape == (60, 64, 0)
    found = rates(task, drawn, drawn["targets"])
    assert (found["kept"], found["stale"], found["updated"]) == (1, 0, 0)


def test_roles():
    drawn = draw(tasks.get("rewrite"))
    role = drawn["meta"]["role"]
    np.testing.assert_array_equal(role[:, :32:2], recall.KEY)
    np.testing.assert_array_equal(role[:, 1:32:2], recall.VALUE)
    np.testing.assert_array_equal(role == recall.QUERY, drawn["mask"])
    np.testing.assert_array_equal(drawn["inputs"][role == recall.FILLER], 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 46}, "length: 16 writes, .* 8 queries .* at least 48, got 46"),
        ({"length": 51}, "even length"),
        ({"gap": 9}, "length: .* at least 66"),
        ({"updates": 9}, "updates: expected at most the number of pairs, 8, got 9"),
        ({"updates": -1}, "updates: "),
        ({"rewrites": 0}, "rewrites: "),
        ({"rewrites": ()}, "rewrites: expected at least one"),
        ({"rewrites": (1, 2.5)}, "rewrites: "),
        ({"order": "blocks"}, "order: .*mean 'block'"),
        ({"vocab_size": 24}, "pairs: needs 16 different values, but the vocabulary has 12"),
        ({"noise": "random", "rewrites": (1, 2), "length": 96}, "noise: .* could not be known"),
        ({"power_a": -1.0}, "power_a: "),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.get("rewrite", **options)

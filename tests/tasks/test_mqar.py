"""Multi-query associative recall: its law, what an example tells, and what filler costs."""

import itertools

import jax
import numpy as np
import pytest

from memseq import tasks
from memseq.tasks import recall

LAW = 10_000  # examples behind a sampled law


def draw(task, size, split="train"):
    return jax.tree.map(np.asarray, task.batch(jax.random.key(0), split, 0, size))


def one_cell(length, pairs, **options):
    return tasks.get("mqar", "zoology", cells=((length, pairs, 1),), test=(), **options)


def read(inputs, position, values, latest):
    """The value that follows the asked key: where it was first, or last, followed by one."""
    follow = [
        inputs[at + 1]
        for at in range(position - 1)
        if inputs[at] == inputs[position] and inputs[at + 1] in values
    ]
    return follow[-1 if latest else 0]


def accuracy(task, drawn, latest):
    values = range(task.tokens.values[0], sum(task.tokens.values))
    asked = np.argwhere(drawn["mask"])
    right = [
        read(drawn["inputs"][row], position, values, latest) == drawn["targets"][row, position]
        for row, position in asked
    ]
    return np.mean(right)


@pytest.mark.parametrize(("noise", "passes"), [("zero", 1), ("random", 1), ("disjoint", 2)])
def test_first_binding_is_always_right(noise, passes):
    cells = ((24, 2, 1), (40, 5, 2))
    task = tasks.get("mqar", vocab_size=44, cells=cells, noise=noise, passes=passes)
    drawn = draw(task, 200)
    assert accuracy(task, drawn, latest=False) == task.ceiling == 1.0
    assert drawn["mask"].sum() == drawn["meta"]["pairs"][:, 0].sum()


@pytest.mark.parametrize("passes", [1, 2])
def test_layout(passes):
    task = tasks.get("mqar", vocab_size=44, cells=((24, 2, 1), (40, 5, 2)), passes=passes)
    drawn = draw(task, 50)
    for row in range(50):
        inputs, role, pair = (
            drawn["inputs"][row],
            drawn["meta"]["role"][row],
            drawn["meta"]["pair"][row],
        )
        pairs = int(drawn["meta"]["pairs"][row, 0])
        length = {2: 24, 5: 40}[pairs]
        context = 2 * pairs * passes
        keys, values = inputs[:context:2], inputs[1:context:2]
        np.testing.assert_array_equal(role[:context], [recall.KEY, recall.VALUE] * (pairs * passes))
        np.testing.assert_array_equal(keys, np.tile(keys[:pairs], passes))
        np.testing.assert_array_equal(values, np.tile(values[:pairs], passes))
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1 and keys.max() < 22 <= values.min() and values.max() < 44
        asked = np.flatnonzero(drawn["mask"][row])
        assert (asked % 2 == 0).all() and asked.min() >= context and asked.max() < length
        assert sorted(inputs[asked]) == sorted(keys[:pairs])
        np.testing.assert_array_equal(keys[pair[asked]], inputs[asked])
        written = context - 2 * pairs + 2 * pair[asked] + 1
        np.testing.assert_array_equal(inputs[written], drawn["targets"][row, asked])
        np.testing.assert_array_equal(drawn["meta"]["lag"][row, asked], asked - written)
        np.testing.assert_array_equal(drawn["meta"]["age"][row, asked], pairs - 1 - pair[asked])
        np.testing.assert_array_equal(role[length:], recall.PADDING)
        np.testing.assert_array_equal(inputs[length:], 0)
        assert set(role[context:length]) <= {recall.QUERY, recall.FILLER}


def test_noise():
    sizes = {"zero": {0}, "disjoint": set(range(48, 64)), "random": set(range(64))}
    for noise, expected in sizes.items():
        task = tasks.get("mqar", vocab_size=64, cells=((40, 2, 1),), noise=noise)
        drawn = draw(task, 200)
        filler = drawn["inputs"][drawn["meta"]["role"] == recall.FILLER]
        assert set(filler.tolist()) == expected
        counts = np.bincount(filler, minlength=64)[sorted(expected)]
        # A uniform law: chi-square below its mean plus six standard deviations.
        chance = counts.sum() / len(expected)
        degrees = len(expected) - 1
        assert np.sum((counts - chance) ** 2) / chance <= degrees + 6 * np.sqrt(2 * degrees)
        others = drawn["inputs"][drawn["meta"]["role"] != recall.FILLER]
        assert noise != "disjoint" or others.max() < 48


def sampled_reference(rng, count, slots, pairs):
    """Zoology's gaps: drawn without replacement, slot i with weight 0.01 i ** -0.99."""
    weight = 0.01 * np.arange(1, slots + 1) ** (0.01 - 1.0)
    return np.stack(
        [rng.choice(slots, pairs, replace=False, p=weight / weight.sum()) for _ in range(count)]
    )


def slots_of_pairs(drawn, context):
    """[examples, pairs]: the slot in which each pair, in the order of writing, is asked for."""
    asked = np.argwhere(drawn["mask"])
    pair = drawn["meta"]["pair"][drawn["mask"]]
    slots = np.zeros((len(drawn["mask"]), pair.max() + 1), int)
    slots[asked[:, 0], pair] = (asked[:, 1] - context) // 2
    return slots


def test_zoology_law_of_the_gaps():
    drawn = draw(one_cell(64, 4, vocab_size=16), LAW)
    slots = slots_of_pairs(drawn, 8)
    expected = sampled_reference(np.random.default_rng(0), LAW, 28, 4)
    weight = np.arange(1, 29) ** -0.99
    # The first key's slot is the first draw: the power law itself, close to 1/i.
    share = np.bincount(slots[:, 0], minlength=28) / LAW
    np.testing.assert_allclose(share, weight / weight.sum(), atol=5 * np.sqrt(0.2 / LAW))
    np.testing.assert_allclose(share[0] / share[1], 2.0, rtol=0.1)
    # Each further key's slot, and the slots that are in use at all.
    for pair in range(4):
        ours, theirs = (np.bincount(s[:, pair], minlength=28) / LAW for s in (slots, expected))
        np.testing.assert_allclose(ours, theirs, atol=0.02)
    # Early keys are asked for sooner, as much as in zoology.
    np.testing.assert_allclose(slots.mean(axis=0), expected.mean(axis=0), atol=0.25)
    assert (np.diff(slots.mean(axis=0)) > 0.15).all()


def test_independent_gaps_have_the_same_slots_but_no_order():
    drawn = draw(one_cell(64, 4, vocab_size=16, coupled=False), LAW)
    slots = slots_of_pairs(drawn, 8)
    expected = sampled_reference(np.random.default_rng(1), LAW, 28, 4)
    used, theirs = (np.bincount(s.ravel(), minlength=28) / LAW for s in (slots, expected))
    np.testing.assert_allclose(used, theirs, atol=0.02)
    np.testing.assert_allclose(slots.mean(axis=0), expected.mean(), atol=0.25)


def test_uniform_gaps():
    drawn = draw(one_cell(24, 2, vocab_size=16, power_a=1.0), LAW)
    slots = slots_of_pairs(drawn, 4)
    for pair in range(2):
        np.testing.assert_allclose(np.bincount(slots[:, pair], minlength=10) / LAW, 0.1, atol=0.015)


def test_zoology_tokens():
    task = tasks.get("mqar", "zoology")
    drawn = draw(task, 64)
    role, inputs = drawn["meta"]["role"], drawn["inputs"]
    keys, values = inputs[role == recall.KEY], inputs[role == recall.VALUE]
    assert task.vocab_size == 8192 and task.coupled and task.power_a == 0.01
    assert keys.min() >= 1 and keys.max() < 4096 <= values.min() and values.max() < 8192
    # Uniform over the two halves: means within five standard errors.
    for ids, first, size in ((keys, 1, 4095), (values, 4096, 4096)):
        np.testing.assert_allclose(
            ids.mean(), first + (size - 1) / 2, atol=5 * size / np.sqrt(12 * ids.size)
        )


def test_keys_are_every_ordered_choice_equally_often():
    drawn = draw(tasks.get("mqar", vocab_size=8, cells=((8, 2, 1),)), 6000)
    pairs, counts = np.unique(drawn["inputs"][:, [0, 2]], axis=0, return_counts=True)
    assert [tuple(pair) for pair in pairs.tolist()] == list(itertools.permutations((1, 2, 3), 2))
    np.testing.assert_allclose(counts / 6000, 1 / 6, atol=5 * np.sqrt(5 / 36 / 6000))


def test_cells_come_by_weight_and_are_scored_apart():
    task = tasks.get("mqar", vocab_size=44, cells=((24, 2, 5), (40, 5, 3), (32, 3, 1)))
    drawn = draw(task, 4000)
    share = np.bincount(drawn["meta"]["cell"][:, 0], minlength=3) / 4000
    np.testing.assert_allclose(share, [5 / 9, 3 / 9, 1 / 9], atol=0.04)
    one = drawn["meta"]["cell"] == 1
    scores = task.scores(np.where(one, drawn["targets"], 0), drawn)
    rates = {name: float(total) / float(count) for name, (total, count) in scores.items()}
    assert (rates["24x2"], rates["40x5"], rates["32x3"]) == (0.0, 1.0, 0.0)
    assert list(task.single_cells()) == ["24x2", "40x5", "32x3"]
    assert [cell.length for cell in task.single_cells().values()] == [24, 40, 32]


def test_easy_share_of_the_ladder():
    cells = tasks.get("mqar", "paper").cells
    assert cells[0][:2] == (64, 4)
    assert cells[0][2] / sum(weight for _, _, weight in cells) == pytest.approx(5 / 9)
    assert not tasks.get("mqar", "paper").coupled


def test_chance_is_one_hit_in_a_sequence():
    task = tasks.get("mqar", vocab_size=44, cells=((24, 2, 1), (40, 5, 2)))
    drawn = draw(task, 3000)
    for value in (1, 3):  # the value of the first pair, of the second
        guess = np.broadcast_to(drawn["inputs"][:, value : value + 1], drawn["inputs"].shape)
        total, count = task.scores(guess, drawn)["accuracy"]
        assert float(total) == 3000
        np.testing.assert_allclose(float(total / count), task.chance, atol=0.01)
    assert task.chance == 1 / 4


def test_effective_pairs():
    task = tasks.get("mqar", vocab_size=44, cells=((40, 5, 1),))
    drawn = draw(task, 400)
    perfect = task.scores(drawn["targets"], drawn)["effective_pairs"]
    assert float(perfect[0] / perfect[1]) == pytest.approx(5.0)
    blind = np.random.default_rng(0).integers(22, 44, drawn["inputs"].shape)
    guessed = task.scores(blind, drawn)["effective_pairs"]
    np.testing.assert_allclose(float(guessed[0] / guessed[1]), 0.0, atol=0.15)


@pytest.mark.parametrize(("slots", "queries", "lead"), [(3, 1, 0), (3, 2, 0), (3, 3, 0), (2, 1, 1)])
def test_overwriting_accuracy_against_enumeration(slots, queries, lead):
    """All orders of slots and all filler, for ids 0 (neither), 1 and 2 (keys), 3 to 5 (values)."""
    power, asked, right = 0.3, 1, 3
    weight = np.arange(1.0, slots + 1) ** (power - 1)
    total = 0.0
    for order in itertools.permutations(range(slots), queries):
        probability, left = 1.0, weight.sum()
        for slot in order:
            probability *= weight[slot] / left
            left -= weight[slot]
        for mine in order:
            tokens = [None] * (2 * (lead + mine))
            for slot in order:
                if slot < mine:
                    tokens[2 * (lead + slot)] = 2
            free = [at for at, token in enumerate(tokens) if token is None]
            hits = 0
            for filler in itertools.product(range(6), repeat=len(free)):
                for at, token in zip(free, filler, strict=True):
                    tokens[at] = token
                answer = right
                for key, value in itertools.pairwise(tokens):
                    if key == asked and value >= 3:
                        answer = value
                hits += answer == right
            total += probability * hits / 6 ** len(free) / queries
    ranges = recall.Tokens(keys=(1, 2), values=(3, 3), filler=(0, 6))
    got = recall.overwriting_accuracy(slots, queries, power, lead, ranges)
    np.testing.assert_allclose(got, total, rtol=1e-9)


def test_overwriting_accuracy_against_samples():
    for length, pairs in ((32, 2), (32, 6)):
        task = tasks.get("mqar", vocab_size=32, cells=((length, pairs, 1),))
        drawn = draw(task, 2000)
        error = 5 * np.sqrt(0.1 / 2000)  # as if the queries of a sequence always failed together
        got = accuracy(task, drawn, latest=True)
        np.testing.assert_allclose(got, task.overwriting_accuracy, atol=error)
    assert tasks.get("mqar").overwriting_accuracy == pytest.approx(0.986, abs=0.001)
    assert tasks.get("mqar", noise="zero").overwriting_accuracy == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": ((30, 8, 1),)}, "length in cells: 8 pairs .* at least 32, got 30"),
        ({"cells": ((64, 8, 1),), "passes": 4}, "length in cells: .* at least 80, got 64"),
        ({"cells": ((65, 8, 1),)}, "even length"),
        ({"cells": ((64, 0, 1),)}, "pairs in cells: "),
        ({"cells": ((64, 4, 0),)}, "weight in cells: "),
        ({"cells": ((64, 4),)}, "cells: expected"),
        ({"cells": ()}, "cells: expected"),
        ({"cells": ((64, 4, 1), (64, 4, 2))}, "cells: expected each"),
        ({"vocab_size": 20}, "cells: needs 16 different keys, but the vocabulary has 9"),
        ({"noise": "zeros"}, "noise: .*mean 'zero'"),
        ({"noise": "disjoint", "filler_tokens": 126}, "filler_tokens: "),
        ({"power_a": 0.0}, "power_a: "),
        ({"power_a": float("nan")}, "power_a: "),
        ({"passes": 0}, "passes: "),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.get("mqar", **options)

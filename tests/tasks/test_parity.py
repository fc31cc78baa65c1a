"""Parity: labels, lengths, bands."""

import jax
import numpy as np
import pytest

from memseq import tasks


def draw(task, size=400, split="train"):
    return jax.tree.map(np.asarray, task.batch(jax.random.key(0), split, 0, size))


def rates(task, drawn, answer):
    scores = task.scores(np.asarray(answer, np.int32), drawn)
    return {name: float(total) / float(count) for name, (total, count) in scores.items()}


def test_every_position():
    task = tasks.get("parity")
    drawn = draw(task)
    bits = drawn["inputs"] - 1
    assert set(bits.ravel()) == {0, 1} and drawn["mask"].all()
    np.testing.assert_array_equal(drawn["targets"] - 1, np.cumsum(bits, axis=1) % 2)
    np.testing.assert_array_equal(drawn["meta"]["ones"], np.cumsum(bits, axis=1))
    np.testing.assert_allclose(bits.mean(), 0.5, atol=5 * 0.5 / np.sqrt(bits.size))


def test_last_position_of_some_length():
    task = tasks.get("parity", "paper")
    drawn = draw(task)
    counts = (drawn["inputs"] > 0).sum(axis=1)
    assert counts.min() == 3 and counts.max() == 40
    np.testing.assert_allclose(counts.mean(), 21.5, atol=5 * 11 / np.sqrt(400))
    for row, count in enumerate(counts):
        assert (drawn["inputs"][row, :count] > 0).all() and not drawn["inputs"][row, count:].any()
        assert np.flatnonzero(drawn["mask"][row]).tolist() == [count - 1]
        odd = (drawn["inputs"][row] == 2).sum() % 2
        assert drawn["targets"][row, count - 1] == 1 + odd
        assert (drawn["meta"]["ones"][row, count:] == -1).all()


def test_tested_at_four_times_the_length():
    task = tasks.get("parity")
    tested = task.eval_variant()
    assert (task.length, tested.length) == (16, 64)
    assert list(task.scores(draw(task)["targets"], draw(task))) == [
        "accuracy",
        "sequence_accuracy",
        "scaled_accuracy",
        "1-16",
    ]
    drawn = draw(tested, split="test")
    # A counter that stops after 16 bits.
    answer = drawn["targets"].copy()
    answer[:, 16:] = answer[:, 15:16]
    found = rates(tested, drawn, answer)
    assert found["1-16"] == 1.0 and found["sequence_accuracy"] < 0.01
    for band in ("17-32", "33-64"):
        np.testing.assert_allclose(found[band], tested.chance, atol=0.06)
    np.testing.assert_allclose(found["accuracy"], 0.625, atol=0.05)
    np.testing.assert_allclose(found["scaled_accuracy"], 2 * found["accuracy"] - 1, atol=1e-6)


def test_bands_share_out_the_positions():
    tested = tasks.get("parity", "paper").eval_variant()
    drawn = draw(tested, split="test")
    scores = tested.scores(drawn["targets"], drawn)
    counts = {name: float(scores[name][1]) for name in ("1-40", "41-80", "81-160", "161-256")}
    assert sum(counts.values()) == 400 and counts["161-256"] > counts["81-160"] > counts["41-80"]
    tested = tasks.get("parity").eval_variant()
    drawn = draw(tested, split="test")
    for name, first, last in (("1-16", 0, 16), ("17-32", 16, 32), ("33-64", 32, 64)):
        answer = np.zeros_like(drawn["targets"])
        answer[:, first:last] = drawn["targets"][:, first:last]
        found = rates(tested, drawn, answer)
        assert {band: found[band] for band in ("1-16", "17-32", "33-64")} == {
            band: float(band == name) for band in ("1-16", "17-32", "33-64")
        }


def test_blind_guesses_are_at_chance():
    tested = tasks.get("parity").eval_variant()
    drawn = draw(tested, 2000, "test")
    for answer in (np.full_like(drawn["inputs"], 1), drawn["inputs"]):
        found = rates(tested, drawn, answer)
        np.testing.assert_allclose(found["17-32"], tested.chance, atol=0.03)
        np.testing.assert_allclose(found["scaled_accuracy"], 0.0, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 2}, "vocab_size: "),
        ({"length": 0}, "length: "),
        ({"min_length": 17}, "min_length: expected at most the length, 16, got 17"),
        ({"min_length": 0}, "min_length: "),
        ({"label": "all"}, "label: .*Known: every, last"),
        ({"bands": (32, 16)}, "bands: expected last positions, ascending"),
        ({"bands": ()}, "bands: "),
        ({"bands": 16}, "bands: "),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.get("parity", **options)

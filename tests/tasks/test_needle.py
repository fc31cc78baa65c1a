"""Needle: where the pairs stand, what is asked, and scores by thirds of the text."""

import jax
import numpy as np
import pytest

from memseq import tasks


def draw(task, size=300):
    return jax.tree.map(np.asarray, task.batch(jax.random.key(0), "train", 0, size))


def rates(task, drawn, answer):
    scores = task.scores(np.asarray(answer, np.int32), drawn)
    return {name: float(total) / float(count) for name, (total, count) in scores.items()}


def test_every_key_is_asked_once_and_its_value_stands_behind_it():
    task = tasks.get("needle")
    drawn = draw(task)
    assert (drawn["mask"] == (np.arange(64) >= 60)).all()
    for row, targets, lag in zip(
        drawn["inputs"], drawn["targets"], drawn["meta"]["lag"], strict=True
    ):
        text = row[:60]
        (keys,) = np.nonzero((text >= 1) & (text < 24))
        assert len(keys) == 4 and (keys % 2 == 0).all()
        values = text[keys + 1]
        assert len({*values}) == 4 and ((values >= 24) & (values < 48)).all()
        bound = dict(zip(text[keys], values, strict=True))
        assert sorted(row[60:]) == sorted(bound)
        assert [bound[key] for key in row[60:]] == list(targets[60:])
        np.testing.assert_array_equal(row[np.arange(60, 64) - lag[60:]], targets[60:])
        assert (np.delete(text, [*keys, *keys + 1]) >= 48).all()


def test_pairs_stand_anywhere_alike():
    drawn = draw(tasks.get("needle"), 1000)
    slot, count = np.unique(
        np.nonzero((drawn["inputs"][:, :60] >= 1) & (drawn["inputs"][:, :60] < 24))[1],
        return_counts=True,
    )
    np.testing.assert_array_equal(slot, np.arange(0, 60, 2))
    expected = 4000 / 30
    np.testing.assert_allclose(count, expected, atol=5 * np.sqrt(expected))


def test_scores_by_thirds_and_blind_guesses():
    task = tasks.get("needle", length=304)
    drawn = draw(task)
    place = np.arange(304) - drawn["meta"]["lag"]
    for name, first, last in (("early", 0, 100), ("middle", 100, 200), ("late", 200, 300)):
        inside = (first <= place) & (place < last)
        found = rates(task, drawn, np.where(inside, drawn["targets"], 0))
        thirds = {third: found[third] for third in ("early", "middle", "late")}
        assert thirds == {third: float(third == name) for third in thirds}
        assert 0.2 < found["accuracy"] < 0.5
    text = drawn["inputs"][:, :300]
    answer = np.zeros_like(drawn["targets"])  # the values in their order, whatever is asked
    answer[:, 300:] = text[(text >= 24) & (text < 48)].reshape(-1, 4)
    np.testing.assert_allclose(rates(task, drawn, answer)["accuracy"], task.chance, atol=0.06)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"needles": 1}, "needles: "),
        ({"needles": 24}, "length: 24 needles.* at least 72"),
        ({"length": 63}, "length: "),
        ({"needles": 24, "length": 128}, "needles: needs 24 different keys"),
        ({"filler_tokens": 61}, "filler_tokens: "),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.get("needle", **options)

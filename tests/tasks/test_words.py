"""Words: the group's products, chance, bands."""

import itertools

import jax
import numpy as np
import pytest

from memseq import tasks
from memseq.tasks.words import products


def draw(task, size=400, split="train"):
    return jax.tree.map(np.asarray, task.batch(jax.random.key(0), split, 0, size))


@pytest.mark.parametrize("items", [2, 3, 4])
def test_products_make_a_group(items):
    """Associative, with the identity first and an inverse each; S3 and S4 do not commute."""
    table = products(items)
    n = len(table)
    every = np.arange(n)
    np.testing.assert_array_equal(table[0], every)
    np.testing.assert_array_equal(table[:, 0], every)
    for row in (*table, *table.T):
        np.testing.assert_array_equal(np.sort(row), every)
    np.testing.assert_array_equal(table[table], table[every[:, None, None], table])
    assert (table == table.T).all() == (items == 2)


@pytest.mark.parametrize("variant", ["tiny", "s5"])
def test_answers_are_what_things_come_to(variant):
    task = tasks.get("words", variant)
    drawn = draw(task, 20)
    permutations = np.array(list(itertools.permutations(range(task.items))))
    for tokens, answers in zip(drawn["inputs"], drawn["targets"], strict=True):
        place = np.arange(task.items)  # where each thing is
        for token, answer in zip(tokens, answers, strict=True):
            place = permutations[token - 1][place]
            np.testing.assert_array_equal(permutations[answer - 1], place)


def test_uniform():
    task = tasks.get("words")
    drawn = draw(task, 2000)
    for name in ("inputs", "targets"):
        found = np.bincount(drawn[name].ravel(), minlength=7) / drawn[name].size
        np.testing.assert_allclose(found, [0] + [1 / 6] * 6, atol=0.01)
    assert drawn["mask"].all()


def test_a_reader_of_the_last_token_is_at_chance_after_the_first():
    tested = tasks.get("words").eval_variant()
    drawn = draw(tested, 1000, "test")
    scores = tested.scores(drawn["inputs"], drawn)
    found = {name: float(total) / float(count) for name, (total, count) in scores.items()}
    assert list(found)[2:] == ["scaled_accuracy", "1-12", "13-24", "25-48"]
    np.testing.assert_allclose(found["25-48"], 1 / 6, atol=0.02)
    np.testing.assert_allclose(found["1-12"], (1 + 11 / 6) / 12, atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"items": 1}, "items: "),
        ({"items": 6, "vocab_size": 800}, "items: expected 2 to 5, got 6"),
        ({"items": 4}, "vocab_size: expected a whole number of at least 25, got 7"),
        ({"length": 0}, "length: "),
        ({"bands": (24, 12)}, "bands: expected last positions, ascending"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.get("words", **options)

"""Tasks about when things were: windowed parity, delayed match, selective copying, induction."""

import jax
import numpy as np
import pytest

from memseq import tasks
from memseq.tasks.selective_copying import share_of_the_most_common


def draw(task, size=200, split="train"):
    return jax.tree.map(np.asarray, task.batch(jax.random.key(0), split, 0, size))


def test_parity_of_a_window():
    task = tasks.get("parity", "window")
    drawn = draw(task)
    bits = drawn["inputs"] - 1
    windows = np.lib.stride_tricks.sliding_window_view(bits, task.window, axis=1)
    assert not drawn["mask"][:, : task.window - 1].any()
    assert drawn["mask"][:, task.window - 1 :].all()
    np.testing.assert_array_equal(drawn["targets"][:, task.window - 1 :] - 1, windows.sum(-1) % 2)
    np.testing.assert_array_equal(drawn["meta"]["ones"][:, task.window - 1 :], windows.sum(-1))
    with pytest.raises(ValueError, match="window: expected at most 32 bits, got 33"):
        tasks.get("parity", "window", window=33)


def test_delayed_match():
    task = tasks.get("delayed_match")
    drawn = draw(task)
    bits, back = drawn["inputs"] - 1, task.window - 1
    assert set(bits.ravel()) == {0, 1}
    assert not drawn["mask"][:, :back].any() and drawn["mask"][:, back:].all()
    equal = bits[:, back:] == bits[:, : task.length - back]
    np.testing.assert_array_equal(drawn["targets"][:, back:], 1 + equal)
    np.testing.assert_allclose(equal.mean(), 0.5, atol=0.03)
    for window, message in ((1, "window: "), (33, "window: expected at most the length, 32")):
        with pytest.raises(ValueError, match=message):
            tasks.get("delayed_match", window=window)


def test_selective_copying():
    task = tasks.get("selective_copying")
    drawn = draw(task)
    context, answers = np.split(drawn["inputs"], [task.context], axis=1)
    assert (answers == 1).all() and (drawn["mask"].sum(1) == task.items).all()
    for row, wanted in zip(context, drawn["targets"][:, task.context :], strict=True):
        np.testing.assert_array_equal(row[row > 0], wanted)
    data = context[context > 0]
    assert data.min() == 2 and data.max() == task.vocab_size - 1
    places = np.nonzero(context)[1]
    np.testing.assert_allclose(places.mean(), (task.context - 1) / 2, atol=1.5)
    assert places.min() == 0 and places.max() == task.context - 1  # noise may also come last
    with pytest.raises(ValueError, match="items: expected 1 to 4, got 5"):
        tasks.get("selective_copying", context=4, items=5)


@pytest.mark.parametrize(("draws", "symbols"), [(1, 5), (3, 2), (8, 14)])
def test_chance_of_a_reader_without_order(draws, symbols):
    data = np.random.default_rng(0).integers(symbols, size=(20_000, draws))
    most = np.max([(data == symbol).sum(1) for symbol in range(symbols)], axis=0)
    np.testing.assert_allclose(
        share_of_the_most_common(draws, symbols), most.mean() / draws, atol=5e-3
    )


def test_induction_heads():
    task = tasks.get("induction_heads")
    drawn = draw(task)
    assert (drawn["mask"].sum(1) == 1).all() and drawn["mask"][:, -1].all()
    for row, answer, lags in zip(
        drawn["inputs"], drawn["targets"], drawn["meta"]["lag"], strict=True
    ):
        first, last = np.flatnonzero(row == 0)
        assert last == task.length - 1 and answer[-1] == row[first + 1] > 0
        assert lags[-1] == last - first - 1
    lags = drawn["meta"]["lag"][:, -1]
    assert lags.min() < 5 and lags.max() > 58
    np.testing.assert_allclose(lags.mean(), 31.5, atol=5)
    with pytest.raises(ValueError, match="length: "):
        tasks.get("induction_heads", length=2)

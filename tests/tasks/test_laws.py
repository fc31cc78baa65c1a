"""What every registered task promises, at each of its variants, in training and at test time."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq import tasks

CASES = [(name, variant) for name, cls in tasks.REGISTRY.items() for variant in cls.VARIANTS]
BATCH = 6
_batches = {}


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def task(request):
    return tasks.get(*request.param)


def batch(task, split="train", index=0, size=BATCH):
    """Drawn once for all tests: most of their time is compilation."""
    asked = (task, split, index, size)
    if asked not in _batches:
        drawn = task.batch(jax.random.key(5), split, index, size)
        _batches[asked] = jax.tree.map(np.asarray, drawn)
    return _batches[asked]


def rate(score):
    return float(score[0]) / float(score[1])


def test_shapes_and_types(task):
    drawn = batch(task)
    for name, dtype in (("inputs", np.int32), ("targets", np.int32), ("mask", np.bool_)):
        assert drawn[name].shape == (BATCH, task.length), name
        assert drawn[name].dtype == dtype, name
    role = drawn["meta"]["role"]
    assert role.dtype == np.int32 and role.min() >= 0 and role.max() < len(task.ROLES)
    for name, values in drawn["meta"].items():
        assert values.shape[:2] == (BATCH, task.length), name
        assert values.dtype in (np.int32, np.bool_), name
        assert name == "role" or name in task.META, f"META does not say what {name} is"
    assert set(task.META) <= set(drawn["meta"])


def test_tokens_are_in_the_vocabulary(task):
    drawn = batch(task)
    for name in ("inputs", "targets"):
        assert drawn[name].min() >= 0 and drawn[name].max() < task.vocab_size, name
    assert drawn["mask"].any(axis=1).all()
    np.testing.assert_array_equal(drawn["targets"][~drawn["mask"]], 0)


def test_example_is_a_function_of_its_number_alone(task):
    key = jax.random.key(5)
    whole = batch(task)
    parts = [task.batch(key, "train", jnp.int32(number), 2) for number in (2, 0, 1)]
    for part, number in zip(parts, (2, 0, 1), strict=True):
        expected = jax.tree.map(lambda a, n=number: a[2 * n : 2 * n + 2], whole)
        jax.tree.map(np.testing.assert_array_equal, expected, part)


@pytest.mark.parametrize("name", tasks.REGISTRY)
def test_key_of_an_example(name):
    task = tasks.get(name)
    key, whole = jax.random.key(5), batch(task)
    split = jax.random.fold_in(key, tasks.SPLITS["train"])
    alone = jax.jit(task.example)(jax.random.fold_in(split, 4))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[4], b), whole, alone)


def test_examples_differ(task):
    drawn = [
        batch(task),
        batch(task, "train", 1),
        *(batch(task, s) for s in list(tasks.SPLITS)[1:]),
    ]
    rows = np.concatenate([b["inputs"] for b in drawn])
    assert len(np.unique(rows, axis=0)) > len(rows) // 2
    for other in drawn[1:]:
        assert (other["inputs"] != drawn[0]["inputs"]).any()


def test_scores_of_the_right_answers(task):
    drawn = batch(task)
    scores = task.scores(drawn["targets"], drawn)
    for name in ("accuracy", "sequence_accuracy"):
        assert rate(scores[name]) == 1.0, name
    assert float(scores["accuracy"][1]) == drawn["mask"].sum()
    assert float(scores["sequence_accuracy"][1]) == BATCH
    for name, (total, count) in scores.items():
        assert total.dtype == count.dtype == jnp.float32 and total.shape == count.shape == (), name
        assert np.isfinite(total) and count >= 0, name


def test_scores_count_only_scored_positions(task):
    drawn = batch(task)
    elsewhere = np.where(drawn["mask"], drawn["targets"], drawn["targets"] + 1)
    assert rate(task.scores(elsewhere, drawn)["accuracy"]) == 1.0
    wrong = drawn["targets"].copy()
    row, position = np.argwhere(drawn["mask"])[-1]
    wrong[row, position] += 1
    scores = task.scores(wrong, drawn)
    assert float(scores["accuracy"][0]) == drawn["mask"].sum() - 1
    assert float(scores["sequence_accuracy"][0]) == BATCH - 1


def test_scores_of_logits_are_those_of_their_largest(task):
    drawn = batch(task)
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random(drawn["targets"].shape) < 0.5, drawn["targets"], 1)
    logits = jax.nn.one_hot(tokens, task.vocab_size) + 0.1
    by_token, by_logit = task.scores(tokens, drawn), jax.jit(task.scores)(logits, drawn)
    assert set(by_token) == set(by_logit)
    for name, score in by_token.items():
        np.testing.assert_allclose(by_logit[name], score, rtol=1e-6, err_msg=name)


def test_scores_of_logits_that_are_not_numbers_are_errors(task):
    drawn = batch(task)
    logits = jnp.full((*drawn["targets"].shape, task.vocab_size), jnp.nan)
    scored = drawn["targets"][drawn["mask"]]
    assert float(task.scores(logits, drawn)["accuracy"][0]) == (scored == 0).sum()


def test_levels(task):
    for each in (task, task.eval_variant()):
        assert 0 < each.chance < each.ceiling <= 1
        text = each.describe()
        assert f"chance {each.chance:.3f}" in text and f"ceiling {each.ceiling:.3f}" in text
        assert str(each.length) in text and "\n" not in text


def test_test_time(task):
    tested = task.eval_variant()
    assert tested.test == () and tested.vocab_size == task.vocab_size
    assert tested.eval_variant() == tested
    for name, value in task.test:
        assert getattr(tested, name) == value
    drawn = batch(tested, "test")
    assert drawn["inputs"].shape == (BATCH, tested.length)
    assert rate(tested.scores(drawn["targets"], drawn)["accuracy"]) == 1.0


def test_static_and_immutable(task):
    assert hash(task) == hash(dataclasses.replace(task)) and task == dataclasses.replace(task)
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.vocab_size = 7


@pytest.mark.parametrize("name", tasks.REGISTRY)
def test_may_be_scanned(name):
    task = tasks.get(name)
    key = jax.random.key(5)

    def body(total, index):
        drawn = task.batch(key, "train", index, 2)
        return total + drawn["inputs"].sum(), drawn["targets"]

    _, targets = jax.jit(lambda: jax.lax.scan(body, 0, jnp.arange(3)))()
    np.testing.assert_array_equal(targets.reshape(BATCH, -1), batch(task)["targets"])


def test_bad_names(task):
    name = next(key for key, cls in tasks.REGISTRY.items() if isinstance(task, cls))
    with pytest.raises(ValueError, match=rf"variant: .*{task.variant}x.*mean '{task.variant}'"):
        tasks.get(name, task.variant + "x")
    with pytest.raises(ValueError, match="option: .*'vocab_sise'.*mean 'vocab_size'"):
        tasks.get(name, task.variant, vocab_sise=8)
    with pytest.raises(ValueError, match="vocab_size: .*'many'"):
        tasks.get(name, vocab_size="many")
    with pytest.raises(ValueError, match="split: .*'valid'.*mean 'validation'"):
        task.batch(jax.random.key(0), "valid", 0, 1)
    with pytest.raises(ValueError, match="test: .*'lenght'.*"):
        tasks.get(name, test={"lenght": 4})


@pytest.mark.parametrize(
    ("index", "size", "argument"), [(-1, 2, "index"), (2**31, 2, "index"), (0, 0, "batch_size")]
)
def test_bad_batches(index, size, argument):
    with pytest.raises(ValueError, match=f"^{argument}: expected a whole number"):
        tasks.get("parity").batch(jax.random.key(0), "train", index, size)


def test_bad_predictions():
    task = tasks.get("parity")
    drawn = batch(task)
    with pytest.raises(ValueError, match=r"predictions: expected tokens of shape \(6, 16\)"):
        task.scores(np.zeros((BATCH, 15), np.int32), drawn)
    with pytest.raises(ValueError, match=r"predictions: expected logits of shape \(6, 16, 4\)"):
        task.scores(np.zeros((BATCH, 16, 5), np.float32), drawn)


def test_unknown_task_and_probe():
    with pytest.raises(ValueError, match="name: .*'rewrte'.*mean 'rewrite'"):
        tasks.get("rewrte")
    with pytest.raises(ValueError, match=r"memseq\.tasks\.capacity\.table"):
        tasks.get("capacity")


def test_test_must_be_possible():
    with pytest.raises(ValueError, match="length: "):
        tasks.get("rewrite", test={"length": 10})
    with pytest.raises(ValueError, match="test: expected"):
        tasks.get("rewrite", test=("length",))


EXAMPLES = {
    "mqar": {"vocab_size": 12, "cells": [(12, 2, 1)], "noise": "zero"},
    "rewrite": {"vocab_size": 16, "length": 14, "pairs": 2, "updates": [1], "rewrites": [1]},
    "parity": {"length": 8},
    "needle": {"vocab_size": 16, "filler_tokens": 4, "length": 14, "needles": 2},
    "delayed_match": {"length": 10, "window": 4},
    "selective_copying": {"context": 10, "items": 3},
    "induction_heads": {"length": 10},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_example_of_the_docstring(name):
    task = tasks.get(name, **EXAMPLES[name])
    example = jax.jit(task.example)(jax.random.key(0))
    lines = dict(re.findall(r"^ +(inputs|targets) +(.*)$", type(task).__doc__, re.M))
    targets = [
        str(token) if scored else "."
        for token, scored in zip(example["targets"], example["mask"], strict=True)
    ]
    assert lines["inputs"].split() == [str(token) for token in example["inputs"]]
    assert lines["targets"].split() == targets


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_gives_the_reasons(name):
    text = tasks.REGISTRY[name].__doc__
    assert re.search(r"^ +Chance is ", text, re.M) and re.search(r"^ +Ceiling is ", text, re.M)

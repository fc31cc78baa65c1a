"""The studies of experiments/hopfield: what their sets are, and what is claimed of the layers."""

import importlib.util
import pathlib

import numpy as np
import pytest

from memseq import config as configs

ROOT = pathlib.Path(__file__).parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"experiments/hopfield/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sets = load("sets")


def test_bit_patterns():
    """Half of the bags hold one of the secret patterns, once; the others none."""
    x, mask, label = sets.bit_patterns(0, bags=400, members=16, bits=8, signals=8)
    assert mask.all() and label.sum() == 200 and set(np.unique(x)) == {0, 1}
    codes = (x @ 2 ** np.arange(8)).astype(int)
    negative = set(codes[label == 0].ravel())
    secret = set(np.unique(codes)) - negative
    assert len(secret) == 8
    counts = np.isin(codes, list(secret)).sum(1)
    np.testing.assert_array_equal(counts, label)


def test_latch():
    x, _, label = sets.latch(0, sequences=300, length=32, symbols=20)
    np.testing.assert_array_equal(x[:, 0].argmax(-1), label)
    assert (x[:, 1:].argmax(-1) >= 2).all() and (x.sum(-1) == 1).all()


def test_digit_sets():
    rng = np.random.default_rng(0)
    digits = rng.integers(10, size=500)
    images = np.repeat(digits[:, None], 64, axis=1).astype(float)
    x, mask, label = sets.digit_sets(images, digits, 0, bags=300, members=6, target=3)
    shown = np.round((x[..., 0] + 1) * 8).astype(int)
    np.testing.assert_array_equal(((shown == 3) & mask).sum(1), label)
    assert (mask.sum(1) >= 2).all() and not x[~mask].any()


def test_auc():
    label = np.array([0, 0, 1, 1])
    assert sets.auc(np.array([0.1, 0.4, 0.35, 0.8]), label) == 0.75
    assert sets.auc(np.zeros(4), label) == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("variant, epochs, least", [("bits", 40, 0.83), ("latch", 5, 1.0)])
def test_what_default_pooling_reaches(variant, epochs, least):
    """Bit-pattern multiple-instance learning and the latch, with no option set."""
    config = configs.load(f"{ROOT}/configs/hopfield/sets.py:{variant}")
    make = {"bits": sets.bit_patterns, "latch": sets.latch}[variant]
    data = make(config.seed, **config.options.to_dict())
    cut = int(len(data[2]) * config.train_share)
    parts = [[a[part] for a in data] for part in (slice(cut), slice(cut, None))]
    settings = config.training.to_dict() | {"epochs": epochs}
    model = sets.SetClassifier("hopfield_pooling", config.features)
    assert sets.train(model, *parts, seed=0, **settings)[-1][1] >= least

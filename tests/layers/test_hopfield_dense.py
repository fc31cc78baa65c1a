"""Dense associative memories and classical networks: capacities, descents, exact recall."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memseq.layers import (
    BinaryMemory,
    ClassicalHopfield,
    DenseAssociativeMemory,
    RandomFeatureMemory,
)


def coins(rng, *shape):
    return rng.choice([-1.0, 1.0], size=shape).astype(np.float32)


def flipped(layer, patterns, probes):
    """The share of neurons of some patterns that one step changes."""
    step = jax.jit(lambda s, y: layer.apply({}, s, y, method="step"))
    wrong = [np.asarray(step(patterns[i : i + 4], patterns)) != patterns[i : i + 4] for i in probes]
    return np.mean(wrong)


def test_polynomial_capacity():
    """D1: 361 = N^2 / (6 ln N) patterns of N = 100 neurons at power 3 are kept, 1809 are not."""
    rng = np.random.default_rng(0)
    layer = BinaryMemory(power=3, rectified=False)
    assert round(100**2 / (2 * 3 * math.log(100))) in (361, 362)
    assert flipped(layer, coins(rng, 361, 100), range(0, 200, 4)) < 2e-3
    assert flipped(layer, coins(rng, 1809, 100), range(0, 200, 4)) > 1e-2


def test_exponential_capacity():
    """D1: 20,000 patterns of 40 neurons without a single error."""
    patterns = coins(np.random.default_rng(0), 20_000, 40)
    assert flipped(BinaryMemory(kind="exponential"), patterns, range(0, 200, 4)) == 0


def test_power_two_is_hebb():
    """The classical network: its energy, up to the diagonal, and its step."""
    rng = np.random.default_rng(0)
    patterns, state = coins(rng, 5, 64), coins(rng, 7, 64)
    dense, classical = BinaryMemory(power=2, rectified=False), ClassicalHopfield()
    weights = classical.apply({}, patterns, method="store")
    np.testing.assert_allclose(
        weights, (patterns.T @ patterns - 5 * np.eye(64)) / 64, rtol=0, atol=1e-6
    )
    a = dense.apply({}, state, patterns, method="step")
    b = classical.apply({}, state, weights, method="step")
    np.testing.assert_array_equal(a, b)
    energy = dense.apply({}, state, patterns, method="energy")
    want = classical.apply({}, state, weights, method="energy") * 128 - 5 * 64
    np.testing.assert_allclose(energy, want, rtol=1e-4)


@pytest.mark.parametrize("load, low, high", [(0.10, 0.99, 1.0), (0.20, 0.0, 0.7)])
def test_classical_capacity(load, low, high):
    """D1: below 0.138 patterns a neuron they are kept, above they are lost."""
    layer = ClassicalHopfield()
    patterns = coins(np.random.default_rng(0), int(1000 * load), 1000)
    weights = layer.apply({}, patterns, method="store")
    ends = jax.jit(lambda s: layer.apply({}, s, weights, method="retrieve"))(patterns[:50])
    overlap = np.mean(np.asarray(ends) * patterns[:50])
    assert low < overlap <= high


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_one_neuron_after_another_never_raises_the_energy(seed):
    """D3, for every kind and rule."""
    rng = np.random.default_rng(seed)
    patterns, state = coins(rng, 9, 16), coins(rng, 30, 16)
    order = rng.permutation(16).astype(np.int32)
    for layer in (
        BinaryMemory(power=2, rectified=False),
        BinaryMemory(power=3),
        BinaryMemory(power=4, rectified=False),
        BinaryMemory(kind="exponential"),
    ):
        before, after = SWEEPS[layer](state, patterns, order)
        assert np.isfinite(after).all() and (after <= before + 1e-4 * np.abs(before)).all()
    for rule in ("hebb", "storkey", "pseudo_inverse"):
        before, after = SWEEPS[rule](state, patterns, order)
        assert np.isfinite(after).all() and (after <= before + 1e-4).all()


class Sweeps(dict):
    """Compiled: (energy before, energy after one sweep)."""

    def __missing__(self, key):
        def run(state, patterns, order):
            layer = ClassicalHopfield(key) if isinstance(key, str) else key
            held = patterns
            if isinstance(key, str):
                held = layer.apply({}, patterns, method="store")
            after = layer.apply({}, state, held, order, method="sweep")
            return [layer.apply({}, s, held, method="energy") for s in (state, after)]

        self[key] = jax.jit(run)
        return self[key]


SWEEPS = Sweeps()


def test_all_neurons_at_once_may_go_to_and_fro():
    layer = ClassicalHopfield()
    weights = jnp.array([[0.0, -1], [-1, 0]])
    state = jnp.array([[1.0, 1]])
    once = layer.apply({}, state, weights, method="step")
    np.testing.assert_array_equal(once, -state)
    np.testing.assert_array_equal(layer.apply({}, once, weights, method="step"), state)
    swept = layer.apply({}, state, weights, jnp.arange(2), method="sweep")
    np.testing.assert_array_equal(swept, [[-1, 1]])


def test_pseudo_inverse_is_exact_and_storkey_beats_hebb():
    """D3: half as many patterns as neurons, all fixed; the share of neurons that a step flips."""
    patterns = coins(np.random.default_rng(0), 50, 100)
    errors = {}
    for rule in ("hebb", "storkey", "pseudo_inverse"):
        layer = ClassicalHopfield(rule)
        weights = layer.apply(
            {}, patterns[: 50 if rule == "pseudo_inverse" else 20], method="store"
        )
        np.testing.assert_allclose(weights, np.transpose(weights), atol=1e-5)
        state = patterns if rule == "pseudo_inverse" else patterns[:20]
        errors[rule] = np.mean(layer.apply({}, state, weights, method="step") != state)
    assert errors["pseudo_inverse"] == 0 and errors["storkey"] < errors["hebb"] / 2


def storkey(patterns):
    """Storkey's rule, number by number."""
    n = patterns.shape[1]
    weights = np.zeros((n, n))
    for x in patterns:
        new = weights.copy()
        for i, j in np.ndindex(n, n):
            h_ij = sum(weights[i, k] * x[k] for k in range(n) if k not in (i, j))
            h_ji = sum(weights[j, k] * x[k] for k in range(n) if k not in (i, j))
            new[i, j] += (x[i] * x[j] - x[i] * h_ji - h_ij * x[j]) / n
        weights = new
    return weights - np.diag(np.diag(weights))


def test_storkey_is_its_definition():
    patterns = coins(np.random.default_rng(0), 4, 7)
    weights = ClassicalHopfield("storkey").apply({}, patterns, method="store")
    # the sum leaves neurons i and j out; on the diagonal, which is dropped, they are one
    np.testing.assert_allclose(weights, storkey(patterns.astype(np.float64)), atol=1e-5)


CONTINUOUS = {
    "lse": {"beta": 1.3},
    "lse_euclidean": {"beta": 2.0},
    "lsr": {"beta": 0.2},
    "polynomial": {"power": 4},
    "exponential": {"beta": 0.8},
}


def written_out(kind, beta, power, x, stored):
    """(energy, step) of one state, from the table."""
    products, squares = stored @ x, ((x - stored) ** 2).sum(-1)
    radius = np.sqrt(len(x))
    if kind == "lsr":
        near = squares < 2 / beta
        energy = -np.log(1e-12 + np.maximum(1 - beta / 2 * squares, 0).sum()) / beta
        return energy, stored[near].mean(0) if near.any() else x
    if kind == "polynomial":
        step = (np.maximum(products, 0) ** (power - 1)) @ stored
        return -(np.maximum(products, 0) ** power).sum(), radius * step / np.linalg.norm(step)
    scores = -beta / 2 * squares if kind == "lse_euclidean" else beta * products
    p, total = np.exp(scores) / np.exp(scores).sum(), np.log(np.exp(scores).sum())
    if kind == "lse":
        return x @ x / 2 - total / beta, p @ stored
    if kind == "lse_euclidean":
        return -total / beta, p @ stored
    return -total, radius * (p @ stored) / np.linalg.norm(p @ stored)


@pytest.mark.parametrize("kind", CONTINUOUS)
def test_continuous_kinds(kind):
    """Energy and step as written, and no step raises the energy."""
    layer = DenseAssociativeMemory(6, kind=kind, steps=1, **CONTINUOUS[kind])
    rng = np.random.default_rng(0)
    stored, x = rng.normal(size=(20, 6)) * 1.5, rng.normal(size=(2, 15, 6))
    if kind in ("polynomial", "exponential"):
        x *= np.sqrt(6) / np.linalg.norm(x, axis=-1, keepdims=True)
    with jax.enable_x64(True):
        energies = []
        call = jax.jit(
            lambda x: (
                layer.apply({}, x, stored, method="energy"),
                layer.apply({}, x, stored=stored),
            )
        )
        for _ in range(6):
            energy, y = map(np.asarray, call(x))
            for b, i in np.ndindex(2, 15):
                want = written_out(kind, layer.beta, layer.power, x[b, i], stored)
                np.testing.assert_allclose(energy[b, i], want[0], rtol=1e-9)
                np.testing.assert_allclose(y[b, i], want[1], atol=1e-9)
            energies.append(energy)
            x = y
    assert np.diff(energies, axis=0).max() <= 1e-10
    assert np.diff(energies, axis=0).min() < -1e-3


def test_lsr_recalls_exactly_in_one_step():
    """D2, theorem 1: beta = 2 / (r - d)^2 for the least distance r brings back all within d."""
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(200, 64))
    distances = np.linalg.norm(stored[:, None] - stored[None], axis=-1) + np.diag(
        np.full(200, np.inf)
    )
    least, d = distances.min(), 0.45 * distances.min()
    away = rng.normal(size=stored.shape)
    x = stored + 0.999 * d * away / np.linalg.norm(away, axis=-1, keepdims=True)
    layer = DenseAssociativeMemory(64, kind="lsr", beta=2 / (least - d) ** 2)
    with jax.enable_x64(True):
        found = layer.apply({}, x[None], stored=stored)
    np.testing.assert_allclose(found[0], stored, rtol=0, atol=1e-9)


def test_lsr_has_minima_between_patterns_and_none_far_away():
    """D2: the mean of patterns that see each other is one; outside the support nothing moves."""
    stored = np.array([[1.0, 0], [-1, 0], [0, 1], [0, -1], [40, 40]])
    layer = DenseAssociativeMemory(2, kind="lsr", beta=1.0)
    with jax.enable_x64(True):
        x = np.array([[[0.05, -0.02], [0.0, 0.0], [20.0, -20.0], [39.5, 40.2]]])
        found = np.asarray(layer.apply({}, x, stored=stored))
        slope = jax.grad(lambda x: layer.apply({}, x, stored, method="energy").sum())(x)
    np.testing.assert_allclose(found[0], [[0, 0], [0, 0], [20, -20], [40, 40]], atol=1e-6)
    np.testing.assert_allclose(slope[0, 1:3], 0, atol=1e-6)
    assert np.abs(slope[0, [0, 3]]).max() > 1e-3


def test_random_features_close_in_as_their_number_to_the_minus_half():
    """D4: the error of the kernel's sum at 256, 1,024 and 4,096 features."""
    rng = np.random.default_rng(0)
    errors = []
    for count in (256, 1024, 4096):
        relative = []
        for seed in range(6):
            patterns = rng.normal(size=(1, 10, 16)).astype(np.float32) * 0.5
            x = patterns[:, :5] + 0.3 * rng.normal(size=(1, 5, 16)).astype(np.float32)
            layer = RandomFeatureMemory(16, count, seed=seed)
            state = layer.write(layer.init_state(1), patterns)
            found = layer.kernel_sum(state, x)
            exact = np.exp(-((x[0][:, None] - patterns[0][None]) ** 2).sum(-1) / 2).sum(-1)
            relative.append(np.asarray(found[0]) / exact - 1)
        errors.append(np.sqrt(np.mean(np.square(relative))))
    assert 0.02 < errors[0] < 0.3
    slope = np.polyfit(np.log([256, 1024, 4096]), np.log(errors), 1)[0]
    np.testing.assert_allclose(slope, -0.5, atol=0.15)


def test_random_features_write_erase_and_retrieve():
    """D4: what is erased is gone, the rest is found again; masked patterns are never written."""
    rng = np.random.default_rng(0)
    layer = RandomFeatureMemory(8, 4096, beta=2.0)
    patterns = 2 * rng.normal(size=(2, 6, 8)).astype(np.float32)
    kept = layer.write(layer.init_state(2), patterns[:, :3])
    state = layer.erase(layer.write(kept, patterns[:, 3:]), patterns[:, 3:])
    np.testing.assert_allclose(state.memory, kept.memory, atol=1e-5)
    mask = np.array([[True] * 3 + [False] * 3] * 2)
    np.testing.assert_allclose(
        layer.write(layer.init_state(2), patterns, mask).memory, kept.memory, atol=1e-5
    )
    noisy = patterns[:, :3] + 0.2 * rng.normal(size=(2, 3, 8)).astype(np.float32)
    found = jax.jit(layer.retrieve)(kept, noisy)
    before, after = (np.linalg.norm(a - patterns[:, :3], axis=-1) for a in (noisy, found))
    assert (after < 0.3 * before.mean()).all()
    assert (np.asarray(layer.energy(kept, found)) < np.asarray(layer.energy(kept, noisy))).all()


def test_bad_input():
    layer = DenseAssociativeMemory(4, kind="lre")
    with pytest.raises(ValueError, match="kind: expected one of 'lse', .*mean 'lsr'"):
        layer.apply({}, np.zeros((1, 2, 4), np.float32), stored=np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match="stored: expected .*patterns, features"):
        DenseAssociativeMemory(4).apply(
            {}, np.zeros((1, 2, 4), np.float32), stored=np.zeros((3, 5), np.float32)
        )
    with pytest.raises(ValueError, match="rule: expected one of 'hebb'"):
        ClassicalHopfield("heb").apply({}, np.ones((2, 3), np.float32), method="store")
    with pytest.raises(ValueError, match=r"state: expected \[..., neurons\]"):
        BinaryMemory().apply({}, np.ones((1, 2)), np.ones((4, 3), np.float32), method="step")
    with pytest.raises(ValueError, match="steps: expected an integer"):
        DenseAssociativeMemory(4, steps=0).apply(
            {}, np.zeros((1, 2, 4), np.float32), stored=np.zeros((3, 4), np.float32)
        )

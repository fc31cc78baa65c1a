"""Reservoirs and the ELM neuron against their equations, step by step; memory capacity."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import EchoState, ELMNeuron, ReservoirMemory
from memseq.layers.recurrent.reservoir import random_matrix, ridge, skip_matrix
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    init,
    run64,
    sigmoid,
)


def rounded(layer):
    """The constants as the layer has them: float32."""
    return [x.astype(np.float32).astype(np.float64) for x in layer.constants()]


def echo_state(layer, params, x):
    skip, kernel, into, bias = rounded(layer)
    h, y = np.zeros(len(kernel)), []
    for u in x:
        h = layer.alpha * h @ skip + layer.beta * np.tanh(h @ kernel + u @ into + bias)
        y.append(h @ params["output"]["kernel"])
    return np.array(y), h, {}


def reservoir_memory(layer, params, x):
    skip, kernel, into, bias, into_line, from_line = rounded(layer)
    h, m, y = np.zeros(len(kernel)), np.zeros(len(from_line)), []
    for u in x:
        m = layer.memory_decay * np.roll(m, 1) + u @ into_line
        fresh = np.tanh(h @ kernel + u @ into + m @ from_line + bias)
        h = layer.alpha * h @ skip + layer.beta * fresh
        y.append(h @ params["output"]["kernel"])
    return np.array(y), np.concatenate([m, h]), {}


def elm(layer, params, x):
    tau = 1 + (layer.tau_max - 1) * sigmoid(params["tau_bias"])
    weight = np.maximum(params["synapse_bias"], 0)
    branches = layer.branches or layer.features
    b, m, y = np.zeros(branches), np.zeros(len(tau)), []
    for u in x:
        b = np.exp(-0.2) * b + (weight * u).reshape(branches, -1).sum(1)
        m = np.exp(-1 / tau) * m
        hidden = np.concatenate([b, m]) @ params["into"]["kernel"] + params["into_bias"]
        change = np.maximum(hidden, 0) @ params["out_of"]["kernel"] + params["out_bias"]
        m = m + (1 - np.exp(-5 / tau)) * 1.7159 * np.tanh(2 / 3 * change)
        y.append(m @ params["output"]["kernel"])
    return np.array(y), np.concatenate([b, m]), {}


LAYERS = {
    "echo state": (EchoState(FEATURES), echo_state),
    "echo state, plain": (
        EchoState(FEATURES, alpha=0.0, beta=1.0, skip="identity", hidden_dim=9),
        echo_state,
    ),
    "reservoir memory": (
        ReservoirMemory(FEATURES, memory_dim=7, skip="cycle", memory_decay=0.9),
        reservoir_memory,
    ),
    "ELM": (ELMNeuron(FEATURES), elm),
    "ELM, branches": (ELMNeuron(FEATURES, branches=4, hidden_dim=6, tau_max=50.0), elm),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_transcription(name, ids):
    check_transcription(*LAYERS[name], ids)


def test_only_the_read_out_is_trained():
    assert count(EchoState(32), 32) == 32 * 32
    assert set(init(ReservoirMemory(16))) == {"output"}


@pytest.mark.parametrize("size", [100, 300])
def test_spectral_radius_without_eigenvalues(size):
    radius = np.abs(np.linalg.eigvals(random_matrix(3, size, 1.0))).max()
    assert 0.95 < radius < 1.08


@pytest.mark.parametrize("kind", ["orthogonal", "cycle", "identity"])
def test_the_linear_path_is_orthogonal(kind):
    matrix = skip_matrix(kind, 0, 12)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(12), atol=1e-12)


def capacity(recur, into, time=2500, delays=130):
    """Sum over delays of the squared correlation of the best linear read-out with the input then.

    Measured on fresh input, so chance adds nothing.
    """
    rng = np.random.default_rng(1)
    u = rng.uniform(-0.8, 0.8, size=2 * time)
    states, h = [], np.zeros(len(into))
    for value in u:
        h = recur(h, into * value)
        states.append(h)
    states = np.array(states)
    targets = np.stack([np.roll(u, d) for d in range(1, delays + 1)], axis=1)
    fit, test = slice(delays + 100, time), slice(time, 2 * time)
    gram = states[fit].T @ states[fit]
    gram += 1e-9 * np.trace(gram) / len(gram) * np.eye(len(gram))
    out = states[test] @ np.linalg.solve(gram, states[fit].T @ targets[fit])
    found = 0.0
    for d in range(delays):
        found += max(np.corrcoef(out[:, d], targets[test][:, d])[0, 1], 0) ** 2
    return found


def test_memory_capacity():
    """At most as many as units; a cycle just below 1 has nearly all, and one tap next to none."""
    rng = np.random.default_rng(0)
    cycle, into = skip_matrix("cycle", 0, 100), rng.uniform(-0.1, 0.1, size=100)
    tap = np.eye(100)[0] * 0.1
    dense = random_matrix(0, 100, 0.9)
    kept = capacity(lambda h, u: 0.99 * h @ cycle + u, into)
    assert 85 <= kept <= 100
    assert capacity(lambda h, u: h @ dense + u, into) < kept / 1.5
    assert capacity(lambda h, u: 0.9999 * h @ cycle + u, tap) < 10


def test_ridge():
    """The normal equations; and a layer's read-out from its own states, in closed form."""
    layer = EchoState(16, hidden_dim=32, input_scale=0.5)
    params = init(layer)
    x = np.random.default_rng(0).normal(size=(1, 400, 16))
    target = np.roll(x, 3, axis=1)
    with jax.enable_x64(True):
        states = np.asarray(layer.apply({"params": params}, x, method="states"))[0]
        kernel = np.asarray(ridge(jnp.asarray(states[3:]), jnp.asarray(target[0, 3:]), 1e-8))
    penalty = 1e-8 * np.trace(states[3:].T @ states[3:]) / 32
    residual = states[3:].T @ (target[0, 3:] - states[3:] @ kernel) - penalty * kernel
    np.testing.assert_allclose(residual, 0, atol=1e-8)
    y, _, _ = run64(layer, {"output": {"kernel": kernel}}, x)
    np.testing.assert_allclose(y[0], states @ kernel, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="penalty: .* got 0"):
        ridge(states, states, 0)


def test_elm_starts():
    params = init(ELMNeuron(16))
    tau = 1 + 999 * sigmoid(np.asarray(params["tau_bias"], np.float64))
    np.testing.assert_allclose(np.diff(np.log(tau)), np.log(1000) * 0.96 / 15, rtol=1e-2)
    assert 1 < tau.min() < 1.2 and 800 < tau.max() < 1000
    np.testing.assert_array_equal(params["synapse_bias"], 0.5)
    sizes = 32 + 32 + 64 * 64 + 64 + 64 * 32 + 32 + 32 * 32
    assert count(ELMNeuron(32), 32) == sizes


@pytest.mark.parametrize("layer", [EchoState(32), ELMNeuron(32)])
def test_dtypes(layer):
    assert check_dtypes(layer).memory.dtype == jnp.float32


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (EchoState(16, skip="line"), "skip: .* got 'line'"),
        (ReservoirMemory(16, memory_dim=0), "memory_dim: .* got 0"),
        (ReservoirMemory(16, memory_decay=1.1), "memory_decay: .* got 1.1"),
        (ELMNeuron(16, branches=3), "branches: expected a divisor of 16, got 3"),
        (ELMNeuron(16, tau_max=1.0), "tau_max: .* got 1.0"),
    ],
)
def test_bad_options(layer, message):
    with pytest.raises(ValueError, match=message):
        count(layer)

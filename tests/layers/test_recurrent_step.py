"""Recurrences with nonlinear feedback against their equations, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import GRU, LEM, LMU, LSTM, SLSTM, WaveRNN
from memseq.layers.state_space import hippo
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    init,
    inputs,
    random_params,
    rms_norm,
    run64,
    short_conv,
    sigmoid,
)


def lstm(layer, params, x):
    kernel, units = params["recurrent"]["kernel"], len(params["recurrent"]["kernel"])
    h, c, y = np.zeros(units), np.zeros(units), []
    for u in x @ params["input"]["kernel"] + params["gate_bias"]:
        f, i, o, g = np.split(u + h @ kernel, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        y.append(h @ params["output"]["kernel"])
    return np.array(y), np.stack([h, c]), {}


def gru(layer, params, x):
    kernel = params["recurrent"]["kernel"]
    h, y = np.zeros(len(kernel)), []
    for u in x @ params["input"]["kernel"] + params["input"]["bias"]:
        (r, z, n), (hr, hz, hn) = np.split(u, 3), np.split(h @ kernel, 3)
        n = np.tanh(n + sigmoid(r + hr) * (hn + params["reset_bias"]))
        z = sigmoid(z + hz)
        h = (1 - z) * n + z * h
        y.append(h @ params["output"]["kernel"])
    return np.array(y), h, {}


def slstm(layer, params, x):
    """c = f c + i tanh(z), n = f n + i, h = sigmoid(o) c / n: without a stabiliser."""
    convolved = x
    if layer.conv_width:
        convolved = short_conv(x, params["conv"]["kernel"])
    else:
        convolved = x * sigmoid(x)
    taken = [x @ params["input"]["kernel"], convolved @ params["gate"]["kernel"]]
    taken = np.concatenate(taken, axis=1).reshape(len(x), 4, layer.heads, -1)
    bias = params["gate_bias"].reshape(taken.shape[1:])
    size = taken.shape[-1]
    kernel = params["recurrent"]["kernel"].reshape(layer.heads, size, 4, size)
    h, c, n = (np.zeros((layer.heads, size)) for _ in range(3))
    y = []
    for u in taken:
        mixed = np.array([h[k] @ kernel[k].reshape(size, -1) for k in range(layer.heads)])
        gates = u + bias + np.moveaxis(mixed.reshape(layer.heads, 4, size), 1, 0)
        z, o, i, f = gates
        c = sigmoid(f) * c + np.exp(i) * np.tanh(z)
        n = sigmoid(f) * n + np.exp(i)
        h = sigmoid(o) * c / n
        normed = np.concatenate([rms_norm(a, params["norm"]["scale"]) for a in h])
        y.append(normed @ params["output"]["kernel"])
    return np.array(y), None, {}


def lem(layer, params, x):
    from_y, from_z = params["from_y"]["kernel"], params["from_z"]["kernel"]
    y, z, out = np.zeros(len(from_z)), np.zeros(len(from_z)), []
    for u in x @ params["input"]["kernel"] + params["input"]["bias"]:
        (u1, u2, u3, u4), (w1, w2, w3) = np.split(u, 4), np.split(y @ from_y, 3)
        b, a = layer.dt * sigmoid(u1 + w1), layer.dt * sigmoid(u2 + w2)
        z = (1 - a) * z + a * np.tanh(u3 + w3)
        y = (1 - b) * y + b * np.tanh(u4 + z @ from_z)
        out.append(y @ params["output"]["kernel"])
    return np.array(out), np.stack([y, z]), {}


def wave_rnn(layer, params, x):
    kernel, bias = params["recurrent"]["kernel"], params["wave_bias"]
    rings, units = layer.memory_shape()
    h, y = np.zeros((rings, units)), []
    for u in x @ params["input"]["kernel"]:
        after = np.zeros_like(h)
        for p in range(units):
            for tap, source in enumerate((p - 1, p, p + 1)):
                after[:, p] += h[:, source % units] @ kernel[tap]
            after[:, p] += bias
        after[:, 0] += u
        h = {"relu": lambda a: np.maximum(a, 0), "tanh": np.tanh}[layer.activation](after)
        y.append(h.reshape(-1) @ params["output"]["kernel"])
    return np.array(y), h, {}


def lmu(layer, params, x):
    """The Legendre memory by its exact discretisation, then the hidden state."""
    a, b = hippo.transition("lmu", layer.order)
    kept = hippo.expm(a / layer.window)
    write = np.linalg.solve(a, (kept - np.eye(layer.order)) @ b)
    kernels = {name: part["kernel"] for name, part in params.items()}
    m, h, y = np.zeros(layer.order), np.zeros(layer.units()), []
    for u in x:
        signal = u @ kernels["encode"] + h @ kernels["encode_hidden"] + m @ kernels["encode_memory"]
        m = kept @ m + write * signal
        h = np.tanh(u @ kernels["input"] + h @ kernels["from_hidden"] + m @ kernels["from_memory"])
        y.append(h @ kernels["output"])
    return np.array(y), np.concatenate([m, h]), {}


LAYERS = {
    "LSTM": (LSTM(FEATURES, hidden_dim=6), lstm),
    "GRU": (GRU(FEATURES), gru),
    "sLSTM": (SLSTM(FEATURES), slstm),
    "sLSTM, no conv": (SLSTM(FEATURES, heads=2, hidden_dim=6, conv_width=0), slstm),
    "LEM": (LEM(FEATURES), lem),
    "LEM, slow": (LEM(FEATURES, dt=0.2, hidden_dim=5), lem),
    "LMU": (LMU(FEATURES, order=5, window=7, hidden_dim=6), lmu),
    "wave RNN": (WaveRNN(FEATURES, activation="tanh"), wave_rnn),
    "wave RNN, relu": (WaveRNN(FEATURES, rings=2, hidden_dim=10), wave_rnn),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_transcription(name, ids):
    # a relu ring with random weights grows by a factor a step: the size is part of the tolerance
    tolerance = 1e-5 if name == "wave RNN, relu" else 1e-9
    check_transcription(*LAYERS[name], ids, tolerance=tolerance)


def test_the_ring_is_a_delay_line():
    """At the start a ring of n units returns its input n - 1 steps later, and then adds to it."""
    layer = WaveRNN(FEATURES, rings=2, hidden_dim=14)
    params = init(layer)
    params["input"]["kernel"] = np.eye(FEATURES)[:, :2]
    params["output"]["kernel"] = np.zeros((14, FEATURES))
    params["output"]["kernel"][6, 0] = params["output"]["kernel"][13, 1] = 1
    x = np.abs(inputs())
    y, _, _ = run64(layer, params, x)
    want = np.zeros((2, 21, 2))
    for lag in (6, 13, 20):  # once around, twice, three times: a collision from 7 steps on
        want[:, lag:] += x[:, : 21 - lag, :2]
    np.testing.assert_allclose(y[..., :2], want, rtol=0, atol=1e-12)


def test_lmu_remembers_its_window():
    """The memory alone holds the last steps of its signal: Legendre coefficients of them."""
    layer = LMU(FEATURES, order=12, window=60)
    params = random_params(layer)
    for name in ("encode_hidden", "encode_memory"):
        params[name]["kernel"] *= 0
    time = np.arange(180)[None, :, None]
    x = np.sin(0.05 * time + np.arange(FEATURES)) + np.cos(0.02 * time)
    _, state, _ = run64(layer, params, x)
    signal = (x[0] @ params["encode"]["kernel"])[::-1, 0]
    got = hippo.reconstruct(np.asarray(state.memory[0, :12]), "lmu", (np.arange(60) + 0.5) / 60)
    np.testing.assert_allclose(got, signal[:60], rtol=0, atol=2e-3 * np.abs(signal).max())


def test_lem_stays_in_its_box():
    layer = LEM(FEATURES)
    params = jax.tree.map(lambda a: 20 * a, random_params(layer))
    _, state, _ = run64(layer, params, 100 * inputs())
    assert np.isfinite(state.memory).all() and (np.abs(state.memory) <= 1).all()


def test_slstm_does_not_overflow_and_rows_start_apart():
    """Input gates of +-500, one row begun and the other empty."""
    layer = SLSTM(FEATURES)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), random_params(layer))
    params["gate_bias"] = params["gate_bias"].at[2].set(500 * jnp.sign(params["gate_bias"][2]))
    x = jnp.asarray(inputs(), jnp.float32)

    def loss(params, x):
        y, _ = layer.apply({"params": params}, x)
        return jnp.sum(y**2), y

    (_, y), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, x)
    assert np.isfinite(y).all() and all(np.isfinite(a).all() for a in jax.tree.leaves(found))
    begun = jnp.array([[4] * 21, [-1] * 10 + [4] * 11], jnp.int32)
    apart, _ = jax.jit(layer.apply)({"params": params}, x, None, begun)
    alone, _ = jax.jit(layer.apply)({"params": params}, x[1:, 10:])
    np.testing.assert_allclose(apart[1, 10:], alone[0], rtol=1e-5, atol=1e-5)


def test_slstm_gradient_is_complete():
    """The stabiliser is a constant to the gradient: a number compared with finite differences."""
    layer = SLSTM(FEATURES, heads=2, conv_width=0)
    params, x = random_params(layer), inputs()

    def loss(params):
        return jnp.sum(jnp.sin(layer.apply({"params": params}, x)[0]))

    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        direction = jax.tree.map(lambda a: rng.normal(size=a.shape), params)
        grads = jax.jit(jax.grad(loss))(params)
        got = sum(
            np.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (grads, direction)), strict=True)
        )
        near = [
            float(jax.jit(loss)(jax.tree.map(lambda a, d, e=e: a + e * d, params, direction)))
            for e in (1e-6, -1e-6)
        ]
    np.testing.assert_allclose(got, (near[0] - near[1]) / 2e-6, rtol=1e-6)


def test_starts():
    kernel = np.asarray(init(LSTM(16))["recurrent"]["kernel"], np.float64)
    for block in np.split(kernel, 4, axis=1):
        np.testing.assert_allclose(block @ block.T, np.eye(16), atol=1e-5)
    bias = np.asarray(init(LSTM(16))["gate_bias"])
    np.testing.assert_array_equal(bias, [1] * 16 + [0] * 48)
    bias = np.asarray(init(SLSTM(16))["gate_bias"])
    np.testing.assert_array_equal(bias[:3], 0)
    np.testing.assert_allclose(bias[3, [0, 3, 4, 7]], [-5, 7, -5, 7], atol=1e-5)
    np.testing.assert_array_equal(init(SLSTM(16))["recurrent"]["kernel"], 0)
    assert np.abs(init(LEM(16))["input"]["kernel"]).max() <= 0.25
    np.testing.assert_array_equal(init(LMU(16))["encode_memory"]["kernel"], 0)


def test_defaults():
    assert count(LSTM(32), 32) == 8 * 32 * 32 + 4 * 32 + 32 * 32
    assert count(GRU(32), 32) == 6 * 32 * 32 + 3 * 32 + 32 + 32 * 32
    assert count(LEM(32), 32) == 8 * 32 * 32 + 4 * 32 + 32 * 32
    assert count(SLSTM(32), 32) == 4 * 32 * 32 + 4 * 4 * 64 + 128 + 128 + 8 + 32 * 32
    assert count(WaveRNN(32), 32) == 32 * 4 + 3 * 16 + 4 + 32 * 32
    assert count(LMU(32), 32) == 32 * (33 + 33 + 32) + 64 * 33
    assert SLSTM(32).init_state(2).memory.shape == (2, 4, 32)


@pytest.mark.parametrize("layer", [LSTM(32), SLSTM(32), WaveRNN(32), LMU(32)])
def test_dtypes(layer):
    assert check_dtypes(layer).memory.dtype == jnp.float32


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LSTM(16, hidden_dim=0), "hidden_dim: .* got 0"),
        (SLSTM(16, heads=3), "heads: expected a divisor of 16 units, got 3"),
        (LEM(16, dt=1.5), "dt: expected 0 < dt <= 1, got 1.5"),
        (LMU(16, order=0), "order: .* got 0"),
        (LMU(16, window=0), "window: .* got 0"),
        (WaveRNN(16, rings=3), "rings: expected a divisor of 16 units, got 3"),
        (WaveRNN(16, activation="sine"), "activation: .* got 'sine'"),
    ],
)
def test_bad_options(layer, message):
    with pytest.raises(ValueError, match=message):
        count(layer)

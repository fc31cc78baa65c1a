"""S4, LSSL and H3 against their equations, step by step; S4's kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import H3, LSSL, S4, S4D
from memseq.layers.state_space import hippo
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    gated_linear_unit,
    init,
    inputs,
    random_params,
    run64,
    short_conv,
)


def halves(parts):
    real, imag = np.split(parts, 2, axis=-1)
    return real + 1j * imag


def full(vector):
    """Modes and their conjugates."""
    return np.concatenate([vector, vector.conj()])


def channel_systems(params):
    """(A', B', C) of each channel, complex of full size: solved densely."""
    a = -np.exp(params["decay"]) + 1j * params["phase"]
    for c in range(len(a)):
        p, b, read = (full(halves(params[name][c])) for name in ("P", "B", "C"))
        matrix = np.diag(full(a[c])) - np.outer(p, p.conj())
        dt, eye = np.exp(params["dt_log"][c, 0]), np.eye(len(p))
        left = np.linalg.inv(eye - dt / 2 * matrix)
        yield left @ (eye + dt / 2 * matrix), dt * left @ b, read


def s4(layer, params, x):
    y, memory = np.zeros(x.shape), []
    for c, (kept, write, read) in enumerate(channel_systems(params)):
        h = np.zeros(len(write), complex)
        for t in range(len(x)):
            h = kept @ h + write * x[t, c]
            y[t, c] = (read @ h).real + params["D"][c] * x[t, c]
        upper = h[: len(h) // 2]
        memory.append(np.concatenate([upper.real, upper.imag]))
    return gated_linear_unit(params, y), np.array(memory), {}


def lssl(layer, params, x):
    a, b = hippo.transition("legs", layer.state_dim)
    eye, y, memory = np.eye(layer.state_dim), np.zeros(x.shape), []
    for c in range(x.shape[1]):
        dt = np.exp(params["dt_log"][c, 0])
        left = np.linalg.inv(eye - layer.alpha * dt * a)
        h = np.zeros(layer.state_dim)
        for t in range(len(x)):
            h = left @ ((eye + (1 - layer.alpha) * dt * a) @ h + dt * b * x[t, c])
            y[t, c] = params["C"][c] @ h + params["D"][c] * x[t, c]
        memory.append(h)
    return gated_linear_unit(params, y), np.array(memory), {}


def h3(layer, params, x):
    query, key, value = (x @ params[name]["kernel"] for name in ("query", "key", "value"))
    key = short_conv(key, params["conv"]["kernel"], activation=None)
    heads = len(params["D"])
    query, key, value = (a.reshape(len(x), heads, -1) for a in (query, key, value))
    a = -np.exp(params["decay"]) + 1j * params["phase"]
    kept = np.exp(np.exp(params["dt_log"]) * a)
    write, read = (kept - 1) / a, 2 * halves(params["C"])
    size = key.shape[-1]
    state = np.zeros((heads, size, size, a.shape[1]), complex)
    y = []
    for t in range(len(x)):
        out = []
        for h in range(heads):
            pair = np.outer(key[t, h], value[t, h])
            state[h] = kept[h] * state[h] + write[h] * pair[..., None]
            held = np.sum(read[h] * state[h], axis=-1).real + params["D"][h] * pair
            out.append(held.T @ query[t, h])
        y.append(np.concatenate(out) @ params["output"]["kernel"])
    flat = state.reshape(-1, a.shape[1])
    memory = np.concatenate([flat.real, flat.imag], axis=1)
    return np.array(y), memory, {"mean_decay": abs(kept)}


LAYERS = {
    "S4": (S4(FEATURES, state_dim=6, chunk_size=8), s4),
    "S4, linear, step by step": (S4(FEATURES, state_dim=4, implementation="reference"), s4),
    "LSSL": (LSSL(FEATURES, state_dim=4, chunk_size=8), lssl),
    "LSSL, backward Euler": (LSSL(FEATURES, state_dim=6, alpha=1.0, glu=False), lssl),
    "H3": (H3(FEATURES, state_dim=4), h3),
    "H3, heads": (H3(FEATURES, heads=8, state_dim=4, conv_width=2, chunk_size=8), h3),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_transcription(name, ids):
    check_transcription(*LAYERS[name], ids)


@pytest.mark.parametrize("length", [2, 33, 64])
def test_kernel_is_the_recurrences(length):
    """The generating function's taps are C A'^l B', at w = -1 too, and odd lengths."""
    layer = S4(FEATURES, state_dim=8)
    params = random_params(layer)
    with jax.enable_x64(True):
        got = layer.apply({"params": params}, length, method="kernel")
    want = []
    for kept, write, read in channel_systems(params):
        taps, h = [], write
        for _ in range(length):
            taps.append((read @ h).real)
            h = kept @ h
        want.append(taps)
    size = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * size)
    if length % 2 == 0:  # at w = -1 the paper's form takes the limit dt / 2 C~ . B
        for c, (kept, _, read) in enumerate(channel_systems(params)):
            left = read - read @ np.linalg.matrix_power(kept, length)
            limit = np.exp(params["dt_log"][c, 0]) / 2 * left @ full(halves(params["B"][c]))
            found = np.fft.rfft(got[c])[-1]
            np.testing.assert_allclose(found, limit, rtol=0, atol=1e-12 * length * size)


def test_start_values_in_float32():
    """N = 64, 1024 steps: the chunked form and the kernel against the dense recurrence."""
    layer = S4(2, implementation="chunked", glu=False)
    params, x = init(layer), inputs(time=1024, features=2, batch=1)
    y, _ = jax.jit(layer.apply)({"params": params}, jnp.asarray(x, jnp.float32))
    taps = jax.jit(lambda p: layer.apply({"params": p}, 1024, method="kernel"))(params)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    for c, (kept, write, read) in enumerate(channel_systems(wide)):
        h, found = write, []
        for _ in range(1024):
            found.append((read @ h).real)
            h = kept @ h
        found = np.array(found)
        want = np.convolve(found, x[0, :, c])[:1024] + wide["D"][c] * x[0, :, c]
        assert np.isfinite(np.asarray(y)).all() and np.isfinite(np.asarray(taps)).all()
        assert np.linalg.norm(y[0, :, c] - want) < 2e-5 * np.linalg.norm(want)
        assert np.linalg.norm(taps[c] - found) < 2e-5 * np.linalg.norm(found)


def test_start_is_legs():
    """The dense matrix of the start values has HiPPO-LegS' eigenvalues, -1 to -N."""
    layer = S4(1, state_dim=8)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), init(layer))
    kept, _, _ = next(channel_systems(params))
    dt = np.exp(params["dt_log"][0, 0])
    half = np.linalg.eigvals(kept)
    values = 2 / dt * (half - 1) / (half + 1)
    np.testing.assert_allclose(np.sort(values.real), -np.arange(8, 0, -1.0), rtol=2e-2)


def test_without_low_rank_it_is_s4d():
    layer, other = S4(FEATURES, state_dim=4), S4D(FEATURES, state_dim=4, discretization="bilinear")
    params, x = random_params(layer), inputs()
    params["P"] = np.zeros_like(params["P"])
    shared = {name: params[name] for name in random_params(other) if name != "C"}
    both = halves(params["B"]) * halves(params["C"])
    shared["C"] = np.concatenate([both.real, both.imag], axis=-1)
    y, _, _ = run64(layer, params, x)
    np.testing.assert_allclose(y, run64(other, shared, x)[0], rtol=0, atol=1e-12)


def test_defaults():
    assert S4(32).init_state(3).memory.shape == (3, 32, 64)
    assert count(S4(32), 32) == 32 * (1 + 64 + 3 * 64 + 1) + 2 * (32 * 32 + 32)
    assert count(LSSL(32), 32) == 32 * (1 + 64 + 1) + 2 * (32 * 32 + 32)
    assert H3(32, heads=8).init_state(3).memory.shape == (3, 8 * 16, 64)
    assert count(H3(32), 32) == 4 * 32 * 32 + 4 * 32 + 32 * (1 + 64 + 64 + 1)


@pytest.mark.parametrize("layer", [S4(32), H3(32)])
def test_dtypes(layer):
    assert check_dtypes(layer).memory.dtype == jnp.float32


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (S4(16, state_dim=3), "state_dim: .* got 3"),
        (LSSL(16, alpha=0.2), "alpha: .* got 0.2"),
        (H3(16, heads=3), "heads: expected a divisor of 16, got 3"),
        (S4(16, dt_min=1.0), "dt_min: .* got 1.0 and 0.1"),
    ],
)
def test_bad_options(layer, message):
    with pytest.raises(ValueError, match=message):
        count(layer)

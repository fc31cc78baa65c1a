"""Mamba-2 against its equations, step by step."""

import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import LinearAttention, Mamba2
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
    silu,
    softplus,
)


def mamba2(layer, params, x):
    """h = exp(dt A) h + B (dt u)^T, y = h^T C + D u, out = norm(y * silu(z)); A = -exp(A_log)."""
    parts = [x @ params[name]["kernel"] for name in ("value", "key", "query")]
    inner, size = parts[0].shape[1], parts[1].shape[1] // layer.groups
    mixed = np.concatenate(parts, axis=1)
    if layer.conv_width:
        taps = params["conv"]["kernel"].copy()
        taps[-1] += layer.mimetic
        mixed = short_conv(mixed, taps, params["conv"]["bias"])
    else:
        mixed = silu(mixed)
    heads = len(params["D"])
    u = mixed[:, :inner].reshape(len(x), heads, -1)
    b = mixed[:, inner : inner + layer.groups * size].reshape(len(x), layer.groups, size)
    c = mixed[:, inner + layer.groups * size :].reshape(len(x), layer.groups, size)
    dt = softplus(x @ params["step_size"]["kernel"] + params["decay_gate"]["dt_bias"])
    dt = np.minimum(np.maximum(dt, layer.dt_limit[0]), layer.dt_limit[1])
    decay = np.exp(-np.exp(params["decay_gate"]["A_log"]) * dt)
    memory = np.zeros((heads, size, u.shape[-1]))
    y = []
    for t in range(len(x)):
        read = []
        for h in range(heads):
            g = h * layer.groups // heads
            memory[h] = decay[t, h] * memory[h] + np.outer(b[t, g], dt[t, h] * u[t, h])
            read.append(memory[h].T @ c[t, g] + params["D"][h] * u[t, h])
        gated = np.concatenate(read) * silu(x[t] @ params["gate"]["kernel"])
        y.append(rms_norm(gated, params["norm"]["scale"]) @ params["output"]["kernel"])
    return np.array(y), memory, {"mean_decay": decay}


CASES = {
    "default": {},
    "mimetic": {"mimetic": True, "state_dim": 8, "expand": 1},
    "groups": {"groups": 2, "heads": 4, "state_dim": 5, "conv_width": 2},
    "no conv, dt limit": {"heads": 2, "state_dim": 8, "conv_width": 0, "dt_limit": (0.5, 1.0)},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_mamba2(options):
    check_transcription(Mamba2(FEATURES, **options), mamba2)


def test_mimetic_start():
    """Next to no decay, steps of 1, and C's projection correlated with B's."""
    params = init(Mamba2(64, mimetic=True))
    gate = params["decay_gate"]
    step = softplus(np.asarray(gate["dt_bias"], np.float64))
    np.testing.assert_allclose(step, 1, rtol=1e-5)
    np.testing.assert_allclose(np.exp(-step * np.exp(gate["A_log"])), 0.999, rtol=1e-4)
    b, c = (np.asarray(params[name]["kernel"]).ravel() for name in ("key", "query"))
    np.testing.assert_allclose(np.corrcoef(b, c)[0, 1], 0.5**0.5, atol=0.05)


def test_mamba2_packed():
    check_transcription(Mamba2(FEATURES, heads=4, groups=2, state_dim=8), mamba2, IDS)


def test_without_decay_it_is_linear_attention():
    """A = 0, D = 0 and dt = 1: the sum of B u^T, which linear attention without a map holds."""
    size = FEATURES
    layer = Mamba2(FEATURES, heads=1, expand=1, state_dim=size, conv_width=3, dt_limit=(1.0, 1.0))
    params, x = random_params(layer), inputs()
    params["decay_gate"]["A_log"] = np.full(1, -60.0)
    params["D"], params["conv"]["bias"] = np.zeros(1), np.zeros(3 * size)
    y, state, _ = run64(layer, params, x)
    linear = LinearAttention(
        FEATURES, heads=1, feature_map="identity", normalize=False, conv_width=3
    )
    taps = np.roll(params["conv"]["kernel"], size, axis=1)  # u, B, C there; C, B, u here
    taps = np.concatenate([taps[:, :size], taps[:, 2 * size :], taps[:, size : 2 * size]], axis=1)
    shared = {name: params[name] for name in ("query", "key", "value")}
    shared |= {"conv": {"kernel": taps}, "output": {"kernel": np.eye(FEATURES)}}
    read, want, _ = run64(linear, shared, x)
    np.testing.assert_allclose(state.memory, want.memory, rtol=0, atol=1e-12)
    gated = read * np.sqrt(size) * silu(x @ params["gate"]["kernel"])
    gated /= np.sqrt(np.mean(gated**2, axis=-1, keepdims=True) + 1e-5)
    want = gated * params["norm"]["scale"] @ params["output"]["kernel"]
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-9)


def test_starts():
    """exp(A_log) uniform in [1, 16], dt log-uniform in [0.001, 0.1], D one."""
    layer = Mamba2(64, heads=128, state_dim=1)
    params = init(layer)
    rate = np.exp(params["decay_gate"]["A_log"])
    step = softplus(np.asarray(params["decay_gate"]["dt_bias"], np.float64))
    assert 0.999 < rate.min() < 1.5 and 15 < rate.max() < 16.001 and 7 < rate.mean() < 10
    assert 0.0009 < step.min() < 0.002 and 0.05 < step.max() < 0.101
    np.testing.assert_allclose(np.median(np.log(step)), np.log(0.01), atol=0.6)
    np.testing.assert_array_equal(params["D"], 1)
    np.testing.assert_array_equal(params["norm"]["scale"], 1)
    bias = np.asarray(params["conv"]["bias"])
    assert 0.48 < np.abs(bias).max() <= 0.5


@pytest.mark.parametrize(("features", "heads"), [(32, 1), (64, 2), (512, 16), (48, 4), (16, 4)])
def test_default_heads(features, heads):
    """A head per 64 inner channels, or 4 where they are not a multiple of 64."""
    assert Mamba2(features).init_state(3).memory.shape == (3, heads, 128, 2 * features // heads)


def test_defaults():
    layer = Mamba2(32)
    assert layer.init_state(3).conv.shape == (3, 3, 64 + 2 * 128)
    assert layer.state_bytes(1) == (128 * 64 + 3 * 320 + 1) * 4
    projections = 32 * (64 + 64 + 128 + 128 + 1)
    assert count(layer, 32) == projections + 5 * 320 + 3 + 64 + 64 * 32


def test_dtypes():
    layer = Mamba2(32, heads=4, groups=2, state_dim=8)
    assert check_dtypes(layer).memory.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, r"heads: expand \* features = 32 must be a multiple of it, got 5"),
        ({"heads": 0}, "heads: .* got 0"),
        ({"groups": 3}, "groups: heads 4 .* got groups 3"),
        ({"groups": 0}, "groups: .* got 0"),
        ({"state_dim": 0}, "state_dim: .* got 0"),
        ({"expand": 0}, "expand: .* got 0"),
        ({"conv_width": -1}, "conv_width: .* got -1"),
        ({"dt_limit": (1.0, 0.5)}, r"dt_limit: .* got \(1\.0, 0\.5\)"),
        ({"dt_limit": (-1.0, 0.5)}, r"dt_limit: .* got \(-1\.0, 0\.5\)"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        count(Mamba2(FEATURES, **options))

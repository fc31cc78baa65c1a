"""Gated linear recurrences against their equations, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import HGRN, RGLRU, ComplexHGRN, Hawk, MinGRU, MinLSTM
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    gelu,
    init,
    inputs,
    random_params,
    rms_norm,
    run64,
    short_conv,
    sigmoid,
    silu,
    softplus,
)


def projected(layer, params, x):
    """The input's projection, then the convolution where there is one; nothing activated."""
    mixed = x @ params["input"]["kernel"] if "input" in params else x
    if "conv" not in params:
        return mixed
    bias = params["conv"].get("bias", 0.0)
    return short_conv(mixed, params["conv"]["kernel"], bias, activation=None)


def positive(v):
    return np.where(v >= 0, v + 0.5, sigmoid(v))


def recur(decay, write):
    h, states = np.zeros(decay.shape[1]), []
    for a, w in zip(decay, write, strict=True):
        h = a * h + w
        states.append(h)
    return np.array(states)


def min_gru(layer, params, x):
    gate, value = np.split(projected(layer, params, x), 2, axis=1)
    z = sigmoid(gate)
    states = recur(1 - z, z * (positive(value) if layer.positive else value))
    return states @ params["output"]["kernel"], states[-1], {"mean_decay": 1 - z}


def min_lstm(layer, params, x):
    forget, gate, value = np.split(projected(layer, params, x), 3, axis=1)
    forget, gate = sigmoid(forget), sigmoid(gate)
    decay = forget / (forget + gate)
    value = positive(value) if layer.positive else value
    states = recur(decay, gate / (forget + gate) * value)
    return states @ params["output"]["kernel"], states[-1], {"mean_decay": decay}


def hgrn(layer, params, x):
    gate, value = np.split(projected(layer, params, x), 2, axis=1)
    bound = sigmoid(params["bound_bias"]) if layer.layer_index else 0.0
    decay = bound + (1 - bound) * sigmoid(gate)
    states = recur(decay, (1 - decay) * silu(value))
    out = np.array([rms_norm(h, params["norm"]["scale"]) for h in states])
    y = out * silu(x @ params["gate"]["kernel"]) @ params["output"]["kernel"]
    return y, states[-1], {"mean_decay": decay}


def complex_hgrn(layer, params, x):
    gate, real, imag = np.split(projected(layer, params, x), 3, axis=1)
    bound = sigmoid(params["bound_bias"]) if layer.layer_index else 0.0
    decay = bound + (1 - bound) * sigmoid(gate)
    h, y = np.zeros(decay.shape[1], complex), []
    for t, a in enumerate(decay):
        h = a * np.exp(1j * params["phase"]) * h + (1 - a) * (silu(real[t]) + 1j * silu(imag[t]))
        read = rms_norm(np.concatenate([h.real, h.imag]), params["norm"]["scale"])
        y.append(read * silu(x[t] @ params["gate"]["kernel"]) @ params["output"]["kernel"])
    return np.array(y), np.stack([h.real, h.imag], axis=-1), {"mean_decay": decay}


def block_dense(params, x):
    kernel = params["kernel"]
    parts = np.split(x, len(kernel), axis=1)
    return np.concatenate([p @ k for p, k in zip(parts, kernel, strict=True)], 1) + params["bias"]


def rglru(layer, params, x):
    u = projected(layer, params, x)
    r, i = (sigmoid(block_dense(params[name], u)) for name in ("decay_gate", "input_gate"))
    decay = np.exp(-8 * r * softplus(params["decay_bias"]))
    states = recur(decay, np.sqrt(1 - decay**2) * i * u)
    y = states
    if "output" in params:
        y = gelu(x @ params["gate"]["kernel"]) * states @ params["output"]["kernel"]
    return y, states[-1], {"mean_decay": decay}


LAYERS = {
    "minGRU": (MinGRU(FEATURES, inner_dim=24), min_gru),
    "minGRU, any sign, conv": (MinGRU(FEATURES, positive=False, conv_width=3), min_gru),
    "minLSTM": (MinLSTM(FEATURES, conv_width=4), min_lstm),
    "HGRN, first": (HGRN(FEATURES), hgrn),
    "HGRN, later": (HGRN(FEATURES, layer_index=2, num_layers=3, conv_width=2), hgrn),
    "complex HGRN": (ComplexHGRN(FEATURES, layer_index=1, num_layers=2), complex_hgrn),
    "RG-LRU": (RGLRU(FEATURES), rglru),
    "Hawk": (Hawk(FEATURES, heads=2, inner_dim=24), rglru),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_transcription(name, ids):
    check_transcription(*LAYERS[name], ids)


def test_min_lstm_with_mirrored_gates_is_min_gru():
    """f = 1 - i leaves f + i = 1."""
    layer, other = MinLSTM(FEATURES), MinGRU(FEATURES)
    params, x = random_params(other), inputs()
    gate, value = np.split(params["input"]["kernel"], 2, axis=1)
    own = params | {"input": {"kernel": np.concatenate([-gate, gate, value], axis=1)}}
    y, _, _ = run64(layer, own, x)
    np.testing.assert_allclose(y, run64(other, params, x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("gate", "tolerance"), [(-5.0, 1e-4), (0.0, 2e-3)])
def test_scan_of_numbers_equals_scan_of_logarithms(gate, tolerance):
    """The paper's log-space minGRU, T = 4096 in float32, against ours.

    Its sums of logarithms grow with time: to -27 where a step keeps 0.993, and it is as exact as
    the property asks. Where a step keeps half they come to -2,800, whose rounding alone is 2e-4;
    ours, which has no such sum, stays with float64.
    """
    layer = MinGRU(FEATURES, implementation="chunked")
    params = random_params(layer)
    params["input"]["kernel"][:, :FEATURES] *= 0.1
    params["input"]["kernel"][0, :FEATURES] = gate
    params["output"]["kernel"] = np.eye(FEATURES)
    x = np.random.default_rng(0).normal(size=(1, 4096, FEATURES))
    x[..., 0] = 1
    want, _, _ = run64(layer, params, x)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    x = jnp.asarray(x, jnp.float32)
    k, v = jnp.split(x @ params["input"]["kernel"], 2, axis=-1)
    kept = jnp.cumsum(-jax.nn.softplus(k), axis=1)
    log_write = -jax.nn.softplus(-k) + jnp.where(v >= 0, jnp.log(v + 0.5), -jax.nn.softplus(-v))
    log_sum = jax.lax.cumlogsumexp(log_write - kept, axis=1)
    y, _ = jax.jit(layer.apply)({"params": params}, x)
    np.testing.assert_allclose(y, want, rtol=1e-5)
    np.testing.assert_allclose(jnp.exp(kept + log_sum), y, rtol=tolerance)


def test_rglru_starts_in_the_papers_range_and_keeps_variance():
    layer = RGLRU(64, implementation="chunked")
    params = init(layer)
    a = np.exp(-8 * softplus(np.asarray(params["decay_bias"], np.float64)))
    assert 0.9 <= a.min() < 0.92 and 0.98 < a.max() <= 0.9991
    # both gates wide open: stationary variance one for white noise
    params["decay_gate"]["bias"] = params["input_gate"]["bias"] = np.full(64, 30.0)
    x = np.random.default_rng(0).normal(size=(4, 4096, 64))
    y, _, _ = run64(layer, params, x)
    np.testing.assert_allclose(np.mean(y[:, 2048:] ** 2), 1.0, atol=0.05)


def test_gates_at_their_limits_stay_finite():
    """Pre-activations of +-100: values and gradients, with a decay that rounds to 1."""
    for layer in (MinGRU(16), MinLSTM(16), HGRN(16, layer_index=1, num_layers=2), RGLRU(16)):
        params = jax.tree.map(lambda a: jnp.asarray(50 * a, jnp.float32), random_params(layer))

        def loss(params, x, layer=layer):
            return jnp.sum(layer.apply({"params": params}, x)[0] ** 2)

        x = jnp.asarray(inputs(), jnp.float32)
        found = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(found))


@pytest.mark.parametrize("layer", [MinGRU(32), HGRN(32), Hawk(32)])
def test_dtypes(layer):
    assert check_dtypes(layer).memory.dtype == jnp.float32


def test_defaults():
    assert count(MinGRU(32), 32) == 3 * 32 * 32 and count(MinLSTM(32), 32) == 4 * 32 * 32
    assert count(HGRN(32), 32) == 4 * 32 * 32 + 32
    assert count(ComplexHGRN(32), 32) == 7 * 32 * 32 + 3 * 32
    assert ComplexHGRN(32).init_state(3).memory.shape == (3, 32, 2)
    assert count(RGLRU(32), 32) == 2 * (32 * 8 + 32) + 32
    assert count(Hawk(32), 32) == 3 * 32 * 32 + 5 * 32 + 2 * (32 * 8 + 32) + 32
    assert MinGRU(32).init_state(3).conv.shape == (3, 0, 64)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (MinGRU(16, inner_dim=0), "inner_dim: .* got 0"),
        (MinGRU(16, conv_width=-1), "conv_width: .* got -1"),
        (HGRN(16, layer_index=2, num_layers=2), "layer_index: .* got 2"),
        (RGLRU(16, heads=3), "heads: expected a divisor of 16 channels, got 3"),
        (RGLRU(16, inner_dim=8), "inner_dim: expected features 16 or None, got 8"),
    ],
)
def test_bad_options(layer, message):
    with pytest.raises(ValueError, match=message):
        count(layer)

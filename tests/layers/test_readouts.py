"""Layers whose read-out solves, weighs levels or sees a prefix, step by step."""

import jax
import numpy as np
import pytest

from memseq.layers import MesaNet
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    init,
    inputs,
    random_params,
    read_out,
    run64,
    short_conv,
    sigmoid,
    silu,
    softplus,
    unit,
)


def mesa_net(layer, params, x):
    """out = S^T (G + ridge)^-1 q, both sums decayed; silu and convolution for query and key."""
    heads = layer.heads
    query, key, value = (x @ params[name]["kernel"] for name in ("query", "key", "value"))
    pair = np.concatenate([query, key], axis=1)
    pair = short_conv(pair, params["conv"]["kernel"]) if "conv" in params else silu(pair)
    query, key = (part.reshape(len(x), heads, -1) for part in np.split(pair, 2, axis=1))
    value = value.reshape(len(x), heads, -1)
    decay = sigmoid(x @ params["decay"]["kernel"] + params["decay"]["bias"])
    decay **= 1 / layer.gate_normalizer
    beta = sigmoid(x @ params["beta"]["kernel"] + params["beta"]["bias"])
    ridge = layer.min_ridge + softplus(params["ridge_bias"])
    gram = np.zeros((heads, key.shape[-1], key.shape[-1]))
    memory, out = np.zeros((heads, key.shape[-1], value.shape[-1])), np.zeros(value.shape)
    for t in range(len(x)):
        for h in range(heads):
            q, k = unit(query[t, h]), unit(key[t, h])
            gram[h] = decay[t, h] * gram[h] + beta[t, h] * np.outer(k, k)
            memory[h] = decay[t, h] * memory[h] + beta[t, h] * np.outer(k, value[t, h])
            out[t, h] = memory[h].T @ np.linalg.inv(gram[h] + np.diag(ridge[h])) @ q
    return read_out(params, x, out), memory, {"mean_decay": decay, "mean_beta": beta}


LAYERS = {
    "mesa": (MesaNet(FEATURES), mesa_net),
    "mesa, no conv, gate": (
        MesaNet(
            FEATURES, heads=2, conv_width=0, output_gate=True, min_ridge=0.01, key_dim=5,
            value_dim=3, gate_normalizer=4.0,
        ),
        mesa_net,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_transcription(name, ids):
    check_transcription(*LAYERS[name], ids)


def test_mesa_with_a_huge_ridge_is_gated_linear_attention():
    """Over the ridge; what the operations do in this limit is equal in test_ridge_readout."""
    layer = MesaNet(FEATURES, heads=2, conv_width=0, output_norm=False)
    params, x = random_params(layer), inputs()
    params["ridge_bias"] = np.full((2, 8), 1e9)
    y, _, _ = run64(layer, params, x)
    for u, got in zip(x, y, strict=True):
        query, key, value = (
            (u @ params[name]["kernel"]).reshape(-1, 2, 8) for name in ("query", "key", "value")
        )
        decay, beta = (
            sigmoid(u @ params[name]["kernel"] + params[name]["bias"]) for name in ("decay", "beta")
        )
        memory, out = np.zeros((2, 8, 8)), np.zeros(value.shape)
        for t in range(len(u)):
            for h in range(2):
                written = np.outer(unit(silu(key[t, h])), beta[t, h] * value[t, h])
                memory[h] = decay[t, h] * memory[h] + written
                out[t, h] = memory[h].T @ unit(silu(query[t, h]))
        want = out.reshape(-1, FEATURES) @ params["output"]["kernel"]
        np.testing.assert_allclose(got * (1e9 + 0.25), want, rtol=0, atol=1e-6)


def test_mesa_recalls_what_a_sum_of_close_keys_mixes_up():
    """Nothing decays, a small ridge: each of eight keys close together reads its own value."""
    layer = MesaNet(FEATURES, heads=1, conv_width=0, output_norm=False, min_ridge=1e-5)
    params = random_params(layer)
    eye = np.eye(FEATURES)
    for name in ("query", "key", "value", "output"):
        params[name] = {"kernel": eye}
    params["decay"] = {"kernel": np.zeros((FEATURES, 1)), "bias": np.full(1, 50.0)}
    params["beta"] = {"kernel": np.zeros((FEATURES, 1)), "bias": np.full(1, 50.0)}
    params["ridge_bias"] = np.full((1, FEATURES), -50.0)
    x = np.random.default_rng(0).normal(size=(1, 8, FEATURES)) * 0.3 + 2
    _, state, _ = run64(layer, params, x)
    gram, memory = np.asarray(state.gram[0, 0]), np.asarray(state.memory[0, 0])
    solved = np.linalg.solve(gram + 1e-5 * eye, memory)
    keys = np.apply_along_axis(unit, -1, silu(x[0]))
    np.testing.assert_allclose(keys @ solved, x[0], atol=0.02)
    assert np.abs(keys @ memory - x[0]).min(axis=1).max() > 1
    y, _, _ = run64(layer, params, x)
    np.testing.assert_allclose(y[0, -1], x[0, -1], atol=0.02)


def test_mesa_starts():
    """The ridge starts at 1, the decay at one half."""
    layer = MesaNet(32)
    params = init(layer)
    np.testing.assert_allclose(0.25 + softplus(np.float64(params["ridge_bias"])), 1, rtol=1e-6)
    np.testing.assert_array_equal(params["decay"]["bias"], 0)
    assert layer.init_state(3).gram.shape == layer.init_state(3).memory.shape == (3, 4, 8, 8)
    assert layer.init_state(3).conv.shape == (3, 3, 2 * 32)
    assert count(layer, 32) == 4 * 32 * 32 + 2 * (32 * 4 + 4) + 32 + 4 * 64 + 8


@pytest.mark.parametrize("layer", [MesaNet(32)])
def test_dtypes(layer):
    state = check_dtypes(layer)
    assert state.memory.dtype == np.float32
    if isinstance(layer, MesaNet):
        assert state.gram.dtype == np.float32


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (MesaNet(16, min_ridge=0.0), r"min_ridge: expected a number in \(0, 1\), got 0.0"),
        (MesaNet(16, iterations=0), "iterations: .* got 0"),
        (MesaNet(16, gate_normalizer=0.0), "gate_normalizer: .* got 0.0"),
        (MesaNet(16, heads=3), "heads: .* got heads 3"),
    ],
)
def test_bad_options(layer, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), inputs())

"""Linear attention and gated linear attention against their equations, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import GatedLinearAttention, LinearAttention
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    init,
    inputs,
    query_key_value,
    random_params,
    read_out,
    run64,
    sigmoid,
)

MAPS = {
    "elu+1": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + 1,
    "relu": lambda x: np.maximum(x, 0),
    "identity": lambda x: x,
}


def linear_attention(layer, params, x):
    """S += phi(k) v^T, z += phi(k), out = S^T phi(q) / (z . phi(q)); or S^T phi(q) / sqrt(K)."""
    heads, phi = layer.heads, MAPS[layer.feature_map]
    query, key, value = query_key_value(params, x, heads, heads)
    keys, values = key.shape[-1], value.shape[-1]
    memory, total = np.zeros((heads, keys, values)), np.zeros((heads, keys))
    out = np.zeros(value.shape)
    for t in range(len(x)):
        for h in range(heads):
            q, k = phi(query[t, h]), phi(key[t, h])
            memory[h] += np.outer(k, value[t, h])
            total[h] += k
            read, norm = memory[h].T @ q, total[h] @ q
            if not layer.normalize:
                out[t, h] = read / np.sqrt(keys)
            elif norm > 0:  # nothing written under any channel of q reads as 0
                out[t, h] = read / norm
    if layer.normalize:
        memory = np.concatenate([memory, total[..., None]], axis=-1)
    return read_out(params, x, out), memory, {}


def gated_linear_attention(layer, params, x):
    """S = Diag(a) S + k v^T, out = S^T q / sqrt(K), log a = log sigmoid(W2 W1 x + b) / 16."""
    heads = layer.heads
    query, key, value = query_key_value(params, x, heads, heads)
    keys, values = key.shape[-1], value.shape[-1]
    gate = x @ params["decay_in"]["kernel"] @ params["decay_out"]["kernel"]
    gate = sigmoid(gate + params["decay_out"]["bias"]).reshape(len(x), heads, keys)
    decay = gate ** (1 / layer.gate_normalizer)
    memory = np.zeros((heads, keys, values))
    out = np.zeros(value.shape)
    for t in range(len(x)):
        for h in range(heads):
            memory[h] = np.diag(decay[t, h]) @ memory[h] + np.outer(key[t, h], value[t, h])
            out[t, h] = memory[h].T @ query[t, h] / np.sqrt(keys)
    return read_out(params, x, out), memory, {"mean_decay": decay}


LINEAR = {
    "default": {},
    "relu, conv": {"feature_map": "relu", "conv_width": 4, "heads": 2},
    "relu, norm, gate": {
        "feature_map": "relu",
        "normalize": False,
        "output_norm": True,
        "output_gate": True,
        "key_dim": 3,
        "value_dim": 5,
    },
    "identity": {"feature_map": "identity", "normalize": False, "conv_width": 2, "heads": 1},
}


@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR)
def test_linear_attention(options):
    check_transcription(LinearAttention(FEATURES, **options), linear_attention)


def test_linear_attention_packed():
    layer = LinearAttention(FEATURES, heads=2, conv_width=4)
    check_transcription(layer, linear_attention, IDS)


GATED = {
    "default": {},
    "conv": {"conv_width": 4, "gate_rank": 3, "gate_normalizer": 2.0, "heads": 2},
    "plain": {"output_gate": False, "output_norm": False, "key_dim": 5, "value_dim": 3},
}


@pytest.mark.parametrize("options", GATED.values(), ids=GATED)
def test_gated_linear_attention(options):
    check_transcription(GatedLinearAttention(FEATURES, **options), gated_linear_attention)


def test_gated_linear_attention_packed():
    layer = GatedLinearAttention(FEATURES, heads=2, conv_width=4)
    check_transcription(layer, gated_linear_attention, IDS)


def test_normalised_reads_are_averages():
    """Every read is a weighted mean of the values so far; equal keys make it the plain mean."""
    layer = LinearAttention(FEATURES, heads=2)
    params = random_params(layer)
    params["output"]["kernel"] = np.eye(FEATURES)
    x = inputs()
    value = x @ params["value"]["kernel"]
    y, _, _ = run64(layer, params, x)
    np.testing.assert_allclose(y[:, 0], value[:, 0], rtol=0, atol=1e-12)
    highest, lowest = (f.accumulate(value, axis=1) for f in (np.maximum, np.minimum))
    assert (y <= highest + 1e-12).all() and (y >= lowest - 1e-12).all()
    params["key"]["kernel"] = np.zeros_like(params["key"]["kernel"])
    params["query"]["kernel"] = np.full_like(params["query"]["kernel"], -0.3)
    x = np.abs(x)  # queries of small positive features: the normaliser is small
    value = x @ params["value"]["kernel"]
    y, _, _ = run64(layer, params, x)
    mean = value.cumsum(axis=1) / np.arange(1, x.shape[1] + 1)[:, None]
    np.testing.assert_allclose(y, mean, rtol=0, atol=1e-12)


def test_constant_gates_are_retention():
    """With one decay everywhere the read is sum_j a^(t-j) (q_t . k_j) v_j / sqrt(K)."""
    layer = GatedLinearAttention(FEATURES, heads=2, output_norm=False, output_gate=False)
    params = random_params(layer)
    params["decay_in"]["kernel"] = np.zeros_like(params["decay_in"]["kernel"])
    params["decay_out"]["bias"] = np.full_like(params["decay_out"]["bias"], -3.0)
    x = inputs()
    y, _, _ = run64(layer, params, x)
    step = np.arange(x.shape[1])
    distance = step[:, None] - step
    decay = np.where(distance >= 0, (1 / (1 + np.exp(3.0))) ** (distance / 16.0), 0)
    for row, u in enumerate(x):
        query, key, value = query_key_value(params, u, 2, 2)
        scores = np.einsum("thd,shd->hts", query, key) * decay / np.sqrt(query.shape[-1])
        out = np.einsum("hts,shd->thd", scores, value)
        np.testing.assert_allclose(y[row], read_out(params, u, out), rtol=0, atol=1e-9)


def test_starts():
    """At zero input the gate's log decay is log(1/2) / 16, about -0.043; no parameter is odd."""
    layer = GatedLinearAttention(32)
    params = init(layer)
    np.testing.assert_array_equal(params["decay_out"]["bias"], 0)
    _, log_decay = layer.apply({"params": params}, jnp.zeros((1, 1, 32)), method="project")
    np.testing.assert_allclose(log_decay, np.log(0.5) / 16, rtol=1e-6)
    assert log_decay.shape == (1, 1, 4, 4)
    np.testing.assert_array_equal(params["norm"]["scale"], 1)
    np.testing.assert_allclose(np.std(params["value"]["kernel"]), 32**-0.5, rtol=0.1)


def test_defaults():
    """Sizes of memories and parameters: key sizes 1 and 1/2 of features / heads."""
    linear, gated = LinearAttention(32), GatedLinearAttention(32)
    assert linear.init_state(3).memory.shape == (3, 4, 8, 9)
    assert gated.init_state(3).memory.shape == (3, 4, 4, 8)
    assert linear.init_state(3).conv.shape == (3, 0, 96)
    assert gated.clone(conv_width=4).init_state(3).conv.shape == (3, 3, 64)
    np.testing.assert_array_equal(linear.init_state(3).segment, [-1] * 3)
    assert linear.state_bytes(3) == 3 * (4 * 8 * 9 + 1) * 4
    assert count(linear, 32) == 4 * 32 * 32
    low_rank = 32 * 16 + 16 * 16 + 16
    assert count(gated, 32) == (16 + 16 + 3 * 32) * 32 + low_rank + 8
    assert count(gated.clone(conv_width=4), 32) == count(gated, 32) + 4 * 64


@pytest.mark.parametrize("layer", [LinearAttention(32), GatedLinearAttention(32, conv_width=4)])
def test_dtypes(layer):
    assert check_dtypes(layer).memory.dtype == jnp.float32


def test_normaliser_is_divided_before_rounding():
    """In bfloat16 the read of equal values is that value, however many were written."""
    layer = LinearAttention(FEATURES, heads=2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), random_params(layer))
    params["output"]["kernel"] = jnp.eye(FEATURES, dtype=jnp.bfloat16)
    x = jnp.broadcast_to(jnp.asarray(inputs(time=1), jnp.bfloat16), (2, 300, FEATURES))
    y, _ = jax.jit(layer.apply)({"params": params}, x)
    value = x @ params["value"]["kernel"]
    np.testing.assert_allclose(
        np.asarray(y, np.float32), np.asarray(value, np.float32), rtol=2**-8, atol=2**-9
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_map": "elu1"}, r"feature_map: .*'elu1'; did you mean 'elu\+1'"),
        ({"feature_map": "identity"}, "normalize: expected False .* got True"),
        ({"heads": 5}, "heads: features 16 must be a multiple"),
        ({"heads": 0}, "heads: .* got 0"),
        ({"key_dim": 0}, "key_dim: .* got 0"),
        ({"value_dim": -2}, "value_dim: .* got -2"),
        ({"conv_width": -1}, "conv_width: .* got -1"),
        ({"chunk_size": 0}, "chunk_size: .* got 0"),
        ({"implementation": "triton"}, "implementation: .* got 'triton'"),
        ({"implementation": "mosaic_tpu"}, "implementation: linear_attention has no form"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        count(LinearAttention(FEATURES, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads: features 16 must be a multiple"),
        ({"heads": 0, "key_dim": 4, "value_dim": 4}, "heads: .* got 0"),
        ({"key_dim": 0}, "key_dim: .* got 0"),
        ({"gate_rank": 0}, "gate_rank: .* got 0"),
        ({"gate_normalizer": -16.0}, r"gate_normalizer: .* got -16\.0"),
        ({"gate_normalizer": 0}, "gate_normalizer: .* got 0"),
    ],
)
def test_bad_options_of_gated(options, message):
    with pytest.raises(ValueError, match=message):
        count(GatedLinearAttention(FEATURES, **options))


def test_state_of_another_layer():
    layer, x = LinearAttention(FEATURES), inputs().astype(np.float32)
    params = {"params": random_params(layer)}
    other = GatedLinearAttention(FEATURES).init_state(2)
    with pytest.raises(ValueError, match="state: expected LinearAttentionState, got Gated"):
        layer.apply(params, x, other)
    with pytest.raises(ValueError, match=r"state\.memory: expected shape \[2, 4, 4, 5\]"):
        layer.apply(params, x, layer.clone(key_dim=3).init_state(2))

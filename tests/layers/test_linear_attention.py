"""Linear attention and gated linear attention against their equations, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import Based, GatedLinearAttention, LinearAttention
from memseq.layers.linear_attention import feature_maps
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


def dpfp(x):
    """Every pair of parts at distance 1 to 4, parts being relu(x), relu(-x)."""
    r = np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)])
    return np.array([r[i] * r[i - j] for j in range(1, 5) for i in range(len(r))])


def taylor(x):
    d = len(x)
    return np.concatenate([[1.0], x / d**0.25, np.outer(x, x).ravel() / np.sqrt(2 * d)])


def rebased(x, params):
    norm = params["LayerNorm_0"]
    x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * norm["scale"] + norm["bias"]
    return np.outer(x, x).ravel() / np.sqrt(len(x))


def hedgehog(x, params):
    u = x @ params["map_kernel"]
    weights = np.exp(np.concatenate([2 * u, -2 * u]))
    return weights / weights.sum()


MAPS = {
    "elu+1": lambda x, _: np.where(x > 0, x, np.expm1(np.minimum(x, 0))) + 1,
    "relu": lambda x, _: np.maximum(x, 0),
    "identity": lambda x, _: x,
    "dpfp": lambda x, _: dpfp(x),
    "taylor": lambda x, _: taylor(x),
    "rebased": rebased,
    "hedgehog": hedgehog,
    "t2r": lambda x, params: np.maximum(x @ params["map_kernel"], 0),
    "elementwise_product": lambda x, params: (
        (x @ params["first_kernel"]) * (x @ params["second_kernel"])
    ),
}


def linear_attention(layer, params, x):
    """S += phi(k) v^T, z += phi(k), out = S^T phi(q) / (z . phi(q)); or S^T phi(q) / sqrt(K)."""
    heads, phi = layer.heads, MAPS[layer.feature_map]
    query, key, value = query_key_value(params, x, heads, heads)
    query, key = (
        np.array([[phi(u, params.get(name)) for u in step] for step in side])
        for name, side in (("query_map", query), ("key_map", key))
    )
    keys, values = key.shape[-1], value.shape[-1]
    memory, total = np.zeros((heads, keys, values)), np.zeros((heads, keys))
    out = np.zeros(value.shape)
    for t in range(len(x)):
        for h in range(heads):
            q, k = query[t, h], key[t, h]
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
    "dpfp": {"feature_map": "dpfp", "heads": 2, "key_dim": 5},
    "taylor": {"feature_map": "taylor", "heads": 2, "key_dim": 3, "conv_width": 2},
    "rebased": {"feature_map": "rebased", "heads": 2, "key_dim": 3},
    "hedgehog": {"feature_map": "hedgehog"},
    "t2r": {"feature_map": "t2r", "heads": 2},
    "elementwise product": {"feature_map": "elementwise_product", "normalize": False},
}


@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR)
def test_linear_attention(options):
    check_transcription(LinearAttention(FEATURES, **options), linear_attention)


def test_taylor_features_multiply_to_the_series():
    query, key = np.random.default_rng(0).normal(size=(2, 50, 16))
    with jax.enable_x64(True):
        product = (feature_maps.taylor(query) * feature_maps.taylor(key)).sum(-1)
    s = (query * key).sum(-1) / 4
    np.testing.assert_allclose(product, 1 + s + s**2 / 2, rtol=1e-12)


def test_learned_maps_start_as_the_identity():
    params = init(LinearAttention(32, feature_map="hedgehog"))
    np.testing.assert_array_equal(params["query_map"]["map_kernel"], np.eye(8))


def test_based():
    layer = Based(32)
    assert layer.init_state(3).memory.shape == (3, 4, 1 + 16 + 256, 9)
    _, state = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.zeros((3, 5, 32)))[0]
    assert state.memory.shape == (3, 4, 1 + 16 + 256, 9)


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


def test_mimetic_start():
    """The query's projection is like the key's, so a token finds itself among others."""
    x = inputs(time=64, features=64)
    found = {}
    for mimetic in (False, True):
        params = init(LinearAttention(64, heads=1, mimetic=mimetic))
        query, key = (np.asarray(params[name]["kernel"]) for name in ("query", "key"))
        found[mimetic] = np.corrcoef(query.ravel(), key.ravel())[0, 1]
        scores = np.einsum("bti,bsi->bts", x @ query, x @ key)
        own = np.einsum("btt->bt", scores)
        assert (own.mean() > scores.std()) == mimetic
    np.testing.assert_allclose([found[False], found[True]], [0, 0.5**0.5], atol=0.05)
    assert init(Based(64, mimetic=True))["query"]["kernel"].shape == (64, 64)


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
        ({"implementation": "mosaic_gpu"}, "implementation: linear_attention has no form"),
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

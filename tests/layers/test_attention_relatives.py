"""PaTH and differential attention against their equations; what softmax attention has they have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import DifferentialAttention, PathAttention, SoftmaxAttention
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
    rms_norm,
    run64,
    short_conv,
    sigmoid,
    unit,
)
from tests.layers.test_attention import turn


def log_gates(params, x, heads):
    """[time, heads]: log sigmoid of the forget gates, 0 without them."""
    if "forget" not in params:
        return np.zeros((len(x), heads))
    return -np.log1p(np.exp(-x @ params["forget"]["kernel"] - params["forget"]["bias"]))


def path_attention(layer, params, x):
    """Each query walks back: it meets a token's key, then takes that token's reflection."""
    dim = FEATURES // layer.heads
    names = ("query", "key", "value")
    query, key, value = ((x @ params[name]["kernel"]).reshape(len(x), -1, dim) for name in names)
    inner = x if layer.direction_rank is None else x @ params["direction_in"]["kernel"]
    direction = inner @ params["direction"]["kernel"]
    if layer.conv_width:
        direction = short_conv(direction, params["conv"]["kernel"])
    direction = direction.reshape(key.shape)
    beta = 2 * sigmoid(x @ params["beta"]["kernel"] + params["beta"]["bias"])
    gates, group = log_gates(params, x, layer.heads), layer.heads // key.shape[1]
    out = np.zeros(query.shape)
    for t, h in np.ndindex(len(x), layer.heads):
        u, g = query[t, h], h // group
        weights, values = [], []
        for j in range(t, -1, -1):
            if layer.window is None or t - j < layer.window:
                score = u @ key[j, g] / np.sqrt(dim) + gates[j + 1 : t + 1, h].sum()
                weights.append(np.exp(score))
                values.append(value[j, g])
            w = unit(direction[j, g])
            u = u - beta[j, g] * (w @ u) * w
        total = sum(weights) + (np.exp(params["sink_logits"][h]) if layer.sinks else 0)
        out[t, h] = np.array(weights) @ np.array(values) / total
    return read_out(params, x, out), None, {"mean_beta": beta}


PATHS = {
    "grouped, forget gates": {
        "kv_heads": 2,
        "forget_gate": True,
        "output_gate": True,
        "chunk_size": 8,
    },
    "window, full projection": {
        "heads": 2,
        "window": 6,
        "sinks": True,
        "direction_rank": None,
        "conv_width": 0,
        "chunk_size": 4,
    },
    "defaults": {},
}


def first_of(cases):
    """Their names, all but the first for slow tests."""
    first, *others = cases
    return [first, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


@pytest.mark.parametrize("name", first_of(PATHS))
def test_path_attention(name):
    layer = PathAttention(FEATURES, **PATHS[name])
    check_transcription(layer, path_attention, IDS if name.startswith("grouped") else None)


def test_path_attention_without_reflections_has_no_positions():
    layer = PathAttention(FEATURES, heads=2)
    params, x = random_params(layer), inputs(time=9)
    params["beta"]["bias"] = np.full(2, -1e4)
    y, _, _ = run64(layer, params, x)
    plain = {name: params[name] for name in ("query", "key", "value", "output")}
    want, _, _ = run64(SoftmaxAttention(FEATURES, heads=2, rope=False), plain, x)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-12)


def test_path_attention_keeps_its_keys_in_float32():
    """Each step changes all of them: what bfloat16 loses would add up."""
    state = check_dtypes(PathAttention(FEATURES, kv_heads=2, forget_gate=True))
    assert state.key.dtype == jnp.float32 and state.value.dtype == jnp.bfloat16
    layer = PathAttention(64)
    assert count(layer, 64) == 4 * 64 * 64 + 2 * 32 * 64 + 3 * 64 + 64 * 4 + 4
    state = layer.init_state(2, context=5)
    assert state.conv.shape == (2, 2, 64) and state.key.shape == (2, 5, 4, 16)
    with pytest.raises(ValueError, match="direction_rank: .* got 0"):
        count(layer.clone(direction_rank=0), 64)


def differential_attention(layer, params, x):
    """The difference of two softmaxes, each over keys of its own and the same values."""
    dim = FEATURES // layer.heads // 2
    kv_heads = layer.heads if layer.kv_heads is None else layer.kv_heads
    query = (x @ params["query"]["kernel"]).reshape(len(x), 2, layer.heads, dim)
    key = (x @ params["key"]["kernel"]).reshape(len(x), 2, kv_heads, dim)
    value = (x @ params["value"]["kernel"]).reshape(len(x), kv_heads, 2 * dim)
    a, b = params["query_log"], params["key_log"]
    start = 0.8 - 0.6 * np.exp(-0.3 * layer.layer_index)
    share = np.exp(a[0] @ b[0]) - np.exp(a[1] @ b[1]) + start
    gates = log_gates(params, x, layer.heads)
    out = np.zeros((len(x), layer.heads, 2 * dim))
    for t, h in np.ndindex(len(x), layer.heads):
        g = h * kv_heads // layer.heads
        maps = []
        for part in range(2):
            q = turn(query[t, part, h], t, layer.rope_base)
            keys = np.array([turn(key[j, part, g], j, layer.rope_base) for j in range(t + 1)])
            forgotten = np.array([gates[j + 1 : t + 1, h].sum() for j in range(t + 1)])
            weights = np.exp(keys @ q / np.sqrt(dim) + forgotten)
            sink = np.exp(params["sink_logits"][h]) if layer.sinks else 0
            maps.append(weights / (weights.sum() + sink))
        read = (maps[0] - share * maps[1]) @ value[: t + 1, g]
        out[t, h] = rms_norm(read, params["norm"]["scale"]) * (1 - start)
    y = out.reshape(len(x), -1) @ params["output"]["kernel"]
    return y, None, {"mean_share": np.array([share])}


DIFFERENTIAL = {
    "grouped, sinks, forget gates": {
        "heads": 2,
        "kv_heads": 1,
        "sinks": True,
        "forget_gate": True,
        "layer_index": 3,
        "num_layers": 5,
    },
    "defaults": {},
}


@pytest.mark.parametrize("name", first_of(DIFFERENTIAL))
def test_differential_attention(name):
    layer = DifferentialAttention(FEATURES, **DIFFERENTIAL[name])
    ids = IDS if name.startswith("grouped") else None
    check_transcription(layer, differential_attention, ids)


def test_differential_attention_starts_and_sizes():
    """As many parameters and as large a cache as softmax attention, and four vectors and a norm."""
    layer, plain = DifferentialAttention(32), SoftmaxAttention(32)
    assert count(layer, 32) == count(plain, 32) + 4 * 4 + 8
    assert layer.state_bytes(2, 100) == plain.state_bytes(2, 100)
    starts = [layer.clone(layer_index=i, num_layers=40).start() for i in (0, 1, 39)]
    np.testing.assert_allclose(starts, [0.2, 0.355509, 0.8], rtol=0, atol=1e-5)
    logs = [
        init(layer.clone(features=256), features=256)[name] for name in ("query_log", "key_log")
    ]
    np.testing.assert_allclose(np.std(logs), 0.1, rtol=0.2)
    check_dtypes(layer.clone(features=FEATURES))
    for options, message in (
        ({"heads": 32}, "heads: features 32 must be a multiple of twice as many"),
        ({"layer_index": 1}, "layer_index: expected less than num_layers 1, got 1"),
        ({"kv_heads": 3}, "kv_heads: .* got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(layer.clone(**options).init, jax.random.key(0), jnp.zeros((1, 1, 32)))

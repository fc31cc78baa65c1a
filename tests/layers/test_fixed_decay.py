"""Layers with a decay a head, fixed or gated, against their equations, step by step."""

import jax
import numpy as np
import pytest

from memseq.layers import (
    HGRN2,
    GatedLinearAttention,
    LightningAttention,
    Retention,
    SimpleGatedLinearAttention,
)
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
    silu,
)


def decaying(layer, params, x, decay, query, key, value, activation=silu, sown=None):
    """S = a_th S + k v^T, out = S^T q / sqrt(K), decay [time, heads]."""
    heads, keys, values = layer.heads, key.shape[-1], value.shape[-1]
    memory = np.zeros((heads, keys, values))
    out = np.zeros(value.shape)
    for t in range(len(x)):
        for h in range(heads):
            memory[h] = decay[t, h] * memory[h] + np.outer(key[t, h], value[t, h])
            out[t, h] = memory[h].T @ query[t, h] / np.sqrt(keys)
    return read_out(params, x, out, activation), memory, sown or {}


def simple_gated(layer, params, x):
    """log a = log sigmoid(W x) / gate_normalizer, one a head."""
    qkv = query_key_value(params, x, layer.heads, layer.heads, activation=True)
    decay = sigmoid(x @ params["decay"]["kernel"]) ** (1 / layer.gate_normalizer)
    return decaying(layer, params, x, decay, *qkv, sown={"mean_decay": decay})


def retention(layer, params, x):
    """gamma_h = 1 - 2^(-5-h); pairs (x_i, x_{i+K/2}) of q and k turn by t base^(-2i/K)."""
    query, key, value = query_key_value(params, x, layer.heads, layer.heads)
    half = key.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * layer.rope_base ** (-np.arange(half) / half)
    turn = np.exp(1j * angle)

    def turned(u):
        pairs = (u[..., :half] + 1j * u[..., half:]) * turn
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    gamma = 1 - 2.0 ** (-5 - np.arange(layer.heads))
    decay = np.broadcast_to(gamma, (len(x), layer.heads))
    return decaying(layer, params, x, decay, turned(query), turned(key), value)


def lightning(layer, params, x):
    """log lambda_h = -(8 / H) h (1 - l / L)."""
    qkv = query_key_value(params, x, layer.heads, layer.heads, activation=True)
    share = 1 - layer.layer_index / layer.num_layers
    rate = np.exp(-8 * np.arange(layer.heads) / layer.heads * share)
    decay = np.broadcast_to(rate, (len(x), layer.heads))
    return decaying(layer, params, x, decay, *qkv, activation=sigmoid)


def hgrn2(layer, params, x):
    """a = bound + (1 - bound) sigmoid(W x), S = Diag(a) S + (1 - a) v^T; one norm for all heads."""
    heads = layer.heads
    query, gate, value = query_key_value(params, x, heads, heads)
    bound = sigmoid(params["bound_bias"]) if "bound_bias" in params else 0.0
    decay = bound + (1 - bound) * sigmoid(gate)
    memory = np.zeros((heads, gate.shape[-1], value.shape[-1]))
    out = np.zeros(value.shape)
    for t in range(len(x)):
        for h in range(heads):
            a = decay[t, h]
            memory[h] = a[:, None] * memory[h] + np.outer(1 - a, value[t, h])
            out[t, h] = memory[h].T @ silu(query[t, h]) / np.sqrt(len(a))
    return read_out(params, x, out.reshape(len(x), 1, -1)), memory, {"mean_decay": decay}


LAYERS = {
    "hgrn2": (HGRN2(FEATURES), hgrn2),
    "hgrn2, second of three, gate": (
        HGRN2(FEATURES, heads=2, layer_index=1, num_layers=3, output_gate=True, value_dim=3),
        hgrn2,
    ),
    "simple gated": (SimpleGatedLinearAttention(FEATURES), simple_gated),
    "simple gated, no conv": (
        SimpleGatedLinearAttention(FEATURES, heads=2, conv_width=0, gate_normalizer=2.0, key_dim=3),
        simple_gated,
    ),
    "retention": (Retention(FEATURES), retention),
    "retention, conv, no gate": (
        Retention(FEATURES, heads=2, conv_width=3, output_gate=False, value_dim=5),
        retention,
    ),
    "lightning": (LightningAttention(FEATURES), lightning),
    "lightning, third of four": (
        LightningAttention(FEATURES, heads=2, layer_index=2, num_layers=4, conv_width=2),
        lightning,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_transcription(name, ids):
    check_transcription(*LAYERS[name], ids)


def test_gated_linear_attention_with_constant_gates_is_retention():
    """Both without rotation: at base 1e200 only the first pair turns, and here it is zero."""
    sizes = {"heads": 2, "key_dim": 8, "value_dim": 6}
    gated = GatedLinearAttention(FEATURES, **sizes)
    layer = Retention(FEATURES, rope_base=1e200, **sizes)
    params, x = random_params(gated), inputs()
    for name in ("query", "key"):
        kernel = params[name]["kernel"].reshape(FEATURES, 2, 8)
        kernel[..., [0, 4]] = 0
    params["decay_in"]["kernel"] = np.zeros_like(params["decay_in"]["kernel"])
    gamma = 1 - 2.0 ** (-5 - np.arange(2))
    gate = gamma**gated.gate_normalizer
    params["decay_out"]["bias"] = np.repeat(np.log(gate / (1 - gate)), 8)
    y, state, _ = run64(gated, params, x)
    shared = {name: leaf for name, leaf in params.items() if not name.startswith("decay")}
    assert jax.tree.structure(shared) == jax.tree.structure(random_params(layer))
    want, want_state, _ = run64(layer, shared, x)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-9)
    np.testing.assert_allclose(state.memory, want_state.memory, rtol=0, atol=1e-9)


def test_retention_counts_positions():
    layer = Retention(FEATURES, heads=2)
    params = random_params(layer)
    _, state, _ = run64(layer, params, inputs(), segment_ids=IDS)
    np.testing.assert_array_equal(state.position, [6, 12])
    # the first row goes on in its segment, the second in another; padding counts nothing
    more = np.array([[0, -1, 0], [5, 5, -1]], np.int32)
    _, state, _ = run64(layer, params, inputs(time=3), state, more)
    np.testing.assert_array_equal(state.position, [8, 2])
    _, state, _ = run64(layer, params, inputs(time=3), state, np.full((2, 3), -1, np.int32))
    np.testing.assert_array_equal(state.position, [8, 2])


def test_defaults():
    assert Retention(32).init_state(3).memory.shape == (3, 4, 8, 16)
    assert SimpleGatedLinearAttention(32).init_state(3).conv.shape == (3, 3, 96)
    assert count(Retention(32), 32) == (1 + 1 + 2 + 2 + 2) * 32 * 32 + 16
    assert count(LightningAttention(32), 32) == 5 * 32 * 32 + 8
    assert count(SimpleGatedLinearAttention(32), 32) == 5 * 32 * 32 + 4 * 32 + 8 + 4 * 96
    np.testing.assert_allclose(
        np.exp(Retention(32).log_decay()), [31 / 32, 63 / 64, 127 / 128, 255 / 256]
    )
    bound = init(HGRN2(32, layer_index=1, num_layers=4))["bound_bias"]
    np.testing.assert_allclose(sigmoid(bound), 0.25, rtol=1e-6)
    assert count(HGRN2(32), 32) == 4 * 32 * 32 + 32
    np.testing.assert_allclose(LightningAttention(32).log_decay(), [0, -2, -4, -6])


@pytest.mark.parametrize("layer", [SimpleGatedLinearAttention(32), Retention(32, conv_width=2)])
def test_dtypes(layer):
    assert check_dtypes(layer).memory.dtype == np.float32


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (SimpleGatedLinearAttention(16, gate_normalizer=0.0), "gate_normalizer: .* got 0.0"),
        (Retention(16, key_dim=3), "key_dim: rotary positions need an even size, got 3"),
        (LightningAttention(16, layer_index=2, num_layers=2), "layer_index: .* less than .* 2"),
        (HGRN2(16, layer_index=-1), "layer_index: .* got -1"),
        (LightningAttention(16, num_layers=0), "num_layers: .* got 0"),
        (Retention(16, gate_activation="tanh"), "gate_activation: .* got 'tanh'"),
    ],
)
def test_bad_options(layer, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), inputs())

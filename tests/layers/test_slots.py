"""Gated slot attention against its equations, step by step."""

import jax
import numpy as np
import pytest

from memseq.layers import GatedSlotAttention
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    inputs,
    query_key_value,
    random_params,
    rms_norm,
    run64,
    sigmoid,
    silu,
)


def gated_slots(layer, params, x):
    """K = K Diag(a) + k (1 - a)^T, V = Diag(a) V + (1 - a) v^T, out = V^T softmax(K^T q)."""
    heads, slots = layer.heads, layer.slots
    query, key, value = query_key_value(params, x, heads, heads, activation=True)
    decay = sigmoid(x @ params["decay"]["kernel"]) ** (1 / layer.gate_normalizer)
    decay = decay.reshape(len(x), heads, slots)
    keys = np.zeros((heads, key.shape[-1], slots))
    values = np.zeros((heads, slots, value.shape[-1]))
    y = []
    for t in range(len(x)):
        out = []
        for h in range(heads):
            a = decay[t, h]
            keys[h] = keys[h] * a + np.outer(key[t, h], 1 - a)
            values[h] = a[:, None] * values[h] + np.outer(1 - a, value[t, h])
            score = np.exp(keys[h].T @ query[t, h])
            out.append(values[h].T @ (score / score.sum()))
        o = silu(np.concatenate(out))
        if "norm" in params:
            o = rms_norm(o, params["norm"]["scale"])
        if "gate" in params:
            o = o * silu(x[t] @ params["gate"]["kernel"])
        y.append(o @ params["output"]["kernel"])
    return np.array(y), values, {"mean_decay": decay}


LAYERS = {
    "default": GatedSlotAttention(FEATURES, slots=7),
    "conv, gate": GatedSlotAttention(
        FEATURES, heads=2, slots=3, conv_width=3, output_gate=True, gate_normalizer=2.0, key_dim=5
    ),
    "one slot, no norm": GatedSlotAttention(FEATURES, slots=1, output_norm=False),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_transcription(name, ids):
    check_transcription(LAYERS[name], gated_slots, ids)


def test_equal_gates_read_the_mean_of_values():
    """Slots that all fill alike hold the same, so every softmax reads that."""
    layer = GatedSlotAttention(FEATURES, heads=2, slots=5, output_norm=False)
    params, x = random_params(layer), inputs()
    params["decay"]["kernel"] = np.zeros_like(params["decay"]["kernel"])
    _, state, _ = run64(layer, params, x)
    memory = np.asarray(state.memory)
    np.testing.assert_allclose(memory, memory[:, :, :1].repeat(5, axis=2), rtol=0, atol=1e-12)
    a = 0.5 ** (1 / layer.gate_normalizer)
    weight = (1 - a) * a ** np.arange(x.shape[1])[::-1]
    for row, u in enumerate(x):
        value = query_key_value(params, u, 2, 2, activation=True)[2]
        want = np.einsum("t,thv->hv", weight, value)
        np.testing.assert_allclose(memory[row, :, 0], want, rtol=0, atol=1e-12)


def test_defaults():
    layer = GatedSlotAttention(32)
    state = layer.init_state(3)
    assert state.memory.shape == (3, 4, 64, 8) and state.keys.shape == (3, 4, 8, 64)
    assert count(layer, 32) == 4 * 32 * 32 + 32 * 4 * 64 + 32
    assert check_dtypes(layer).keys.dtype == np.float32


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (GatedSlotAttention(16, slots=0), "slots: .* got 0"),
        (GatedSlotAttention(16, gate_normalizer=-1.0), "gate_normalizer: .* got -1.0"),
    ],
)
def test_bad_options(layer, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), inputs())

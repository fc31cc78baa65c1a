"""Layers of the delta rule with channel decays, several steps or feedback, step by step."""

import jax
import numpy as np
import pytest

from memseq.layers import (
    Comba,
    DeltaNet,
    DeltaProduct,
    GatedDeltaNet,
    GatedDeltaNet2,
    GatedDeltaProduct,
    KimiDeltaAttention,
)
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    inputs,
    query_key_value,
    random_params,
    read_out,
    run64,
    short_conv,
    sigmoid,
    silu,
    softplus,
    unit,
)


def channel_gate(layer, params, x, heads):
    """Decays [time, heads, K]; log a is -e^A_log softplus(f), or bound sigmoid(e^A_log f)."""
    gate = params["decay_gate"]
    f = x @ params["decay_in"]["kernel"] @ params["decay_out"]["kernel"] + gate["dt_bias"]
    f, rate = f.reshape(len(x), heads, -1), np.exp(gate["A_log"])[:, None]
    if layer.lower_bound is not None:
        return np.exp(layer.lower_bound * sigmoid(rate * f))
    return np.exp(-rate * softplus(f))


def kimi(layer, params, x):
    """S' = Diag(a) S, S = S' + beta k (v - S'^T k)^T."""
    heads = params["beta"]["kernel"].shape[1]
    query, key, value = query_key_value(params, x, layer.heads, heads, activation=True)
    decay = channel_gate(layer, params, x, heads)
    beta = layer.max_beta * sigmoid(x @ params["beta"]["kernel"])
    group, keys = heads // layer.heads, key.shape[-1]
    memory, out = np.zeros((heads, keys, value.shape[-1])), np.zeros(value.shape)
    for t in range(len(x)):
        for h in range(heads):
            q, k = unit(query[t, h // group]), unit(key[t, h // group])
            kept = np.diag(decay[t, h]) @ memory[h]
            memory[h] = kept + beta[t, h] * np.outer(k, value[t, h] - kept.T @ k)
            out[t, h] = memory[h].T @ q / np.sqrt(keys)
    sown = {"mean_decay": decay, "mean_beta": beta}
    return read_out(params, x, out, sigmoid), memory, sown


def gated_delta_net2(layer, params, x):
    """S' = Diag(a) S, S = S' + k (w v - S'^T (b k))^T."""
    heads = params["decay_gate"]["A_log"].shape[0]
    query, key, value = query_key_value(params, x, layer.heads, heads, activation=True)
    decay = channel_gate(layer, params, x, heads)
    erase = layer.max_beta * sigmoid(x @ params["erase"]["kernel"]).reshape(key.shape)
    write = sigmoid(x @ params["write"]["kernel"]).reshape(value.shape)
    group, keys = heads // layer.heads, key.shape[-1]
    memory, out = np.zeros((heads, keys, value.shape[-1])), np.zeros(value.shape)
    for t in range(len(x)):
        for h in range(heads):
            q, k = unit(query[t, h // group]), unit(key[t, h // group])
            kept = np.diag(decay[t, h]) @ memory[h]
            held = kept.T @ (erase[t, h // group] * k)
            memory[h] = kept + np.outer(k, write[t, h] * value[t, h] - held)
            out[t, h] = memory[h].T @ q / np.sqrt(keys)
    sown = {"mean_decay": decay, "mean_beta": erase, "mean_write": write}
    return read_out(params, x, out, sigmoid), memory, sown


def mamba_gate(params, x):
    gate = params["decay_gate"]
    step = softplus(x @ params["decay"]["kernel"] + gate["dt_bias"])
    return np.exp(-np.exp(gate["A_log"]) * step)


def delta_product(layer, params, x):
    """One decay, then `steps` updates of the delta rule, then one read."""
    heads, steps = layer.heads, layer.steps
    parts = [x @ params[name]["kernel"] for name in ("query", "key", "value")]
    borders = np.cumsum([part.shape[1] for part in parts])[:2]
    if "conv" in params:
        mixed = short_conv(np.concatenate(parts, axis=1), params["conv"]["kernel"])
        parts = np.split(mixed, borders, axis=1)
    else:
        parts = [silu(part) for part in parts]
    query = parts[0].reshape(len(x), heads, -1)
    key, value = (part.reshape(len(x), steps, heads, -1) for part in parts[1:])
    beta = layer.max_beta * sigmoid(x @ params["beta"]["kernel"])
    decay, sown = np.ones((len(x), heads)), {"mean_beta": beta}
    if "decay" in params:
        decay = sown["mean_decay"] = mamba_gate(params, x)
    beta = beta.reshape(len(x), steps, heads)
    keys = key.shape[-1]
    memory, out = np.zeros((heads, keys, value.shape[-1])), np.zeros((len(x), *value.shape[2:]))
    for t in range(len(x)):
        for h in range(heads):
            memory[h] *= decay[t, h]
            for i in range(steps):
                k = unit(key[t, i, h])
                error = value[t, i, h] - memory[h].T @ k
                memory[h] += beta[t, i, h] * np.outer(k, error)
            out[t, h] = memory[h].T @ unit(query[t, h]) / np.sqrt(keys)
    return read_out(params, x, out), memory, sown


def comba(layer, params, x):
    """S = a S + beta k (v - S^T p)^T with the memory before decay, p = sigmoid(b) k."""
    heads = layer.heads
    query, key, value = query_key_value(params, x, heads, heads, activation=True)
    decay = mamba_gate(params, x)
    beta = layer.max_beta * sigmoid(x @ params["beta"]["kernel"])
    feedback = sigmoid(params["feedback_bias"])
    keys = key.shape[-1]
    memory, out = np.zeros((heads, keys, value.shape[-1])), np.zeros(value.shape)
    for t in range(len(x)):
        for h in range(heads):
            k = unit(key[t, h])
            q = unit(unit(query[t, h]) - params["query_bias"][h] * k)
            error = value[t, h] - memory[h].T @ (feedback[h] * k)
            memory[h] = decay[t, h] * memory[h] + beta[t, h] * np.outer(k, error)
            out[t, h] = memory[h].T @ q / np.sqrt(keys)
    return read_out(params, x, out, sigmoid), memory, {"mean_decay": decay, "mean_beta": beta}


GROUPED = {"heads": 2, "value_heads": 4, "value_dim": 3}
LAYERS = {
    "kimi": (KimiDeltaAttention(FEATURES), kimi),
    "kimi, grouped, bounded": (
        KimiDeltaAttention(FEATURES, lower_bound=-5.0, max_beta=2.0, gate_rank=5, **GROUPED),
        kimi,
    ),
    "kimi, plain": (
        KimiDeltaAttention(FEATURES, output_gate=False, output_norm=False, conv_width=0),
        kimi,
    ),
    "gated delta net 2": (GatedDeltaNet2(FEATURES), gated_delta_net2),
    "gated delta net 2, grouped": (
        GatedDeltaNet2(FEATURES, max_beta=2.0, conv_width=0, **GROUPED),
        gated_delta_net2,
    ),
    "delta product": (DeltaProduct(FEATURES), delta_product),
    "delta product of three": (
        DeltaProduct(FEATURES, heads=2, steps=3, conv_width=0, key_dim=3, max_beta=1.0),
        delta_product,
    ),
    "gated delta product": (GatedDeltaProduct(FEATURES, heads=2), delta_product),
    "comba": (Comba(FEATURES), comba),
    "comba, no conv": (Comba(FEATURES, heads=2, conv_width=0, max_beta=2.0, key_dim=5), comba),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_transcription(name, ids):
    check_transcription(*LAYERS[name], ids)


def check_same(layer, params, other, other_params):
    x = inputs()
    assert jax.tree.structure(other_params) == jax.tree.structure(random_params(other))
    y, state, _ = run64(layer, params, x)
    want, want_state, _ = run64(other, other_params, x)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(state.memory, want_state.memory, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
def test_delta_product_of_one_is_delta_net(gated):
    sizes = {"heads": 2, "key_dim": 4, "value_dim": 6, "max_beta": 2.0}
    product, plain = (GatedDeltaProduct, GatedDeltaNet) if gated else (DeltaProduct, DeltaNet)
    layer = product(FEATURES, steps=1, **sizes)
    params = random_params(layer)
    check_same(layer, params, plain(FEATURES, **sizes), params)


def test_kimi_with_one_gate_a_head_is_gated_delta_net():
    sizes = {"heads": 2, "key_dim": 4, "value_dim": 6, "output_gate": False}
    layer, plain = KimiDeltaAttention(FEATURES, **sizes), GatedDeltaNet(FEATURES, **sizes)
    params = random_params(plain)
    own = random_params(layer)
    own |= {name: params[name] for name in own if name in params}
    rank = own["decay_in"]["kernel"].shape[1]
    own["decay_in"]["kernel"] = np.zeros((FEATURES, rank))
    own["decay_in"]["kernel"][:, :2] = params["decay"]["kernel"]
    own["decay_out"]["kernel"] = np.zeros((rank, 8))
    own["decay_out"]["kernel"][0, :4] = own["decay_out"]["kernel"][1, 4:] = 1
    gate = params["decay_gate"]
    own["decay_gate"] = {"A_log": gate["A_log"], "dt_bias": np.repeat(gate["dt_bias"], 4)}
    check_same(layer, own, plain, params)


def test_comba_without_feedback_is_gated_linear_attention_of_its_keys():
    """p = 0: nothing is erased, the memory is a decayed sum of beta k v^T."""
    layer = Comba(FEATURES, heads=2, output_norm=False, output_gate=False)
    params, x = random_params(layer), inputs()
    params["feedback_bias"] = np.full(2, -80.0)
    _, state, _ = run64(layer, params, x)
    for row, u in enumerate(x):
        _, key, value = query_key_value(params, u, 2, 2)
        beta, decay = sigmoid(u @ params["beta"]["kernel"]), mamba_gate(params, u)
        left = np.append(np.cumprod(decay[::-1], axis=0)[::-1][1:], np.ones((1, 2)), axis=0)
        key = np.apply_along_axis(unit, -1, key)
        want = np.einsum("th,thk,thv->hkv", beta * left, key, value)
        np.testing.assert_allclose(state.memory[row], want, rtol=0, atol=1e-9)


def test_two_householder_steps_rotate():
    """With write strength 2 and nothing written, two reflections turn what the memory holds."""
    layer = DeltaProduct(2, heads=1, conv_width=0, output_norm=False)
    params = random_params(layer, features=2)
    angle = 0.7
    keys = np.array([[1.0, 0.0], [np.cos(angle / 2), np.sin(angle / 2)]])
    params["key"]["kernel"] = np.concatenate([keys.reshape(1, 4)] * 2)
    params["value"]["kernel"] = np.zeros((2, 4))
    params["beta"]["kernel"] = np.full((2, 2), 50.0)
    x = np.full((1, 1, 2), 20.0)  # silu leaves large keys as they are; they become unit vectors
    start = np.random.default_rng(0).normal(size=(1, 1, 2, 2))
    state = layer.init_state(1).replace(memory=start)
    _, after, _ = run64(layer, params, x, state)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_allclose(after.memory[0, 0], turn @ start[0, 0], rtol=0, atol=1e-5)


def test_defaults():
    kimi = KimiDeltaAttention(32)
    assert kimi.init_state(3).memory.shape == (3, 4, 8, 8)
    assert DeltaProduct(32).init_state(3).conv.shape == (3, 3, 32 + 2 * 64)
    low_rank = 2 * (32 * 8 + 8 * 32)
    gates = 4 + 32 + 32 * 4  # A_log, dt_bias, beta
    assert count(kimi, 32) == 4 * 32 * 32 + low_rank + 32 + gates + 4 * 96 + 8
    assert count(DeltaProduct(32), 32) == 6 * 32 * 32 + 2 * 4 * 32 + 4 * 160 + 8
    assert GatedDeltaProduct(32).output_gate and DeltaProduct(32).max_beta == 2


@pytest.mark.parametrize("layer", [KimiDeltaAttention(32), GatedDeltaNet2(32), Comba(32)])
def test_dtypes(layer):
    assert check_dtypes(layer).memory.dtype == np.float32


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (KimiDeltaAttention(16, lower_bound=5.0), "lower_bound: .* negative number, got 5.0"),
        (KimiDeltaAttention(16, heads=2, value_heads=3), "value_heads: .* multiple .* 2, got 3"),
        (KimiDeltaAttention(16, gate_rank=0), "gate_rank: .* got 0"),
        (DeltaProduct(16, steps=0), "steps: .* got 0"),
        (Comba(16, max_beta=3.0), "max_beta: .* got 3.0"),
    ],
)
def test_bad_options(layer, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), inputs())

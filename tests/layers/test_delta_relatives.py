"""Longhorn, Oja's rule and preconditioned delta rules against their equations, step by step."""

import jax
import numpy as np
import pytest

from memseq.layers import (
    DeltaNet,
    GatedDeltaNet,
    KimiDeltaAttention,
    Longhorn,
    MomentumDeltaNet,
    OjaRule,
    PreconditionedGatedDeltaNet,
    PreconditionedKimiDeltaAttention,
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
    softplus,
    unit,
)


def longhorn(layer, params, x):
    """S = argmin |S - S_old|^2 + beta |S^T k - v|^2, by its normal equations."""
    heads = layer.heads
    query, key, value = query_key_value(params, x, heads, heads, activation=True)
    beta = sigmoid(x @ params["beta"]["kernel"])
    keys = key.shape[-1]
    memory, out = np.zeros((heads, keys, value.shape[-1])), np.zeros(value.shape)
    for t in range(len(x)):
        for h in range(heads):
            k, b = key[t, h], beta[t, h]
            system = np.eye(keys) + b * np.outer(k, k)
            memory[h] = np.linalg.solve(system, memory[h] + b * np.outer(k, value[t, h]))
            out[t, h] = memory[h].T @ query[t, h] / np.sqrt(keys)
    return read_out(params, x, out), memory, {"mean_beta": beta}


def elementwise_longhorn(layer, params, x):
    """In value channel c: S = (1 - D k^2) S + D v k, D = beta / (1 + beta |k|^2)."""
    heads = layer.heads
    query, key, value = query_key_value(params, x, heads, heads, activation=True)
    beta = sigmoid(x @ params["beta"]["kernel"]).reshape(value.shape)
    keys = key.shape[-1]
    memory, out = np.zeros((heads, keys, value.shape[-1])), np.zeros(value.shape)
    for t in range(len(x)):
        for h in range(heads):
            k = key[t, h]
            for c, b in enumerate(beta[t, h]):
                step = b / (1 + b * k @ k)
                memory[h, :, c] = (1 - step * k**2) * memory[h, :, c] + step * value[t, h, c] * k
            out[t, h] = memory[h].T @ query[t, h] / np.sqrt(keys)
    return read_out(params, x, out), memory, {"mean_beta": beta}


def channel_gate(params, x, heads):
    gate = params["decay_gate"]
    f = x @ params["decay_in"]["kernel"] @ params["decay_out"]["kernel"] + gate["dt_bias"]
    return np.exp(-np.exp(gate["A_log"])[:, None] * softplus(f.reshape(len(x), heads, -1)))


def oja(layer, params, x):
    """S' = S Diag(a), S = S' + beta (k - S' v) v^T."""
    heads = layer.heads
    query, key, value = query_key_value(params, x, heads, heads, activation=True)
    decay = channel_gate(params, x, heads)
    beta = layer.max_beta * sigmoid(x @ params["beta"]["kernel"])
    keys = key.shape[-1]
    memory, out = np.zeros((heads, keys, value.shape[-1])), np.zeros(value.shape)
    for t in range(len(x)):
        for h in range(heads):
            q, k, v = unit(query[t, h]), unit(key[t, h]), unit(value[t, h])
            kept = memory[h] @ np.diag(decay[t, h])
            memory[h] = kept + beta[t, h] * np.outer(k - kept @ v, v)
            out[t, h] = memory[h].T @ q / np.sqrt(keys)
    return read_out(params, x, out), memory, {"mean_decay": decay, "mean_beta": beta}


def mamba_gate(params, x, kernel, gate):
    gate = params[gate]
    step = softplus(x @ params[kernel]["kernel"] + gate["dt_bias"])
    return np.exp(-np.exp(gate["A_log"]) * step)


def preconditioned(layer, params, x):
    """A = c A + r k^2, m = bound^-softsign(log A - center); S' + beta (m k) (v - S'^T k)^T."""
    value_heads = params["beta"]["kernel"].shape[1]
    group = value_heads // layer.heads
    query, key, value = query_key_value(params, x, layer.heads, value_heads, activation=True)
    activation = silu
    if isinstance(layer, KimiDeltaAttention):
        decay, activation = channel_gate(params, x, value_heads), sigmoid
    else:
        decay = mamba_gate(params, x, "decay", "decay_gate")
    keep = mamba_gate(params, x, "curvature_decay", "curvature_gate")
    rate = sigmoid(x @ params["curvature_rate"]["kernel"])
    beta = layer.max_beta * sigmoid(x @ params["beta"]["kernel"])
    keys = key.shape[-1]
    memory, out = np.zeros((value_heads, keys, value.shape[-1])), np.zeros(value.shape)
    curvature, scales = np.zeros((layer.heads, keys)), np.zeros(key.shape)
    for t in range(len(x)):
        for h in range(layer.heads):
            k = unit(key[t, h])
            curvature[h] = keep[t, h] * curvature[h] + rate[t, h] * k**2
            r = np.log(curvature[h] + 1e-6) - params["center_bias"][h]
            scales[t, h] = np.exp(-np.log(layer.bound) * r / (1 + np.abs(r)))
        for h in range(value_heads):
            q, k = unit(query[t, h // group]), unit(key[t, h // group])
            kept = decay[t, h][..., None] * memory[h]
            error = value[t, h] - kept.T @ k
            memory[h] = kept + beta[t, h] * np.outer(scales[t, h // group] * k, error)
            out[t, h] = memory[h].T @ q / np.sqrt(keys)
    sown = {"mean_decay": decay, "mean_beta": beta, "mean_scale": scales}
    return read_out(params, x, out, activation), memory, sown


def momentum(layer, params, x):
    """M = mu M + s k (v - a S^T k)^T, S = a S + b M; b and a weighed by sin^2 and cos^2."""
    value_heads = params["beta"]["kernel"].shape[1]
    group = value_heads // layer.heads
    query, key, value = query_key_value(params, x, layer.heads, value_heads, activation=True)
    step = np.tanh(x @ params["step"]["kernel"] / np.sqrt(layer.features)) + 1
    angle = np.arctan(step * np.exp(params["factor_log"]))
    beta = np.sin(angle) ** 2 * layer.max_beta * sigmoid(x @ params["beta"]["kernel"])
    decay = np.cos(angle) ** 2 * mamba_gate(params, x, "decay", "decay_gate")
    speed = mamba_gate(params, x, "momentum", "momentum_gate")
    speed = np.maximum(speed, np.exp(layer.min_log_momentum))
    correction = np.exp(params["correction_log"])
    keys = key.shape[-1]
    memory, out = np.zeros((value_heads, keys, value.shape[-1])), np.zeros(value.shape)
    running = np.zeros(memory.shape)
    for t in range(len(x)):
        for h in range(value_heads):
            k = unit(key[t, h // group])
            q = unit(query[t, h // group] - correction[h // group] * key[t, h // group])
            kept = decay[t, h] * memory[h]
            error = value[t, h] - kept.T @ k
            running[h] = speed[t, h] * running[h] + step[t, h] * np.outer(k, error)
            memory[h] = kept + beta[t, h] * running[h]
            out[t, h] = memory[h].T @ q / np.sqrt(keys)
    sown = {"mean_decay": decay, "mean_beta": beta, "mean_momentum": speed}
    return read_out(params, x, out, sigmoid), memory, sown


LAYERS = {
    "longhorn": (Longhorn(FEATURES), longhorn),
    "longhorn, plain": (
        Longhorn(FEATURES, heads=2, conv_width=0, output_gate=False, key_dim=5, value_dim=3),
        longhorn,
    ),
    "longhorn, elementwise": (
        Longhorn(FEATURES, heads=2, key_dim=5, value_dim=3, elementwise=True),
        elementwise_longhorn,
    ),
    "oja": (OjaRule(FEATURES), oja),
    "oja, no conv": (
        OjaRule(FEATURES, heads=2, conv_width=0, max_beta=2.0, key_dim=5, value_dim=3, gate_rank=2),
        oja,
    ),
    "preconditioned gdn": (PreconditionedGatedDeltaNet(FEATURES), preconditioned),
    "preconditioned gdn, grouped": (
        PreconditionedGatedDeltaNet(FEATURES, heads=2, value_heads=4, bound=2.0, max_beta=2.0),
        preconditioned,
    ),
    "momentum": (MomentumDeltaNet(FEATURES), momentum),
    "momentum, grouped": (
        MomentumDeltaNet(
            FEATURES, heads=2, value_heads=4, value_dim=3, conv_width=0, min_log_momentum=-0.1
        ),
        momentum,
    ),
    "preconditioned kda": (PreconditionedKimiDeltaAttention(FEATURES), preconditioned),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_transcription(name, ids):
    check_transcription(*LAYERS[name], ids)


@pytest.mark.parametrize(
    ("layer", "plain"),
    [
        (PreconditionedGatedDeltaNet, GatedDeltaNet),
        (PreconditionedKimiDeltaAttention, KimiDeltaAttention),
    ],
)
def test_bound_of_one_is_the_layer_without(layer, plain):
    layer, plain = layer(FEATURES, heads=2, bound=1.0), plain(FEATURES, heads=2)
    params, x = random_params(layer), inputs()
    shared = {
        name: leaf
        for name, leaf in params.items()
        if not name.startswith("curvature") and name != "center_bias"
    }
    y, state, _ = run64(layer, params, x)
    want, want_state, _ = run64(plain, shared, x)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-9)
    np.testing.assert_allclose(state.memory, want_state.memory, rtol=0, atol=1e-9)


def test_curvature_is_carried():
    """Two calls hold what one does, and a used channel is written with less."""
    layer = PreconditionedGatedDeltaNet(FEATURES, heads=2)
    params, x = random_params(layer), inputs()
    _, whole, _ = run64(layer, params, x)
    _, state, _ = run64(layer, params, x[:, :9])
    _, state, _ = run64(layer, params, x[:, 9:], state)
    np.testing.assert_allclose(state.curvature, whole.curvature, rtol=0, atol=1e-6)
    params["center_bias"] = np.full(2, -50.0)
    assert run64(layer, params, x)[2]["mean_scale"] < 0.7
    params["center_bias"] = np.full(2, 50.0)
    assert run64(layer, params, x)[2]["mean_scale"] > 1.4


def test_momentum_is_carried():
    """Two calls hold what one does."""
    layer = MomentumDeltaNet(FEATURES, heads=2)
    params, x = random_params(layer), inputs()
    _, whole, _ = run64(layer, params, x)
    _, state, _ = run64(layer, params, x[:, :9])
    _, state, _ = run64(layer, params, x[:, 9:], state)
    np.testing.assert_allclose(state.momentum, whole.momentum, rtol=0, atol=1e-6)
    assert np.abs(whole.momentum).max() > 0.1


def test_momentum_starts_within_its_bounds():
    """What a step writes at most and what the memory keeps at most are sin^2 and cos^2."""
    layer = MomentumDeltaNet(FEATURES, heads=2)
    params = init(layer)
    factor = np.exp(params["factor_log"])
    assert (factor > 0).all() and (factor <= 4).all()
    assert (params["correction_log"] <= 0).all()
    _, _, sown = run64(layer, random_params(layer), 30 * inputs())
    assert 0 < sown["mean_beta"] < 1 and 0 < sown["mean_decay"] < 1
    assert np.exp(-2) <= sown["mean_momentum"] < 1


def test_longhorn_is_the_delta_rule_on_unit_keys():
    """Keys of length c and beta b hold what unit keys hold of v / c with b c^2 / (1 + b c^2)."""
    layer = Longhorn(FEATURES, heads=1, conv_width=0, output_gate=False, output_norm=False)
    delta = DeltaNet(FEATURES, heads=1, conv_width=0, output_norm=False)
    params, x = random_params(layer), inputs(batch=1)
    _, key, value = query_key_value(params, x[0], 1, 1, activation=True)
    length = np.linalg.norm(key, axis=-1)[:, 0]
    beta = sigmoid(x[0] @ params["beta"]["kernel"])[:, 0]
    strength = beta * length**2 / (1 + beta * length**2)
    _, state, _ = run64(layer, params, x)
    memory = np.zeros((FEATURES, FEATURES))
    for t in range(len(beta)):
        k = key[t, 0] / length[t]
        memory += strength[t] * np.outer(k, value[t, 0] / length[t] - memory.T @ k)
    np.testing.assert_allclose(state.memory[0, 0], memory, rtol=0, atol=1e-9)
    assert jax.tree.structure(random_params(delta)) == jax.tree.structure(params)


def test_longhorn_is_elementwise_where_keys_have_one_channel():
    """k k^T is its diagonal: the paper's approximation is none, given the same beta everywhere."""
    sizes = {"heads": 4, "key_dim": 1, "value_dim": 3}
    exact, layer = Longhorn(FEATURES, **sizes), Longhorn(FEATURES, elementwise=True, **sizes)
    params, x = random_params(exact), inputs()
    y, state, _ = run64(exact, params, x)
    params["beta"]["kernel"] = np.repeat(params["beta"]["kernel"], 3, axis=1)
    found, found_state, _ = run64(layer, params, x)
    np.testing.assert_allclose(found, y, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found_state.memory, state.memory, rtol=0, atol=1e-12)


def test_elementwise_longhorn_is_finite_for_long_keys():
    """Where 1 - step k^2 rounds to 0."""
    layer = Longhorn(FEATURES, heads=4, key_dim=1, conv_width=0, elementwise=True)
    params = jax.tree.map(np.float32, random_params(layer))
    params["key"]["kernel"] *= np.float32(1e9)
    loss = jax.grad(lambda p, x: (layer.apply({"params": p}, x)[0] ** 2).sum())
    for leaf in jax.tree.leaves(jax.jit(loss)(params, np.float32(inputs()))):
        assert np.isfinite(leaf).all()


def test_oja_finds_the_principal_value():
    """One value again and again: the memory's part along it becomes its key, whatever was held."""
    layer = OjaRule(FEATURES, heads=1, conv_width=0)
    params = random_params(layer)
    params["beta"]["kernel"] *= 0
    params["decay_gate"]["A_log"] = np.full(1, -80.0)
    x = np.repeat(inputs(time=1, batch=1), 60, axis=1)
    start = np.random.default_rng(0).normal(size=(1, 1, FEATURES, FEATURES))
    _, state, _ = run64(layer, params, x, layer.init_state(1).replace(memory=start))
    _, key, value = query_key_value(params, x[0], 1, 1, activation=True)
    held = np.asarray(state.memory)[0, 0] @ unit(value[0, 0])
    np.testing.assert_allclose(held, unit(key[0, 0]), rtol=0, atol=1e-4)


def test_defaults():
    assert Longhorn(32).init_state(3).memory.shape == (3, 4, 8, 8)
    assert count(Longhorn(32), 32) == 5 * 32 * 32 + 4 * 32 + 4 * 96 + 8
    low_rank = 2 * 32 * 8 + 4 + 32
    assert count(OjaRule(32), 32) == count(Longhorn(32), 32) + low_rank
    more = 2 * 4 * 32 + 3 * 4  # decay and rate, then A_log, dt_bias and center_bias
    layer = PreconditionedGatedDeltaNet(32)
    assert count(layer, 32) == count(GatedDeltaNet(32), 32) + more
    assert layer.init_state(3).curvature.shape == (3, 4, 6)


@pytest.mark.parametrize(
    "layer",
    [
        Longhorn(32),
        OjaRule(32),
        MomentumDeltaNet(32),
        PreconditionedGatedDeltaNet(32),
        PreconditionedKimiDeltaAttention(32),
    ],
)
def test_dtypes(layer):
    assert check_dtypes(layer).memory.dtype == np.float32


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (OjaRule(16, max_beta=0.0), "max_beta: .* got 0.0"),
        (OjaRule(16, gate_rank=0), "gate_rank: .* got 0"),
        (MomentumDeltaNet(16, min_log_momentum=0.0), "min_log_momentum: .* got 0.0"),
        (PreconditionedGatedDeltaNet(16, bound=0.5), "bound: .* got 0.5"),
    ],
)
def test_bad_options(layer, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), inputs())

"""DeltaNet and Gated DeltaNet against their equations, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import DeltaNet, GatedDeltaNet
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
    softplus,
    unit,
)


def delta(layer, params, x, decay, sown):
    """S' = a S, S = S' + beta k (v - S'^T k)^T, out = S^T q / sqrt(K)."""
    heads = params["beta"]["kernel"].shape[1]
    query, key, value = query_key_value(params, x, layer.heads, heads, activation=True)
    beta = layer.max_beta * sigmoid(x @ params["beta"]["kernel"])
    group = heads // layer.heads
    keys, values = key.shape[-1], value.shape[-1]
    memory = np.zeros((heads, keys, values))
    out = np.zeros(value.shape)
    for t in range(len(x)):
        for h in range(heads):
            q, k = unit(query[t, h // group]), unit(key[t, h // group])
            kept = decay[t, h] * memory[h]
            memory[h] = kept + beta[t, h] * np.outer(k, value[t, h] - kept.T @ k)
            out[t, h] = memory[h].T @ q / np.sqrt(keys)
    return read_out(params, x, out), memory, {"mean_beta": beta, **sown}


def delta_net(layer, params, x):
    return delta(layer, params, x, np.ones((len(x), layer.heads)), {})


def gated_delta_net(layer, params, x):
    """log a = -exp(A_log) softplus(W x + dt_bias)."""
    gate = params["decay_gate"]
    step = softplus(x @ params["decay"]["kernel"] + gate["dt_bias"])
    decay = np.exp(-np.exp(gate["A_log"]) * step)
    return delta(layer, params, x, decay, {"mean_decay": decay})


PLAIN = {
    "default": {},
    "beta to 2, gate": {"max_beta": 2.0, "output_gate": True, "heads": 2},
    "no conv": {"conv_width": 0, "output_norm": False, "key_dim": 5, "value_dim": 3},
}


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
def test_delta_net(options):
    check_transcription(DeltaNet(FEATURES, **options), delta_net)


def test_delta_net_packed():
    check_transcription(DeltaNet(FEATURES, heads=2, max_beta=2.0), delta_net, IDS)


GATED = {
    "default": {},
    "grouped, beta to 2": {"heads": 2, "value_heads": 6, "value_dim": 4, "max_beta": 2.0},
    "no conv": {"conv_width": 0, "output_norm": False, "output_gate": False, "key_dim": 5},
}


@pytest.mark.parametrize("options", GATED.values(), ids=GATED)
def test_gated_delta_net(options):
    check_transcription(GatedDeltaNet(FEATURES, **options), gated_delta_net)


def test_gated_delta_net_packed():
    layer = GatedDeltaNet(FEATURES, heads=2, value_heads=4)
    check_transcription(layer, gated_delta_net, IDS)


def test_no_decay_is_delta_net():
    """Gated DeltaNet that forgets nothing is DeltaNet."""
    sizes = {"heads": 2, "key_dim": 4, "value_dim": 6, "max_beta": 2.0}
    gated = GatedDeltaNet(FEATURES, **sizes)
    plain = DeltaNet(FEATURES, output_gate=True, **sizes)
    params, x = random_params(gated), inputs()
    params["decay_gate"]["A_log"] = np.full_like(params["decay_gate"]["A_log"], -60.0)
    y, state, _ = run64(gated, params, x)
    shared = {name: leaf for name, leaf in params.items() if not name.startswith("decay")}
    assert jax.tree.structure(shared) == jax.tree.structure(random_params(plain))
    want, want_state, _ = run64(plain, shared, x)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(state.memory, want_state.memory, rtol=0, atol=1e-12)


def test_full_decay_reads_the_last_write_only():
    """Gated DeltaNet that forgets everything reads beta (k . q) v of the present step."""
    layer = GatedDeltaNet(FEATURES, heads=2, output_norm=False, output_gate=False, conv_width=0)
    params, x = random_params(layer), inputs()
    params["decay_gate"]["A_log"] = np.full_like(params["decay_gate"]["A_log"], 9.0)
    y, _, _ = run64(layer, params, x)
    for row, u in enumerate(x):
        query, key, value = query_key_value(params, u, 2, 2, activation=True)
        beta = sigmoid(u @ params["beta"]["kernel"])
        query, key = (np.apply_along_axis(unit, -1, a) for a in (query, key))
        weight = beta * np.sum(query * key, axis=-1) / np.sqrt(key.shape[-1])
        want = read_out(params, u, weight[..., None] * value)
        np.testing.assert_allclose(y[row], want, rtol=0, atol=1e-9)


def test_write_strength_two_reflects():
    """Writing zeros, beta 1 erases what a key holds and beta 2 turns its sign."""
    layer = DeltaNet(FEATURES, heads=1, conv_width=0, max_beta=2.0, output_norm=False)
    params, x = random_params(layer), np.abs(inputs(time=2))
    params["value"]["kernel"] = np.zeros_like(params["value"]["kernel"])
    params["key"]["kernel"] = np.full_like(params["key"]["kernel"], 0.5)  # one and the same key
    params["beta"]["kernel"] = np.full_like(params["beta"]["kernel"], 50.0)  # beta is max_beta
    state = layer.init_state(2)
    start = np.random.default_rng(2).normal(size=state.memory.shape)
    state = state.replace(memory=start)

    def held(layer, steps):
        """What the memory holds under the key after this many steps, [batch, value_dim]."""
        _, after, _ = run64(layer, params, x[:, :steps], state)
        return np.asarray(after.memory)[:, 0].sum(axis=1) / FEATURES**0.5

    before = start[:, 0].sum(axis=1) / FEATURES**0.5
    assert np.abs(before).max() > 0.1
    np.testing.assert_allclose(held(layer, 1), -before, rtol=0, atol=1e-5)
    np.testing.assert_allclose(held(layer, 2), before, rtol=0, atol=1e-5)
    np.testing.assert_allclose(held(layer.clone(max_beta=1.0), 1), 0 * before, rtol=0, atol=1e-5)


def test_starts():
    """Beta starts at half its maximum; decay rates and step sizes in the ranges of Mamba-2."""
    layer = GatedDeltaNet(32, heads=256, key_dim=1, value_dim=1)
    params = init(layer)
    gate = params["decay_gate"]
    rate = np.exp(gate["A_log"])
    step = softplus(np.asarray(gate["dt_bias"], np.float64))
    assert rate.min() < 1 and 15 < rate.max() <= 16 and 6 < rate.mean() < 10
    assert 0.0009 < step.min() < 0.002 and 0.05 < step.max() < 0.101
    np.testing.assert_allclose(np.median(np.log(step)), np.log(0.01), atol=0.5)
    np.testing.assert_array_equal(params["norm"]["scale"], 1)
    kernel = np.asarray(params["conv"]["kernel"])
    assert kernel.shape == (4, 3 * 256) and 0.49 < np.abs(kernel).max() <= 0.5
    for max_beta in (1.0, 2.0):
        layer = DeltaNet(32, max_beta=max_beta)
        params = {"params": random_params(layer, features=32)}
        _, beta = layer.apply(params, np.zeros((1, 1, 32), np.float32), method="project")
        np.testing.assert_allclose(beta, np.full((1, 1, 4), max_beta / 2), rtol=1e-6)


def test_defaults():
    """Sizes: DeltaNet square memories; Gated DeltaNet 3/4 of features in keys, 3/2 in values."""
    plain, gated = DeltaNet(32), GatedDeltaNet(32)
    assert plain.init_state(3).memory.shape == (3, 4, 8, 8)
    assert plain.init_state(3).conv.shape == (3, 3, 96)
    assert gated.init_state(3).memory.shape == (3, 4, 6, 12)
    assert gated.init_state(3).conv.shape == (3, 3, 4 * (6 + 6 + 12))
    assert gated.clone(value_heads=8).init_state(3).memory.shape == (3, 8, 6, 12)
    assert count(plain, 32) == 4 * 32 * 32 + 4 * 96 + 32 * 4 + 8
    # query and key 3/4, value, gate and output 3/2 of features: 6 features^2 in all
    assert count(gated, 32) == 6 * 32 * 32 + 4 * 96 + 2 * 32 * 4 + 2 * 4 + 12


@pytest.mark.parametrize("layer", [DeltaNet(32), GatedDeltaNet(32, value_heads=8)])
def test_dtypes(layer):
    assert check_dtypes(layer).memory.dtype == jnp.float32


def test_gates_are_float32_beside_bfloat16():
    """Write strengths and decays are not rounded to the activations' dtype."""
    layer = GatedDeltaNet(FEATURES, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, 2, FEATURES), jnp.bfloat16)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    apply = lambda p, x: layer.apply(p, x, method="project")  # noqa: E731
    mixed, beta, log_decay = jax.eval_shape(apply, params, x)
    assert (mixed.dtype, beta.dtype, log_decay.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (DeltaNet(FEATURES, max_beta=2.5), r"max_beta: .* \(0, 2\], got 2\.5"),
        (DeltaNet(FEATURES, max_beta=0.0), r"max_beta: .* \(0, 2\], got 0\.0"),
        (DeltaNet(FEATURES, max_beta=float("nan")), r"max_beta: .* got nan"),
        (DeltaNet(FEATURES, heads=3), "heads: features 16 must be a multiple"),
        (DeltaNet(FEATURES, conv_width=-4), "conv_width: .* got -4"),
        (GatedDeltaNet(FEATURES, max_beta=-1.0), r"max_beta: .* got -1\.0"),
        (GatedDeltaNet(FEATURES, heads=5), "heads: features 16 must be a multiple"),
        (GatedDeltaNet(FEATURES, heads=0, key_dim=4), "heads: .* got 0"),
        (GatedDeltaNet(FEATURES, key_dim=0), "key_dim: .* got 0"),
        (GatedDeltaNet(FEATURES, value_dim=0), "value_dim: .* got 0"),
        (GatedDeltaNet(FEATURES, value_heads=6), "value_heads: .* multiple .* 4, got 6"),
        (GatedDeltaNet(FEATURES, value_heads=0), "value_heads: .* got 0"),
    ],
)
def test_bad_options(layer, message):
    with pytest.raises(ValueError, match=message):
        count(layer)

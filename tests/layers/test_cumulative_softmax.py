"""LightNet and attention with bounded memory against their equations, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import ABC, LightNet
from memseq.layers.linear_attention.cumulative_softmax import NOTHING, cumulative_softmax
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
    rms_norm,
    run64,
    segments_of,
    silu,
)


def past_softmax(logits):
    """[steps, ...] to the weights of each step's past, [step, steps so far, ...]."""
    for t in range(len(logits)):
        score = np.exp(logits[: t + 1] - logits[: t + 1].max(axis=0))
        yield score / score.sum(axis=0)


def kept(logits):
    """What a step keeps of a sum weighted by that softmax; all of it in the first step."""
    sums = np.cumsum(np.exp(logits), axis=0)
    return np.concatenate([np.ones_like(sums[:1]), sums[:-1] / sums[1:]])


def lightnet(layer, params, x):
    heads = layer.heads
    query, key, value = query_key_value(params, x, heads, heads)
    y = []
    for t, weight in enumerate(past_softmax(key)):
        memory = np.einsum("shk,shv->hkv", weight, value[: t + 1])
        out = np.einsum("hkv,hk->hv", memory, silu(query[t])) / np.sqrt(key.shape[-1])
        o = rms_norm(out.reshape(-1), params["norm"]["scale"])
        gate = x[t]
        for name in ("layers_0", "layers_1"):
            gate = gate @ params["gate"][name]["kernel"]
        y.append(o * silu(gate) @ params["output"]["kernel"])
    return np.array(y), memory, {"mean_decay": kept(key)}


def abc(layer, params, x):
    heads = layer.heads
    query, key, value = query_key_value(params, x, heads, heads)
    half = key.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * layer.rope_base ** (-np.arange(half) / half)

    def turned(u):
        pairs = (u[..., :half] + 1j * u[..., half:]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    query, key = turned(query), turned(key)
    logits = np.clip(x @ params["choice"]["kernel"], -32, 32).reshape(len(x), heads, -1)
    out = np.zeros(value.shape)
    for t, weight in enumerate(past_softmax(logits)):
        for h in range(heads):
            keys, values = weight[:, h].T @ key[: t + 1, h], weight[:, h].T @ value[: t + 1, h]
            score = np.exp(keys @ query[t, h] / np.sqrt(2 * half))
            out[t, h] = values.T @ (score / score.sum())
    memory = np.einsum("shm,shv->hmv", weight, value)
    return read_out(params, x, out), memory, {"mean_decay": kept(logits)}


LAYERS = {
    "lightnet": (LightNet(FEATURES), lightnet),
    "lightnet, conv": (LightNet(FEATURES, heads=2, conv_width=3, gate_rank=3, key_dim=5), lightnet),
    "abc": (ABC(FEATURES, slots=5), abc),
    "abc, conv, no gate": (
        ABC(FEATURES, heads=2, slots=3, conv_width=2, output_gate=False, value_dim=3),
        abc,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_transcription(name, ids):
    check_transcription(*LAYERS[name], ids)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_cumulative_softmax(size):
    """Small and huge logits, a carried sum, and finite gradients, also where all is padding."""
    logits = size * np.random.default_rng(0).normal(size=(2, 21, 3))
    ids = IDS.copy()
    ids[1] = -1
    total = np.stack([np.full(3, NOTHING), np.full(3, 0.7)])

    def f(logits):
        written, log_decay, after = cumulative_softmax(logits, total, ids)
        valid = ids[..., None] >= 0
        return jnp.sum(jnp.where(valid, written + log_decay, 0)), (written, log_decay, after)

    with jax.enable_x64(True):
        grad, (written, log_decay, after) = jax.jit(jax.grad(f, has_aux=True))(logits)
    grad, written, log_decay, after = map(np.asarray, (grad, written, log_decay, after))
    assert np.isfinite(grad).all() and log_decay.max() <= 0
    np.testing.assert_array_equal(after[1], 0.7)
    np.testing.assert_array_equal(log_decay[1], 0)
    for positions in segments_of(ids[0]):
        weights = list(past_softmax(logits[0, positions]))
        np.testing.assert_array_equal(log_decay[0, positions[0]], 0)
        for t, position in enumerate(positions):
            want = weights[t]
            np.testing.assert_allclose(written[0, position], want[-1], rtol=0, atol=1e-9)
            if t:  # what was written a step ago has been kept that much of
                before = weights[t - 1][-1] * np.exp(log_decay[0, position])
                np.testing.assert_allclose(before, want[-2], rtol=0, atol=1e-9)
        last = logits[0, positions]
        want = np.log(np.sum(np.exp(last - last.max(axis=0)), axis=0)) + last.max(axis=0)
    np.testing.assert_allclose(after[0], want, rtol=1e-12)


def test_abc_with_a_slot_a_token_is_softmax_attention():
    """Logits that give every token its own slot leave attention over the tokens so far."""
    time, heads, dim = 6, 2, 4
    layer = ABC(FEATURES, heads=heads, slots=time, key_dim=dim, output_norm=False)
    layer = layer.clone(output_gate=False, value_dim=8)
    params, x = random_params(layer), inputs(time=time, batch=1)
    x[0, :, :time] = 8 * np.eye(time)  # which token it is
    params["choice"]["kernel"] = np.zeros((FEATURES, heads * time))
    for head in range(heads):
        params["choice"]["kernel"][:time, head * time : (head + 1) * time] = 8 * np.eye(time) - 4
    _, state, _ = run64(layer, params, x)
    value = (x[0] @ params["value"]["kernel"]).reshape(time, heads, 8)
    want = np.moveaxis(value, 0, 1)
    np.testing.assert_allclose(state.memory[0], want, rtol=0, atol=1e-9)


def test_lightnet_with_equal_keys_holds_the_mean_of_the_values():
    layer = LightNet(FEATURES, heads=2)
    params, x = random_params(layer), inputs()
    params["key"]["kernel"] *= 0
    _, state, sown = run64(layer, params, x)
    steps = np.arange(1, x.shape[1] + 1)
    np.testing.assert_allclose(
        sown["mean_decay"], np.mean([1, *(1 - 1 / steps[1:])]), rtol=0, atol=1e-12
    )
    for row, u in enumerate(x):
        value = query_key_value(params, u, 2, 2)[2].mean(axis=0)
        want = np.broadcast_to(value[:, None], state.memory[row].shape)
        np.testing.assert_allclose(state.memory[row], want, rtol=0, atol=1e-12)


def test_defaults():
    state = LightNet(32).init_state(3)
    assert state.memory.shape == (3, 4, 8, 8) and state.total.shape == (3, 4, 8)
    assert count(LightNet(32), 32) == 4 * 32 * 32 + 2 * 32 * 128 + 32
    state = ABC(32).init_state(3)
    assert state.memory.shape == (3, 4, 64, 8) and state.keys.shape == (3, 4, 4, 64)
    assert count(ABC(32), 32) == (1 / 2 + 1 / 2 + 3) * 32 * 32 + 32 * 4 * 64 + 8
    for layer in (LightNet(32), ABC(32)):
        assert check_dtypes(layer).total.dtype == np.float32


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (LightNet(16, gate_rank=0), "gate_rank: .* got 0"),
        (ABC(16, slots=0), "slots: .* got 0"),
        (ABC(16, key_dim=3), "key_dim: rotary positions need an even size, got 3"),
    ],
)
def test_bad_options(layer, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), inputs())

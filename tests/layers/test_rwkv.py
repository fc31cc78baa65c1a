"""RWKV layers against their equations, step by step."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import RWKV6, RWKV7, LinearAttention
from memseq.models import LanguageModel
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    init,
    inputs,
    random_params,
    run64,
    segments_of,
    sigmoid,
    silu,
)


def low_rank(params, x, activation=lambda u: u):
    inner = activation(x @ params["in"]["kernel"])
    return params["bias"] + inner @ params["out"]["kernel"]


def head_norm(params, out):
    """Layer norm of out [heads, dim] by heads, eps 1e-5 dim."""
    centred = out - out.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-5 * out.shape[-1])
    return centred / deviation * params["norm"]["scale"] + params["norm"]["bias"]


def before(x):
    """The token before each of x [time, features]; zeros before the first."""
    return np.concatenate([np.zeros_like(x[:1]), x[:-1]])


def rwkv7(layer, params, x, first=None):
    """S = Diag(w) S - (rate r) (S^T r)^T + k v^T; `first`: [time, heads, dim], or None."""
    heads, dim = layer.heads, x.shape[1] // layer.heads
    names = ("query", "decay", "key", "value", "rate", "gate")
    mixed = {n: x + (before(x) - x) * mu for n, mu in zip(names, params["shift_bias"], strict=True)}
    query, key, value = (mixed[n] @ params[n]["kernel"] for n in ("query", "key", "value"))
    decay = np.exp(-np.exp(-0.5) * sigmoid(low_rank(params["decay_gate"], mixed["decay"], np.tanh)))
    rate = sigmoid(low_rank(params["rate_gate"], mixed["rate"]))
    gate = sigmoid(mixed["gate"] @ params["gate_in"]["kernel"]) @ params["gate_out"]["kernel"]
    if first is not None:
        share = sigmoid(low_rank(params["value_gate"], mixed["value"]))
        value = value + (first.reshape(value.shape) - value) * share
    remove = key * params["remove_scale"]
    key = key * (1 + (rate - 1) * params["key_scale"])
    split = [u.reshape(len(x), heads, dim) for u in (query, key, value, decay, rate, remove)]
    memory, y = np.zeros((heads, dim, dim)), []
    for t in range(len(x)):
        out = np.zeros((heads, dim))
        bonus = np.zeros((heads, dim))
        for h in range(heads):
            q, k, v, w, a, r = (u[t, h] for u in split)
            r = r / np.sqrt(np.sum(r**2) + 1e-6)
            old = memory[h]
            memory[h] = np.diag(w) @ old - np.outer(a * r, old.T @ r) + np.outer(k, v)
            out[h] = memory[h].T @ q
            bonus[h] = np.sum(q * k * params["bonus"][h]) * v
        o = (head_norm(params, out) + bonus).reshape(-1) * gate[t]
        y.append(o @ params["output"]["kernel"])
    return np.array(y), memory, {"mean_decay": decay, "mean_rate": rate}


def rwkv6(layer, params, x):
    """S = Diag(w) S + k v^T, read as S + (bonus k) v^T before the write; log w = -exp(.)."""
    heads, dim = layer.heads, x.shape[1] // layer.heads
    change = before(x) - x
    own = np.tanh((x + change * params["first_shift_bias"]) @ params["shift_in"]["kernel"])
    own = own.reshape(len(x), 5, -1)
    mixed = {}
    for i, name in enumerate(("query", "key", "value", "decay", "gate")):
        share = params["shift_bias"][i] + own[:, i] @ params["shift_out"]["kernel"][i]
        mixed[name] = x + change * share
    decay = np.exp(-np.exp(low_rank(params["decay_gate"], mixed["decay"], np.tanh)))
    query, key, value = (mixed[n] @ params[n]["kernel"] for n in ("query", "key", "value"))
    gate = silu(mixed["gate"] @ params["gate"]["kernel"])
    split = [u.reshape(len(x), heads, dim) for u in (query, key, value, decay)]
    memory, y = np.zeros((heads, dim, dim)), []
    for t in range(len(x)):
        out = np.zeros((heads, dim))
        for h in range(heads):
            q, k, v, w = (u[t, h] for u in split)
            out[h] = (memory[h] + np.outer(params["bonus"][h] * k, v)).T @ q
            memory[h] = np.diag(w) @ memory[h] + np.outer(k, v)
        y.append(head_norm(params, out).reshape(-1) * gate[t] @ params["output"]["kernel"])
    return np.array(y), memory, {"mean_decay": decay}


LAYERS = {
    "rwkv6": (RWKV6(FEATURES), rwkv6),
    "rwkv6, ranks": (RWKV6(FEATURES, heads=2, shift_rank=3, decay_rank=5), rwkv6),
    "rwkv7": (RWKV7(FEATURES), rwkv7),
    "rwkv7, ranks": (RWKV7(FEATURES, heads=2, decay_rank=3, rate_rank=5, gate_rank=7), rwkv7),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_transcription(name, ids):
    check_transcription(*LAYERS[name], ids)


class Two(nn.Module):
    """Two layers of a model, the second with the first one's values."""

    def setup(self):
        self.first = RWKV7(FEATURES, heads=2, layer_index=0, num_layers=2)
        self.second = RWKV7(FEATURES, heads=2, layer_index=1, num_layers=2)

    def __call__(self, x, segment_ids=None):
        shared = {}
        y, _ = self.first(x, None, segment_ids, shared)
        return self.second(y, None, segment_ids, shared)[0]


def test_later_layers_mix_the_first_ones_values():
    model = Two()
    params, x = random_params(model), inputs()
    assert "value_gate" in params["second"] and "value_gate" not in params["first"]
    with jax.enable_x64(True):
        y = np.asarray(jax.jit(model.apply)({"params": params}, x, IDS))
    layer = RWKV7(FEATURES, heads=2)
    for row, ids in enumerate(IDS):
        for positions in segments_of(ids):
            u = x[row, positions]
            middle, _, _ = rwkv7(layer, params["first"], u)
            share = params["first"]["shift_bias"][3]
            value = (u + (before(u) - u) * share) @ params["first"]["value"]["kernel"]
            want, _, _ = rwkv7(layer, params["second"], middle, value)
            np.testing.assert_allclose(y[row, positions], want, rtol=0, atol=1e-9)


def test_rwkv7_in_a_model():
    """Layers know their depth, the second has the first one's values, and calls may be split."""
    model = LanguageModel(11, 16, ("rwkv7",), repeats=2, mixers={"rwkv7": {"heads": 2}})
    tokens = np.random.default_rng(0).integers(11, size=(2, 9))
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    shapes = params["params"]["stack"]["layers"]
    first, second = (shapes[f"block_{i}"]["layer"] for i in range(2))
    assert "value_gate" in second and "value_gate" not in first
    assert np.abs(first["shift_bias"] - second["shift_bias"]).max() > 0.1
    # random everywhere: what starts at zero would hide what layers pass on
    draw = np.random.default_rng(1).normal
    params = jax.tree.map(lambda a: jnp.asarray(0.3 * draw(size=a.shape), a.dtype), params)
    call = jax.jit(model.apply)
    want, _ = call(params, tokens)
    state, logits = None, []
    for piece in (slice(0, 4), slice(4, 9)):
        y, state = call(params, tokens[:, piece], state)
        logits.append(y)
    np.testing.assert_allclose(np.concatenate(logits, axis=1), want, rtol=0, atol=1e-4)


def test_rwkv6_that_keeps_all_reads_linear_attention():
    """Without decay and with a bonus of 1 the read is of the whole sum, the present pair too."""
    layer = RWKV6(FEATURES, heads=2)
    params, x = random_params(layer), inputs()
    params["decay_gate"]["bias"] = np.full(FEATURES, -90.0)
    params["decay_gate"]["out"]["kernel"] *= 0
    params["bonus"] = np.ones_like(params["bonus"])
    params["shift_bias"] *= 0
    params["shift_out"]["kernel"] *= 0
    plain = LinearAttention(FEATURES, heads=2, feature_map="identity", normalize=False)
    shared = {name: params[name] for name in ("query", "key", "value", "output")}
    _, want, _ = run64(plain, shared, x)
    y, state, _ = run64(layer, params, x)
    np.testing.assert_allclose(state.memory, want.memory, rtol=0, atol=1e-9)
    for row, u in enumerate(x):
        query, key, value = (
            (u @ params[n]["kernel"]).reshape(-1, 2, 8) for n in ("query", "key", "value")
        )
        gate = silu(u @ params["gate"]["kernel"])
        score = np.tril(np.einsum("thk,shk->hts", query, key))
        out = np.einsum("hts,shv->thv", score, value)
        normed = np.array([head_norm(params, o) for o in out]).reshape(len(u), -1)
        want_y = normed * gate @ params["output"]["kernel"]
        np.testing.assert_allclose(y[row], want_y, rtol=0, atol=1e-9)


def test_rwkv6_forgets_at_once_without_overflow():
    layer = RWKV6(FEATURES, heads=2)
    params, x = random_params(layer), inputs()
    params["decay_gate"]["bias"] = np.full(FEATURES, 1e4)
    y, state, sown = run64(layer, params, x)
    assert np.isfinite(y).all() and np.isfinite(state.memory).all()
    assert sown["mean_decay"] < 1e-60


def test_rwkv6_starts_as_its_authors_do():
    params = init(RWKV6(64, heads=2, layer_index=2, num_layers=3))
    place = np.arange(64) / 63
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    close(params["decay_gate"]["bias"], -6 + 5 * place**2)
    zigzag = np.tile([0.0, 0.1, -0.1], 22)[:64]
    close(params["bonus"].reshape(-1), 1 - place + zigzag)
    powers = np.array([0.5, 1, 1, 1, 0.5]) / 3
    later = np.array([0, 0, 0.3, 0, 0])
    close(params["shift_bias"], 1 - (np.arange(64) / 64) ** powers[:, None] - later[:, None])
    close(params["first_shift_bias"], 1 - (np.arange(64) / 64) ** (1 / 3))
    assert not params["shift_in"]["kernel"].any()
    assert 0.0098 < np.abs(params["shift_out"]["kernel"]).max() <= 0.01


def test_rwkv7_that_removes_nothing_is_a_decaying_sum():
    """Rate 0: S = Diag(w) S + k v^T, the memory of gated linear attention."""
    layer = RWKV7(FEATURES, heads=2)
    params, x = random_params(layer), inputs()
    params["rate_gate"]["bias"] = np.full(FEATURES, -90.0)
    params["rate_gate"]["out"]["kernel"] *= 0
    params["key_scale"] *= 0.5
    _, state, _ = run64(layer, params, x)
    for row, u in enumerate(x):
        mixed = [u + (before(u) - u) * mu for mu in params["shift_bias"]]
        raw = sigmoid(low_rank(params["decay_gate"], mixed[1], np.tanh))
        decay = np.exp(-np.exp(-0.5) * raw).reshape(-1, 2, 8)
        key = mixed[2] @ params["key"]["kernel"] * (1 - params["key_scale"])
        value = (mixed[3] @ params["value"]["kernel"]).reshape(-1, 2, 8)
        left = np.append(np.cumprod(decay[::-1], axis=0)[::-1][1:], np.ones((1, 2, 8)), axis=0)
        want = np.einsum("thk,thv->hkv", left * key.reshape(-1, 2, 8), value)
        np.testing.assert_allclose(state.memory[row], want, rtol=0, atol=1e-9)


def test_rwkv7_transitions_contract():
    """A single step may enlarge the memory a little; a product of many does not."""
    layer = RWKV7(FEATURES, heads=1)
    params, x = random_params(layer), inputs(time=400, batch=1)
    params["value"]["kernel"] *= 0
    state = layer.init_state(1).replace(memory=np.eye(FEATURES)[None, None])
    _, state, _ = run64(layer, params, x, state)
    assert np.isfinite(state.memory).all() and np.abs(state.memory).max() < 1e-6


def test_rwkv7_starts_as_its_authors_do():
    layer = RWKV7(64, heads=2, layer_index=1, num_layers=3)
    params = init(layer)
    place, linear = np.arange(64) / 63, np.arange(64) / 63 - 0.5
    zigzag = (np.arange(64) % 32 - 15.5) / 15.5
    zigzag *= abs(zigzag)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    close(params["decay_gate"]["bias"], -6 + 6 * place ** (1 + 0.5**0.3) + 0.5 + 2.5 * zigzag)
    close(params["rate_gate"]["bias"], -0.19 + 0.3 * zigzag + 0.4 * linear)
    close(params["remove_scale"], 0.71 - 0.1 * linear)
    close(params["key_scale"], 1.02)
    close(params["bonus"], -0.04)
    powers = np.array([0.2, 0.9, 0.7, 0.7, 0.9, 0.2]) * (1 - 1 / 3)
    close(params["shift_bias"], 1 - (np.arange(64) / 64) ** powers[:, None])
    for name, bound in {"query": 0.5 / 8, "key": 0.05 / 8, "value": 0.5 / 8, "output": 0}.items():
        kernel = np.abs(params[name]["kernel"])
        assert 0.98 * bound <= kernel.max() <= bound
    out = np.asarray(params["decay_gate"]["out"]["kernel"])
    close(out @ out.T, 0.01 * np.eye(32))
    assert not params["decay_gate"]["in"]["kernel"].any()
    alone = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 1, 64)), None, None, {})
    assert "value_gate" not in alone["params"]
    shared = {"rwkv7_value": jnp.zeros((1, 1, 2, 32))}
    later = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 1, 64)), None, None, shared)
    assert later["params"]["value_gate"]["in"]["kernel"].shape == (64, 32)


def test_defaults():
    state = RWKV7(64).init_state(3)
    assert state.memory.shape == (3, 4, 16, 16) and state.conv.shape == (3, 1, 64)
    low = 3 * 2 * 64 * 32  # decay, rate and gate
    assert count(RWKV7(64), 64) == 4 * 64 * 64 + low + (2 + 6 + 2 + 1 + 2) * 64
    low = 2 * 5 * 64 * 32 + 2 * 64 * 64  # shift, decay
    assert count(RWKV6(64), 64) == 5 * 64 * 64 + low + (5 + 1 + 1 + 2 + 1) * 64
    assert RWKV7(1024).rank_of("gate_rank", 5.0) == 160


@pytest.mark.parametrize("layer", [RWKV6(32), RWKV7(32)])
def test_dtypes(layer):
    assert check_dtypes(layer).memory.dtype == np.float32


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (RWKV7(16, heads=3), "heads: features 16 must be a multiple of it, got 3"),
        (RWKV7(16, decay_rank=0), "decay_rank: .* got 0"),
        (RWKV6(16, shift_rank=0), "shift_rank: .* got 0"),
        (RWKV6(16, decay_rank=-1), "decay_rank: .* got -1"),
        (RWKV7(16, layer_index=2, num_layers=2), "layer_index: .* less than .* 2"),
    ],
)
def test_bad_options(layer, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), inputs())

"""mLSTM against its equations, step by step, and its gradient against theirs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import MLSTM
from memseq.pallas_kernels import linear_attention
from memseq.pallas_kernels import mlstm as mlstm_memory
from memseq.pallas_kernels.mlstm.api import one_after_another
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
from tests.pallas_kernels.harness import assert_close


def mlstm(layer, params, x):
    """C = f C + i k v^T, n = f n + i k, h = C^T q / max(|n . q|, 1); nothing stabilised."""
    heads = layer.heads
    query, key, value = query_key_value(params, x, heads, heads)
    gates = []
    for name in ("input_gate", "forget_gate"):
        g = x @ params[name]["kernel"] + params[name]["bias"]
        gates.append(g if layer.gate_cap is None else layer.gate_cap * np.tanh(g / layer.gate_cap))
    write, keep = np.exp(gates[0]), sigmoid(gates[1])
    keys = key.shape[-1]
    memory, norm = np.zeros((heads, keys, value.shape[-1])), np.zeros((heads, keys))
    out = np.zeros(value.shape)
    for t in range(len(x)):
        for h in range(heads):
            memory[h] = keep[t, h] * memory[h] + write[t, h] * np.outer(key[t, h], value[t, h])
            norm[h] = keep[t, h] * norm[h] + write[t, h] * key[t, h]
            q = query[t, h] / np.sqrt(keys)
            out[t, h] = memory[h].T @ q / max(abs(norm[h] @ q), 1)
    return read_out(params, x, out, sigmoid), None, {"mean_decay": keep}


CASES = {
    "default": {},
    "sizes, conv": {"heads": 2, "key_dim": 3, "value_dim": 5, "conv_width": 3},
    "bare": {"output_gate": False, "output_norm": False, "gate_cap": None},
}


@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_transcription(options, ids):
    check_transcription(MLSTM(FEATURES, **options), mlstm, ids)


def example(gate=1.0, time=33, heads=3, key_dim=4, value_dim=5):
    rng = np.random.default_rng(0)
    query, key = (rng.normal(size=(2, time, heads, key_dim)) for _ in range(2))
    value = rng.normal(size=(2, time, heads, value_dim))
    log_input, forget = (gate * rng.normal(size=(2, time, heads)) for _ in range(2))
    memory = rng.normal(size=(2, heads, key_dim, value_dim + 1))
    return query, key, value, log_input, forget, memory, rng.uniform(0, 2, size=(2, heads))


def cell(query, key, value, log_input, forget, memory, level, implementation="chunked"):
    """(out, memory in true scale)."""
    out, (memory, last) = mlstm_memory(
        query,
        key,
        value,
        log_input,
        jax.nn.log_sigmoid(forget),
        initial_state=(memory, level),
        chunk_size=8,
        implementation=implementation,
    )
    return out, memory * jnp.exp(last)[..., None, None]


def plain_cell(query, key, value, log_input, forget, memory, level):
    """The equations themselves, one step after another: what autodiff differentiates."""
    value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], -1)

    def step(memory, inputs):
        q, k, v, i, f = inputs
        memory = jax.nn.sigmoid(f)[..., None, None] * memory
        memory += jnp.exp(i)[..., None, None] * k[..., :, None] * v[..., None, :]
        read = jnp.einsum("bhkv,bhk->bhv", memory, q) / np.sqrt(q.shape[-1])
        return memory, read[..., :-1] / jnp.maximum(jnp.abs(read[..., -1:]), 1)

    start = memory * jnp.exp(level)[..., None, None]
    by_time = (jnp.moveaxis(a, 1, 0) for a in (query, key, value, log_input, forget))
    memory, out = jax.lax.scan(step, start, tuple(by_time))
    return jnp.moveaxis(out, 0, 1), memory


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_the_gradient_is_complete(normed, implementation):
    """Against autodiff of the plain equations, with a cotangent on the last state too."""
    arrays = example()

    def loss(cell, *arrays):
        out, memory = cell(*arrays)
        if normed:
            out = out / jnp.sqrt(jnp.mean(out**2, -1, keepdims=True) + 1e-6)
        return jnp.sum(jnp.sin(3 * out)) + jnp.sum(jnp.cos(memory))

    with jax.enable_x64(True):
        own = functools.partial(cell, implementation=implementation)
        wrt = tuple(range(6))
        got = jax.jit(jax.grad(functools.partial(loss, own), wrt))(*arrays)
        want = jax.jit(jax.grad(functools.partial(loss, plain_cell), wrt))(*arrays)
    for a, b in zip(got, want, strict=True):
        assert np.linalg.norm(b) > 0.1
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_forms_agree_with_wide_gates():
    """Gates up to +-20: chunked, reference and the plain equations."""
    arrays = example(gate=7.0)
    with jax.enable_x64(True):
        want, want_memory = jax.jit(plain_cell)(*arrays)
        for form in ("chunked", "reference"):
            out, memory = jax.jit(functools.partial(cell, implementation=form))(*arrays)
            np.testing.assert_allclose(out, want, rtol=0, atol=1e-12)
            size = np.abs(want_memory).max()
            np.testing.assert_allclose(memory, want_memory, rtol=0, atol=1e-12 * size)
    narrow = [jnp.asarray(a, jnp.float32) for a in arrays]
    out, _ = jax.jit(cell)(*narrow)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_the_stabiliser_is_a_gauge():
    """(C e^d, n e^d, m - d) is the same memory."""
    layer = MLSTM(FEATURES)
    params, x = random_params(layer), inputs()
    rng = np.random.default_rng(5)
    memory = rng.normal(size=(2, 4, 4, 5))
    level = rng.uniform(0, 3, size=(2, 4))
    found = []
    for shift in (0.0, 4.0, -30.0):
        state = layer.init_state(2).replace(
            memory=memory * np.exp(-shift), stabilizer=level + shift
        )
        y, after, _ = run64(layer, params, x, state)
        scale = np.exp(np.asarray(after.stabilizer))[..., None, None]
        found.append((y, np.asarray(after.memory) * scale))
    for y, memory in found[1:]:
        np.testing.assert_allclose(y, found[0][0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(memory, found[0][1], rtol=1e-12, atol=1e-12)


def test_steps_of_the_stabiliser_are_associative():
    """Random triples, with and without a restart in each place."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        for restarts in np.ndindex(2, 2, 2):
            steps = [
                (np.where(restart, -np.inf, -rng.uniform(0, 3, 50)), rng.uniform(0, 3, 50))
                for restart in restarts
            ]
            a, b, c = ([jnp.asarray(x) for x in step] for step in steps)
            left = one_after_another(one_after_another(a, b), c)
            right = one_after_another(a, one_after_another(b, c))
            for x, y in zip(left, right, strict=True):
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)


def test_with_open_gates_it_is_linear_attention():
    """f = 1 and i = 1: the sum of k v^T, read over max(|n . q|, 1)."""
    query, key, value, log_input, forget, memory, level = example()
    with jax.enable_x64(True):
        out, _ = jax.jit(cell)(
            query, key, value, 0 * log_input, 0 * forget + 800, 0 * memory, 0 * level
        )
        ones = jnp.concatenate([value, np.ones_like(value[..., :1])], -1)
        read, _ = linear_attention(query, key, ones, implementation="reference")
        want = read[..., :-1] / np.maximum(np.abs(read[..., -1:]), 1)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-12)


def test_heads_can_share_keys():
    """And gates of 16 bits do not make a 16-bit memory or stabiliser."""
    query, key, value, *gates = map(np.float32, example(heads=4)[:5])
    query, key = query[:, :, :2], key[:, :, :2]
    gates = [jnp.asarray(gate, jnp.bfloat16) for gate in gates]
    shared = mlstm_memory(query, key, value, *gates)
    repeated = mlstm_memory(*(x.repeat(2, axis=2) for x in (query, key)), value, *gates)
    assert_close(shared, repeated, 1e-6)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(shared))


@pytest.mark.parametrize("size", [100.0, 1000.0])
def test_no_gate_overflows(size):
    """Both gates at +-size, mixed, in float32: values and gradients finite."""
    query, key, value, log_input, forget, memory, level = (
        jnp.asarray(a, jnp.float32) for a in example()
    )
    log_input, forget = size * jnp.sign(log_input), size * jnp.sign(forget)

    def loss(*arrays):
        out, memory = cell(*arrays, memory=0 * example()[5].astype(np.float32), level=0 * level)
        return jnp.sum(out**2), out

    wrt = (0, 1, 2, 3, 4)
    (_, out), found = jax.jit(jax.value_and_grad(loss, wrt, has_aux=True))(
        query, key, value, log_input, forget
    )
    assert np.isfinite(out).all() and all(np.isfinite(a).all() for a in found)


def test_a_reset_is_a_mask():
    """The largest gates before a border leave nothing behind it; a gate of -25 would."""
    layer = MLSTM(FEATURES, output_norm=False, output_gate=False)
    params, x = random_params(layer), inputs()
    params["input_gate"]["kernel"] *= 0
    params["input_gate"]["bias"] = np.full(4, 15.0)
    ids = np.repeat([[0] * 10 + [1] * 11], 2, axis=0).astype(np.int32)
    y, _, _ = run64(layer, params, x, segment_ids=ids)
    other = np.concatenate([9 * x[:, :10], x[:, 10:]], axis=1)
    np.testing.assert_array_equal(
        y[:, 10:], run64(layer, params, other, segment_ids=ids)[0][:, 10:]
    )


def test_starts_and_defaults():
    layer = MLSTM(32)
    params = init(layer)
    np.testing.assert_array_equal(params["input_gate"]["bias"], -10)
    np.testing.assert_allclose(params["forget_gate"]["bias"], [3, 4, 5, 6])
    np.testing.assert_array_equal(params["forget_gate"]["kernel"], 0)
    assert layer.init_state(3).memory.shape == (3, 4, 8, 9)
    assert count(layer, 32) == 5 * 32 * 32 + 2 * (4 * 32 + 4) + 8


def test_dtypes():
    state = check_dtypes(MLSTM(32, conv_width=3))
    assert state.memory.dtype == jnp.float32 and state.stabilizer.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gate_cap": 0.0}, "gate_cap: .* got 0.0"), ({"heads": 3}, "heads: .* got heads 3")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        count(MLSTM(FEATURES, **options))

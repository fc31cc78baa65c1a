"""`path_attention`: its forms against the equation; caches, limits, memory, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.pallas_kernels import attention, path_attention
from memseq.pallas_kernels.path_attention.shapes import Shape, example
from tests.pallas_kernels.harness import (
    assert_close,
    assert_same,
    check_16_bit,
    check_agreement,
    correlated_keys,
    packed_ids,
    with_gradients,
)


def build(queries, held=0, batch=2, heads=4, key_heads=2, sinks=False, forget=False, **options):
    """Inputs and options; `held` keys before the queries' own, of the first segment or of none."""
    rng = np.random.default_rng(0)
    direction = correlated_keys(rng, batch, queries, key_heads, 5, 0.5)
    inputs = {
        "query": rng.normal(size=(batch, queries, heads, 5)),
        "key": rng.normal(size=(batch, held + queries, key_heads, 5)),
        "value": rng.normal(size=(batch, held + queries, key_heads, 3)),
        "direction": direction / np.linalg.norm(direction, axis=-1, keepdims=True),
        "beta": rng.choice([0.0, 0.3, 1.0, 2.0], size=(batch, queries, key_heads)),
    }
    if sinks:
        inputs["sinks"] = rng.normal(size=heads)
    if forget:
        inputs["log_forget"] = -rng.exponential(0.2, size=(batch, held + queries, heads))
    if held:
        positions = np.tile(np.arange(queries, dtype=np.int32), (batch, 1))
        before = np.tile(rng.permutation(held).astype(np.int32), (batch, 1))
        options["query_positions"] = positions + held
        options["key_positions"] = np.concatenate([before, positions + held], axis=1)
        ids = np.repeat([[0, 1]], [queries // 2, queries - queries // 2], axis=1)
        ids = np.repeat(ids, batch, axis=0).astype(np.int32)
        ids[:, 3::7] = -1
        options["query_segments"] = ids
        there = rng.choice([0, -1], size=(batch, held)).astype(np.int32)
        options["key_segments"] = np.concatenate([there, ids], axis=1)
    return inputs, options, rng


def packed(queries, longest, **options):
    inputs, options, rng = build(queries, batch=3, **options)
    options["query_segments"] = packed_ids(rng, 3, queries, longest)
    return inputs, options, rng


CASES = {
    "one query": build(1, chunk_size=4),
    "chunks": build(70, batch=1, sinks=True, forget=True, window=50, sink_tokens=2, chunk_size=16),
    "segments and padding": packed(45, 20, chunk_size=8, key_heads=4, scale=1.0),
    "keys from before": build(21, 12, forget=True, key_heads=1, chunk_size=8),
}


def oracle(
    query,
    key,
    value,
    direction,
    beta,
    *,
    scale=None,
    window=None,
    sinks=None,
    sink_tokens=0,
    log_forget=None,
    query_positions=None,
    key_positions=None,
    query_segments=None,
    key_segments=None,
):
    """Each query walks back: it meets a step's key, then takes that step's reflection."""
    batch, queries, heads, dim = query.shape
    keys = key.shape[1]
    held, group = keys - queries, heads // key.shape[2]
    scale = dim**-0.5 if scale is None else scale
    key_ids, moving = np.zeros((batch, keys), int), np.ones((batch, queries), bool)
    if query_positions is None:
        query_positions = key_positions = np.tile(np.arange(queries), (batch, 1))
    if query_segments is not None:
        moving = query_segments >= 0
        key_ids = key_segments
        if key_segments is None:  # a segment ends where the id changes
            key_ids = np.full((batch, keys), -1)
            for b in range(batch):
                index, last = 0, None
                for t in np.flatnonzero(moving[b]):
                    index += last is not None and query_segments[b, t] != last
                    key_ids[b, t], last = index, query_segments[b, t]
    query_ids = key_ids[:, held:]
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, i, h in np.ndindex(batch, queries, heads):
        if query_ids[b, i] < 0:
            continue
        u, scores = query[b, i, h], {}
        for j in range(held + i, -1, -1):
            distance = query_positions[b, i] - key_positions[b, j]
            near = window is None or distance < window or key_positions[b, j] < sink_tokens
            if key_ids[b, j] == query_ids[b, i] and near:
                between = (key_ids[b] == key_ids[b, j]) & (key_positions[b] > key_positions[b, j])
                between &= key_positions[b] <= query_positions[b, i]
                forgotten = 0 if log_forget is None else log_forget[b, between, h].sum()
                scores[j] = scale * u @ key[b, j, h // group] + forgotten
            if j >= held and moving[b, j - held]:
                w = direction[b, j - held, h // group]
                u = u - beta[b, j - held, h // group] * (u @ w) * w
        weights = np.exp(list(scores.values()))
        total = weights.sum() + (0 if sinks is None else np.exp(sinks[h]))
        out[b, i, h] = weights @ value[b, list(scores), h // group] / total
    after = np.where((key_ids >= 0)[..., None, None], key, 0)
    for b, t, h in np.ndindex(batch, queries, key.shape[2]):
        if moving[b, t]:
            w = direction[b, t, h]
            before = after[b, : held + t, h]
            before -= beta[b, t, h] * np.outer(before @ w, w)
    return out, after


@pytest.mark.slow  # by default tests/layers hold the layer against its equation, and its forms
@pytest.mark.parametrize("name", CASES)
def test_forms_agree(name):
    inputs, options, rng = CASES[name]
    check_agreement(path_attention, oracle, inputs, options, rng)


@pytest.mark.slow
def test_16_bit_inputs():
    inputs, options, rng = packed(40, 30, sinks=True, chunk_size=16)
    check_16_bit(path_attention, inputs, options, rng)


@pytest.mark.slow
def test_still_keys_give_softmax_attention():
    inputs, _, _ = build(20, forget=True, sinks=True)
    inputs["beta"] *= 0
    still = {k: x for k, x in inputs.items() if k not in ("direction", "beta")}

    @jax.jit
    def both(moving, still):
        options = {"window": 7, "implementation": "chunked"}
        return path_attention(**moving, **options, chunk_size=8), attention(**still, **options)

    with jax.enable_x64(True):
        (out, keys), want = both(inputs, still)
    assert_close(out, want, 1e-12)
    assert_same(keys, inputs["key"])


def test_a_reflection_is_met_by_a_reflected_query():
    """beta = 2 along one axis: at every step that part of a score changes its sign."""
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 1, 9, 1, 3))
    direction = np.zeros((1, 9, 1, 3))
    direction[..., 0] = 1
    value = np.eye(9)[None, :, None]
    with jax.enable_x64(True):
        call = jax.jit(lambda *xs: path_attention(*xs, scale=1.0, implementation="reference"))
        out, _ = call(query, key, value, direction, np.full((1, 9, 1), 2.0))
    for i in range(9):
        signs = np.stack([(-1.0) ** (i - np.arange(i + 1)), *np.ones((2, i + 1))], axis=1)
        weights = np.exp((query[0, i, 0] * key[0, : i + 1, 0] * signs).sum(1))
        assert_close(out[0, i, 0, : i + 1], weights / weights.sum(), 1e-12)


@pytest.mark.parametrize("pieces", [(16, 5), pytest.param((1, 1, 18, 1), marks=pytest.mark.slow)])
def test_keys_of_one_call_are_held_for_the_next(pieces):
    """Calls of 16 steps and more are chunked, shorter ones take the reference."""
    inputs, _, _ = build(21, forget=True)
    positions = np.tile(np.arange(21, dtype=np.int32), (2, 1))

    @jax.jit
    def stream(x):
        keys, outs, start = jnp.zeros((2, 0, 2, 5)), [], 0
        for length in pieces:
            now, so_far = np.s_[:, start : start + length], np.s_[:, : start + length]
            out, keys = path_attention(
                x["query"][now],
                jnp.concatenate([keys, x["key"][now]], axis=1),
                x["value"][so_far],
                x["direction"][now],
                x["beta"][now],
                log_forget=x["log_forget"][so_far],
                query_positions=positions[now],
                key_positions=positions[so_far],
                chunk_size=8,
            )
            outs.append(out)
            start += length
        return path_attention(**x, chunk_size=8), (jnp.concatenate(outs, axis=1), keys)

    with jax.enable_x64(True):
        whole, streamed = stream(inputs)
    assert_close(streamed, whole, 1e-12)


@pytest.mark.slow
def test_the_future_and_other_segments_change_nothing():
    """Bitwise, and no gradient reaches them."""
    inputs, _, rng = build(40, batch=1)
    inputs = {k: x.astype(np.float32) for k, x in inputs.items()}
    ids = np.repeat([[0, 1, 2]], [11, 14, 15], axis=1).astype(np.int32)

    def call(x):
        return path_attention(**x, query_segments=ids, chunk_size=8, implementation="chunked")[0]

    run = jax.jit(with_gradients(call))
    cotangent = rng.normal(size=(1, 40, 4, 3)).astype(np.float32)
    cotangent[:, :11], cotangent[:, 20:] = 0, 0
    out, gradients = run(inputs, cotangent)
    other = {k: x.copy() for k, x in inputs.items()}
    for x in other.values():
        x[:, :11] = rng.normal(size=x[:, :11].shape)
        x[:, 20:] = rng.normal(size=x[:, 20:].shape)
    changed, others = run(other, cotangent)
    assert_same(out[:, 11:20], changed[:, 11:20])
    assert (np.asarray(out)[:, 20:25] != np.asarray(changed)[:, 20:25]).any()
    for name in inputs:
        assert_same(gradients[name][:, 11:20], others[name][:, 11:20], name)
        for elsewhere in (np.s_[:, :11], np.s_[:, 20:]):
            assert_same(gradients[name][elsewhere], np.zeros_like(gradients[name][elsewhere]))


@pytest.mark.slow
def test_memory_grows_linearly_with_time():
    """Four times the time, four times the memory, backward pass included."""

    def temporary_bytes(time):
        shapes = jax.eval_shape(lambda: example(Shape(1, time, 1, 2, 8), jax.random.key(0)))
        loss = jax.grad(lambda x: path_attention(**x, implementation="chunked")[0].sum())
        compiled = jax.jit(loss).lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(2048) < 5 * temporary_bytes(512)

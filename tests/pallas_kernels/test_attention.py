"""`attention`: its forms against the equations; masks, caches, forgetting, memory, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.pallas_kernels import attention
from tests.pallas_kernels import oracles
from tests.pallas_kernels.harness import (
    assert_close,
    assert_same,
    check_16_bit,
    check_agreement,
    check_transforms,
    packed_ids,
    with_gradients,
)


def build(queries, keys=None, batch=2, heads=4, key_heads=2, sinks=False, forget=False, **options):
    """Inputs and options. With `keys`, positions are drawn, and so are the segments."""
    rng = np.random.default_rng(0)
    length = queries if keys is None else keys
    inputs = {
        "query": rng.normal(size=(batch, queries, heads, 5)),
        "key": rng.normal(size=(batch, length, key_heads, 5)),
        "value": rng.normal(size=(batch, length, key_heads, 3)),
    }
    if sinks:
        inputs["sinks"] = rng.normal(size=heads)
    if forget:
        inputs["log_forget"] = np.choose(
            rng.integers(3, size=(batch, length, heads)),
            [np.full((batch, length, heads), -20.0), 0.0, -0.3],
        )
    if keys is not None:
        for name, size in (("query", queries), ("key", keys)):
            options[f"{name}_positions"] = rng.integers(12, size=(batch, size), dtype=np.int32)
            options[f"{name}_segments"] = packed_ids(rng, batch, size, 5)
    return inputs, options, rng


def packed(queries, longest, **options):
    inputs, options, rng = build(queries, batch=3, **options)
    options["query_segments"] = packed_ids(rng, 3, queries, longest)
    return inputs, options, rng


CASES = {
    "one query": build(1),
    "two queries, everything": build(2, sinks=True, forget=True, window=1, sink_tokens=1),
    "not causal": build(65, causal=False, heads=3, key_heads=3, scale=1.0),
    "window": build(64, window=7, sink_tokens=3, heads=4, key_heads=1),
    "segments and padding": packed(97, 20, sinks=True, window=9, sink_tokens=2),
    "forgetting in segments": packed(63, 30, forget=True),
    "blocks, one short": build(500, batch=1, heads=1, key_heads=1, sinks=True, window=100),
    "any positions": build(30, 21, batch=3, sinks=True),
    "any positions, not causal": build(9, 33, batch=3, forget=True, causal=False, window=4),
}


def oracle(**arguments):
    """`oracles.attention` with the defaults that the operation has for positions and segments."""
    batch, queries = arguments["query"].shape[:2]
    ids = arguments.get("query_segments")
    if arguments.get("query_positions") is None:
        positions = np.tile(np.arange(queries), (batch, 1))
        if ids is not None:
            segments = np.full(ids.shape, -1)
            for b in range(batch):
                count, index, last = 0, 0, None
                for t in np.flatnonzero(ids[b] >= 0):
                    if last is not None and ids[b, t] != last:
                        count, index = 0, index + 1
                    positions[b, t], segments[b, t], last = count, index, ids[b, t]
                    count += 1
            arguments["query_segments"] = arguments["key_segments"] = segments
        arguments["query_positions"] = arguments["key_positions"] = positions
    return oracles.attention(**arguments)


@pytest.mark.parametrize("name", CASES)
def test_forms_agree(name):
    inputs, options, rng = CASES[name]
    check_agreement(attention, oracle, inputs, options, rng)


def test_16_bit_inputs():
    inputs, options, rng = packed(200, 90, sinks=True)
    check_16_bit(attention, inputs, options, rng)


def test_forgetting_keeps_its_digits_over_a_long_time():
    """Between neighbours the sum of gates is exact, however much was forgotten before them."""
    time = 4000
    log_forget = -np.random.default_rng(0).exponential(0.7, size=(1, time, 1)).astype(np.float32)
    value = np.random.default_rng(1).normal(size=(1, time, 1, 2)).astype(np.float32)
    flat = np.zeros((1, time, 1, 1), np.float32)
    positions = np.arange(time, dtype=np.int32)[None]
    last = slice(time - 8, None)
    out = jax.jit(
        lambda *arrays: attention(
            *arrays,
            log_forget=log_forget,
            query_positions=positions[:, last],
            key_positions=positions,
        )
    )(flat[:, last], flat, value)
    sums = np.cumsum(log_forget[0, :, 0].astype(np.float64))
    for i, t in enumerate(range(time - 8, time)):
        weights = np.exp(sums[t] - sums[: t + 1])
        expected = weights @ value[0, : t + 1, 0] / weights.sum()
        np.testing.assert_allclose(out[0, i, 0], expected, rtol=1e-5, atol=1e-6)


def test_memory_grows_linearly_with_time():
    """Four times the time, four times the memory: the matrix of scores is never held."""

    def temporary_bytes(time):
        inputs, _, rng = build(8, batch=1, heads=2, key_heads=2)
        shapes = {
            name: jax.ShapeDtypeStruct((1, time, *x.shape[2:]), jnp.float32)
            for name, x in inputs.items()
        }
        loss = jax.grad(lambda x: attention(**x, window=50, implementation="chunked").sum())
        compiled = jax.jit(loss).lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(1024), temporary_bytes(4096)
    assert long < 5 * short
    assert long < 4 * 2 * 4096**2 / 2  # float32 scores of two heads, halved


@pytest.fixture(scope="module")
def grad_call():
    """The chunked form with its gradients, compiled once; two rows, two blocks."""
    inputs, _, rng = build(150, batch=2, forget=True, sinks=True)
    inputs = {k: x.astype(np.float32) for k, x in inputs.items()}

    def run(inputs, cotangent, ids):
        call = with_gradients(
            lambda x: attention(**x, query_segments=ids, window=40, implementation="chunked")
        )
        return call(inputs, cotangent)

    cotangent = rng.normal(size=(2, 150, 4, 3)).astype(np.float32)
    return jax.jit(run), inputs, cotangent, np.repeat([[0, 1]], 75, axis=1).repeat(2, axis=0)


def changed(inputs, where):
    """`inputs` with other values at [row, time] of every array that has both axes."""
    rng = np.random.default_rng(1)
    inputs = {k: x.copy() for k, x in inputs.items()}
    for x in inputs.values():
        if x.ndim > 2:
            x[where] = -np.abs(rng.normal(size=x[where].shape))
    return inputs


def test_the_future_changes_nothing(grad_call):
    call, inputs, cotangent, ids = grad_call
    for now in (100, 128):
        cotangent = cotangent.copy()
        cotangent[:, now:] = 0
        out, gradients = call(inputs, cotangent, ids * 0)
        later = changed(inputs, np.s_[:, now:])
        other, others = call(later, cotangent, ids * 0)
        assert (np.asarray(out)[:, now:] != np.asarray(other)[:, now:]).any()
        assert_same(other[:, :now], out[:, :now])
        assert_same(others["sinks"], gradients["sinks"])
        for name in ("query", "key", "value", "log_forget"):
            assert_same(others[name][:, :now], gradients[name][:, :now], name)
            assert_same(gradients[name][:, now:], np.zeros_like(gradients[name][:, now:]), name)


def test_rows_of_a_batch_are_alone(grad_call):
    call, inputs, cotangent, ids = grad_call
    result = call(inputs, cotangent, ids)
    other = call(changed(inputs, np.s_[1:]), cotangent, ids)
    for before, after in zip(jax.tree.leaves(result), jax.tree.leaves(other), strict=True):
        if before.ndim > 2:
            assert_same(after[:1], before[:1])


def test_segments_are_alone(grad_call):
    call, inputs, cotangent, ids = grad_call
    out, _ = call(inputs, cotangent, ids)
    # each segment as a row of its own
    separate = jax.jit(
        with_gradients(lambda x: attention(**x, window=40, implementation="chunked"))
    )
    for segment, part in enumerate((slice(0, 75), slice(75, 150))):
        alone = {k: x[:, part] if x.ndim > 2 else x for k, x in inputs.items()}
        expected = separate(alone, cotangent[:, part])
        assert_close(out[:, part], expected[0], 2e-5)
        _, gradients = call(inputs, np.where((ids == segment)[..., None, None], cotangent, 0), ids)
        for name in ("query", "key", "value", "log_forget"):
            assert_close(gradients[name][:, part], expected[1][name], 1e-4, name)
            others = np.delete(gradients[name], np.r_[part], axis=1)
            assert_same(others, np.zeros_like(others), name)


def test_a_cache_in_any_order_gives_what_the_whole_sequence_gives():
    """Tokens come one by one into a ring of slots: those not yet written are padding."""
    inputs, _, rng = build(12, batch=2, forget=True)
    inputs = {k: jnp.asarray(x, jnp.float32) for k, x in inputs.items()}
    whole = jax.jit(lambda x: attention(**x, window=5))(inputs)
    slots = rng.permutation(12)
    position = np.full((2, 12), 0, np.int32)
    cache = {k: np.zeros_like(x) for k, x in inputs.items() if k != "query"}
    segments = np.full((2, 12), -1, np.int32)

    @jax.jit
    def read(query, cache, positions, segments, t):
        now = jnp.full((2, 1), t, jnp.int32)
        return attention(
            query,
            **cache,
            window=5,
            query_positions=now,
            key_positions=positions,
            query_segments=jnp.zeros_like(now),
            key_segments=segments,
        )

    for t, slot in enumerate(slots):
        for name, x in cache.items():
            x[:, slot] = inputs[name][:, t]
        position[:, slot], segments[:, slot] = t, 0
        out = read(inputs["query"][:, t : t + 1], cache, position, segments, t)
        assert_close(out[:, 0], whole[:, t], 2e-5)


def test_a_query_that_sees_nothing():
    """Zero, with and without a sink, and no gradient: neither of the hidden values nor NaN."""
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 1, 4, 2, 3)).astype(np.float32)
    ahead = np.arange(4, dtype=np.int32)[None] + 4
    for form in ("reference", "chunked"):
        for sinks in (None, jnp.zeros(2)):

            def call(x, sinks=sinks, form=form):
                return attention(
                    *x,
                    sinks=sinks,
                    query_positions=ahead - 4,
                    key_positions=ahead,
                    implementation=form,
                )

            out, gradients = jax.jit(with_gradients(call))((query, key, value), np.ones_like(query))
            assert_same((out, gradients), jax.tree.map(np.zeros_like, (out, gradients)))


def test_padding_may_hold_anything():
    inputs, _, _ = build(20, batch=1)
    ids = np.repeat([[0, -1, 0, -1]], 5, axis=1).astype(np.int32)
    call = jax.jit(with_gradients(lambda x: attention(**x, query_segments=ids)))
    cotangent = np.where((ids >= 0)[..., None, None], np.ones((1, 20, 4, 3)), 0)
    clean, gradients = call(inputs, cotangent)
    for name in ("key", "value"):
        inputs[name] = np.where((ids < 0)[..., None, None], np.nan, inputs[name])
    assert_same(call(inputs, cotangent), (clean, gradients))
    assert_same(np.asarray(clean)[ids < 0], np.zeros_like(np.asarray(clean)[ids < 0]))


def test_an_id_that_comes_back_is_a_new_segment_unless_keys_have_ids():
    inputs, _, _ = build(4, batch=1)
    ids = np.array([[5, 5, 2, 5]], np.int32)
    renamed = np.array([[0, 0, 1, 2]], np.int32)
    assert_same(
        attention(**inputs, query_segments=ids), attention(**inputs, query_segments=renamed)
    )
    positions = np.arange(4, dtype=np.int32)[None]
    options = {"query_positions": positions, "key_positions": positions}
    compared = attention(**inputs, **options, query_segments=ids, key_segments=ids)
    assert (np.asarray(compared[:, 3] != attention(**inputs, query_segments=ids)[:, 3])).any()


def test_transforms():
    inputs, options, rng = build(20, forget=True, sinks=True, window=6)

    def call(form, x):
        return attention(**x, **options, implementation=form)

    check_transforms(call, ("reference", "chunked"), inputs, ("sinks",), rng)

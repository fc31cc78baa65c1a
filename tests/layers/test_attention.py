"""Softmax attention against its equations, and its cache against the parallel call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import (
    DeltaNet,
    ForgettingAttention,
    SlidingWindowAttention,
    SoftmaxAttention,
)
from tests.layers.harness import (
    FEATURES,
    IDS,
    TIME,
    check_dtypes,
    check_transcription,
    count,
    init,
    inputs,
    random_params,
    read_out,
    rms_norm,
    run64,
    short_conv,
)


def turn(x, position, base):
    """Rotary positions as complex numbers: the pair (x_i, x_{i + dim/2}) is one."""
    half = len(x) // 2
    angle = position * base ** (-np.arange(half) / half)
    pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag])


def softmax_attention(layer, params, x):
    """out_t = sum_{j<=t} softmax_j(q_t . k_j / sqrt(dim)) v_j, each query with its own softmax."""
    parts = [x @ params[name]["kernel"] for name in ("query", "key", "value")]
    if "conv" in params:
        mixed = short_conv(np.concatenate(parts, axis=1), params["conv"]["kernel"])
        parts = np.split(mixed, np.cumsum([part.shape[1] for part in parts])[:2], axis=1)
    dim = parts[0].shape[1] // layer.heads
    query, key, value = (part.reshape(len(x), -1, dim) for part in parts)
    group = layer.heads // key.shape[1]

    def prepare(vector, position, norm):
        if layer.qk_norm:
            vector = rms_norm(vector, params[norm]["scale"])
        return turn(vector, position, layer.rope_base) if layer.rope else vector

    out = np.zeros(query.shape)
    for t in range(len(x)):
        window = len(x) if layer.window is None else layer.window
        seen = [j for j in range(t + 1) if t - j < window or j < layer.sink_tokens]
        for h in range(layer.heads):
            q = prepare(query[t, h], t, "query_norm")
            keys = [prepare(key[j, h // group], j, "key_norm") for j in seen]
            scores = np.array([q @ k / np.sqrt(dim) for k in keys])
            if layer.forget_gate:
                gate = x @ params["forget"]["kernel"] + params["forget"]["bias"]
                log_gate = -np.log1p(np.exp(-gate[:, h]))
                scores += [log_gate[j + 1 : t + 1].sum() for j in seen]
            weights = np.exp(scores)
            total = weights.sum() + (np.exp(params["sink_logits"][h]) if layer.sinks else 0)
            out[t, h] = sum(w * value[j, h // group] for w, j in zip(weights, seen, strict=True))
            out[t, h] /= total
    return read_out(params, x, out), None, {}


CASES = {
    "default": {},
    "grouped, gate": {"kv_heads": 2, "rope_base": 100.0, "output_gate": True},
    "window, sink tokens": {"heads": 2, "window": 5, "sink_tokens": 2},
    "sinks, no positions": {"kv_heads": 1, "sinks": True, "rope": False, "head_dim": 5},
    "forget gate": {"heads": 2, "forget_gate": True, "window": 6, "kv_heads": 1},
    "conv, norms": {"heads": 2, "conv_width": 4, "qk_norm": True, "head_dim": 6},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_softmax_attention(options):
    check_transcription(SoftmaxAttention(FEATURES, **options), softmax_attention)


def test_softmax_attention_packed():
    layer = SoftmaxAttention(
        FEATURES, heads=2, kv_heads=1, window=4, sink_tokens=1, sinks=True, conv_width=3
    )
    check_transcription(layer, softmax_attention, IDS)


@pytest.mark.parametrize("options", [{"window": TIME}, {"window": 1, "sink_tokens": TIME}])
def test_wide_window_is_full(options):
    layer = SoftmaxAttention(FEATURES, heads=2)
    params, x = random_params(layer), inputs()
    want, _, _ = run64(layer, params, x)
    y, _, _ = run64(layer.clone(**options), params, x)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-12)


def test_low_sink_is_none():
    layer = SoftmaxAttention(FEATURES, heads=2)
    params, x = random_params(layer), inputs()
    want, _, _ = run64(layer, params, x)
    for logit in (-1e4, -np.inf):
        params["sink_logits"] = np.full(2, logit)
        y, _, _ = run64(layer.clone(sinks=True), params, x)
        np.testing.assert_allclose(y, want, rtol=0, atol=1e-12)


def test_window_of_one_reads_the_present_value():
    layer = SoftmaxAttention(FEATURES, heads=2, window=1)
    params, x = random_params(layer), inputs()
    y, _, _ = run64(layer, params, x)
    want = x @ params["value"]["kernel"] @ params["output"]["kernel"]
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-12)


# Streaming. One compiled call for each length of time and each size of cache.


@functools.partial(jax.jit, static_argnums=0)
def run(layer, params, x, state=None, segment_ids=None):
    return layer.apply(params, x, state, segment_ids)


def stream(layer, params, x, state, pieces):
    """The outputs of successive calls, joined, and all states."""
    outs, states, start = [], [], 0
    for length in pieces:
        y, state = run(layer, params, x[:, start : start + length], state)
        outs.append(y)
        states.append(state)
        start += length
    assert start == x.shape[1]
    return np.concatenate(outs, axis=1), states


def example(time=TIME, **options):
    layer = SoftmaxAttention(FEATURES, heads=2, **options)
    params = {"params": jax.tree.map(np.float32, random_params(layer))}
    return layer, params, inputs(time=time).astype(np.float32)


def test_growing_cache():
    """state=None gives a cache with a slot a step, whatever the lengths of the calls."""
    layer, params, x = example(kv_heads=1)
    want, _ = run(layer, params, x)
    y, states = stream(layer, params, x, None, (12, 1, 8))
    np.testing.assert_allclose(y, want, rtol=0, atol=2e-5)
    assert [state.key.shape[1] for state in states] == [12, 13, 21]
    assert all(state.grows for state in states)
    np.testing.assert_array_equal(states[-1].position, [range(TIME)] * 2)
    empty = layer.init_state(2)
    assert empty.grows and empty.key.shape == (2, 0, 1, 8)


@pytest.mark.parametrize("pieces", [(7, 1, 7, 1, 5), (21,)], ids=str)
def test_ring(pieces):
    """With a window the cache stays window + sink_tokens slots; any length goes through it."""
    layer, params, x = example(window=4, sink_tokens=2)
    want, want_state = run(layer, params, x)
    y, states = stream(layer, params, x, layer.init_state(2), pieces)
    np.testing.assert_allclose(y, want, rtol=0, atol=2e-5)
    for state in (*states, want_state, layer.init_state(2, context=100)):
        assert state.key.shape == (2, 6, 2, 8)
    last = states[-1]
    np.testing.assert_array_equal(np.sort(last.position), [[0, 1, 17, 18, 19, 20]] * 2)
    np.testing.assert_array_equal(last.length, [TIME] * 2)
    again, _ = run(layer, params, x[:, :7], last)
    assert np.isfinite(again).all()


def test_context_overflow():
    """NaN from the first position that the cache has no room for, and not before."""
    layer, params, x = example(time=12)
    want, _ = run(layer, params, x)
    for pieces in ((12,), (4, 4, 4), (5, 4, 3)):
        y, states = stream(layer, params, x, layer.init_state(2, context=8), pieces)
        np.testing.assert_allclose(y[:, :8], want[:, :8], rtol=0, atol=2e-5)
        np.testing.assert_array_equal(np.isnan(y[:, 8:]), True)
        np.testing.assert_array_equal(states[-1].length, [12] * 2)
    exact, _ = run(layer, params, x, layer.init_state(2, context=12))
    np.testing.assert_allclose(exact, want, rtol=0, atol=2e-5)


def test_overflow_belongs_to_its_segment():
    """A row's next segment starts with an empty cache; other rows never see the NaN."""
    layer, params, x = example(time=12)
    ids = np.array([[3] * 10 + [4] * 2, [0] * 6 + [1] * 6], np.int32)
    state = layer.init_state(2, context=8)
    want, _ = run(layer, params, x, layer.init_state(2, context=12), ids)
    y, state = run(layer, params, x, state, ids)
    full = np.zeros((2, 12), bool)
    full[0, 8:10] = True
    np.testing.assert_array_equal(np.isnan(y).any(-1), full)
    np.testing.assert_allclose(y[~full], want[~full], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(state.length, [2, 6])
    # the second row restarts, the first goes on, both from what the first call left
    more = np.array([[4] * 12, [9] * 12], np.int32)
    y, state = run(layer, params, x, state, more)
    overflow = np.array([np.arange(12) >= 6, np.arange(12) >= 8])
    np.testing.assert_array_equal(np.isnan(y).any(-1), overflow)
    alone, _ = run(layer, params, x, layer.init_state(2, context=12), more)
    np.testing.assert_allclose(y[1, :8], alone[1, :8], rtol=0, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"window": 3, "sink_tokens": 1}])
def test_border_in_a_later_call(options):
    """A segment that begins behind what the cache held sees none of it, now and in later calls."""
    layer, params, x = example(time=15, **options)
    state, outs = layer.init_state(2, context=10), []
    for start, ids in ((0, [3] * 5), (5, [3] + [4] * 4), (10, [4] * 5)):
        ids = np.array([ids] * 2, np.int32)
        y, state = run(layer, params, x[:, start : start + 5], state, ids)
        outs.append(y)
    alone, wants = layer.init_state(2, context=10), []
    behind = np.concatenate([x[:, 6:], x[:, :1]], axis=1)
    for start, ids in ((0, [0] * 5), (5, [0] * 4 + [-1])):
        ids = np.array([ids] * 2, np.int32)
        y, alone = run(layer, params, behind[:, start : start + 5], alone, ids)
        wants.append(y)
    got, want = (np.concatenate(parts, axis=1) for parts in (outs, wants))
    np.testing.assert_allclose(got[:, 6:], want[:, :9], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(state.length, [9, 9])
    np.testing.assert_array_equal(np.sort(state.position), np.sort(alone.position))


def test_gradient_through_the_cache():
    """What was kept carries gradient: the same as through one call."""
    layer, params, x = example(time=9, window=4)

    def parallel(x):
        return jnp.sum(layer.apply(params, x)[0][:, 6:] ** 2)

    def streamed(x):
        _, state = layer.apply(params, x[:, :6])
        return jnp.sum(layer.apply(params, x[:, 6:], state)[0] ** 2)

    want, got = jax.jit(lambda x: (jax.grad(parallel)(x), jax.grad(streamed)(x)))(x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    assert np.isfinite(want).all() and np.abs(want[:, 3:6]).max() > 1e-3
    np.testing.assert_array_equal(want[:, :3], 0)


def test_starts():
    layer = SoftmaxAttention(32, sinks=True, qk_norm=True)
    params = init(layer)
    np.testing.assert_array_equal(params["sink_logits"], np.zeros(4))
    np.testing.assert_array_equal(params["query_norm"]["scale"], np.ones(8))
    np.testing.assert_allclose(np.std(params["query"]["kernel"]), 32**-0.5, rtol=0.1)


def test_defaults():
    layer = SoftmaxAttention(32)
    assert (layer.rope, layer.rope_base, layer.window, layer.sinks) == (True, 10_000, None, False)
    assert count(layer, 32) == 4 * 32 * 32
    assert count(layer.clone(kv_heads=1), 32) == 2 * 32 * 32 + 2 * 32 * 8
    assert count(layer.clone(sinks=True, qk_norm=True), 32) == 4 * 32 * 32 + 4 + 16
    state = layer.init_state(3, context=7)
    assert state.key.shape == state.value.shape == (3, 7, 4, 8) and not state.grows
    np.testing.assert_array_equal(state.position, np.full((3, 7), -1))
    assert layer.state_bytes(3, context=7) == 3 * (7 * (2 * 32 + 1) + 2) * 4


def test_dtypes():
    """The cache is kept in the activations' dtype."""
    state = check_dtypes(SoftmaxAttention(FEATURES, kv_heads=2, sinks=True, conv_width=3))
    assert state.key.dtype == state.value.dtype == jnp.bfloat16
    assert state.position.dtype == state.length.dtype == jnp.int32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_heads": 3}, "kv_heads: heads 4 must be a multiple of it, got 3"),
        ({"kv_heads": 0}, "kv_heads: .* got 0"),
        ({"heads": 0}, "heads: .* got 0"),
        ({"heads": 5}, "heads: features 16 must be a multiple"),
        ({"head_dim": 3}, "head_dim: rotary positions need an even size, got 3"),
        ({"head_dim": 0}, "head_dim: .* got 0"),
        ({"window": 0}, "window: .* got 0"),
        ({"sink_tokens": -1}, "sink_tokens: .* got -1"),
        ({"conv_width": -1}, "conv_width: .* got -1"),
        ({"implementation": "flash"}, "implementation: .* got 'flash'"),
        ({"implementation": "mosaic_tpu"}, "implementation: attention has no form 'mosaic_tpu'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        count(SoftmaxAttention(FEATURES, **options))


def test_bad_states():
    layer, params, x = example()
    with pytest.raises(
        ValueError, match="state: expected SoftmaxAttentionState, got DeltaNetState"
    ):
        layer.apply(params, x, DeltaNet(FEATURES).init_state(2))
    with pytest.raises(ValueError, match=r"state\.key: expected shape \[2, 5, 2, 8\]"):
        layer.apply(params, x, layer.clone(kv_heads=1).init_state(2, context=5))
    with pytest.raises(ValueError, match=r"state\.key: expected shape \[2, 3, 2, 8\]"):
        layer.clone(window=3).apply(params, x, layer.init_state(2, context=5))
    with pytest.raises(ValueError, match="context: .* got -1"):
        layer.init_state(2, context=-1)


def test_forgetting_attention():
    layer = ForgettingAttention(FEATURES)
    check_transcription(layer, softmax_attention, IDS)
    # open gates forget nothing
    params, x = random_params(layer), inputs()
    params["forget"] = {"kernel": np.zeros((FEATURES, 4)), "bias": np.full(4, 100.0)}
    y, _, _ = run64(layer, params, x)
    plain = {name: value for name, value in params.items() if name != "forget"}
    want, _, _ = run64(SoftmaxAttention(FEATURES, rope=False, qk_norm=True), plain, x)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="sink_tokens: .* got 2"):
        layer.clone(window=4, sink_tokens=2).init_state(1)


def test_sliding_window_is_softmax_attention_with_a_window():
    layer = SlidingWindowAttention(FEATURES, window=5)
    check_transcription(layer, softmax_attention)
    assert SlidingWindowAttention(64).state_bytes(1, 10**6) == SoftmaxAttention(
        64, window=512
    ).state_bytes(1)

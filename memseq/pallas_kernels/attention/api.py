"""`attention`: arguments, checks and dispatch."""

import jax

from memseq.pallas_kernels.attention.arguments import arrange
from memseq.pallas_kernels.attention.chunked import chunked
from memseq.pallas_kernels.attention.reference import reference
from memseq.pallas_kernels.common.dispatch import Forms, run

FORMS = Forms("attention", reference, chunked)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: jax.Array | None = None,
    sink_tokens: int = 0,
    log_forget: jax.Array | None = None,
    query_positions: jax.Array | None = None,
    key_positions: jax.Array | None = None,
    query_segments: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.1).

        out_i = sum_j softmax_j(scale q_i . k_j + forgotten_ij) v_j   over the keys that i sees

    It has no state: a cache of keys and values belongs to the caller, who passes all of them with
    their positions. A query that sees no key gives 0.

    Args:
        query: [batch, queries, heads, dim], floating.
        key: [batch, keys, key_heads, dim]. Query head h reads key head h // (heads // key_heads).
        value: [batch, keys, key_heads, value_dim].
        scale: factor on the scores; None is dim ** -0.5.
        causal: a query sees only keys at its own position and before.
        window: a query sees only keys with query position - key position < window, so `window`
            keys with itself. Without `causal` it limits the past only. None is no limit.
        sinks: [heads]; a logit that takes part in the softmax and carries no value (Xiao et al.
            2024, arXiv:2309.17453, equation 2, with a learned logit as in gpt-oss).
        sink_tokens: keys at positions below it stay visible beyond the window (the same paper's
            attention sinks).
        log_forget: [batch, keys, heads], natural logarithms of forget gates, <= 0 (forgetting
            attention: Lin et al. 2025, arXiv:2503.02130, equation 5); adds to a score the sum over
            the segment's keys after position j, up to position i.
        query_positions: int32 [batch, queries]. None counts from 0, from each segment's start
            where there are segments; so where `keys` differs from `queries`, `causal`, `window`
            and `log_forget` need both positions given.
        key_positions: int32 [batch, keys]; None is query_positions.
        query_segments: int32 [batch, queries]; a query sees keys of its own id only. Negative is
            padding: its output is 0.
        key_segments: int32 [batch, keys], negative for keys that nobody sees. None is
            query_segments, read as the other operations do: a segment ends where the id changes,
            and an id that comes back is a new one.
        implementation: "auto", or one of `FORMS.available`.

    Returns:
        out [batch, queries, heads, value_dim] in value's dtype; the softmax is taken in float32
        (float64 if an input is).

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, at trace time.
    """
    arrays, options = arrange(
        query,
        key,
        value,
        scale=scale,
        causal=causal,
        window=window,
        sinks=sinks,
        sink_tokens=sink_tokens,
        log_forget=log_forget,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segments=query_segments,
        key_segments=key_segments,
    )
    return run(FORMS, implementation, query.shape[1], arrays, **options)

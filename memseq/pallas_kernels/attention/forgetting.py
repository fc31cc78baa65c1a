"""Sums of log forget gates, from which the forgetting between any two positions is a difference.

A float32 sum over thousands of gates has lost the digits that tell two neighbours apart. Every sum
is therefore kept as high + low, the low part holding what rounding took from the high one: the
difference of two such pairs is as good as a sum over the gates between them.
"""

import jax
import jax.numpy as jnp


def forget_sums(
    log_forget: jax.Array,
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array | None,
    key_segments: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Sums at queries [batch, queries, heads, 2] and at keys [batch, keys, heads, 2], high and low.

    A sum takes every key of the segment at or before the position. log_forget [batch, keys, heads],
    positions and segments as in `visible`; keys may come in any order.
    """
    batch, keys, heads = log_forget.shape
    queries = query_positions.shape[1]
    if key_segments is None:
        query_segments, key_segments = (jnp.zeros_like(x) for x in (query_positions, key_positions))
    else:
        log_forget = jnp.where((key_segments >= 0)[..., None], log_forget, 0)
    # Every position is asked about behind all the keys that it holds: one sort puts keys (0) and
    # questions (1) in order, whatever the order they came in and also where positions repeat.
    question = jnp.broadcast_to(jnp.arange(queries + 2 * keys) >= keys, (batch, queries + 2 * keys))
    segment, _, _, order = jax.lax.sort(
        (
            jnp.concatenate([key_segments, key_segments, query_segments], axis=1),
            jnp.concatenate([key_positions, key_positions, query_positions], axis=1),
            question.astype(jnp.int32),
            jnp.broadcast_to(jnp.arange(queries + 2 * keys), question.shape),
        ),
        num_keys=3,
    )
    gates = jnp.pad(log_forget, ((0, 0), (0, queries + keys), (0, 0)))
    gates = jnp.take_along_axis(gates, order[..., None], axis=1)
    restart = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)))[..., None]
    high, low, _ = jax.lax.associative_scan(
        _add, (gates, jnp.zeros_like(gates), jnp.broadcast_to(restart, gates.shape)), axis=1
    )
    sums = jnp.stack([high, low], axis=-1)
    place = jnp.argsort(order, axis=1)[:, keys:, None, None]
    sums = jnp.take_along_axis(sums, place, axis=1)
    return sums[:, keys:], sums[:, :keys]


def _add(before, after):
    """(high, low, restart) of two stretches -> of both; a restart in `after` forgets `before`."""
    high0, low0, restart0 = before
    high1, low1, restart1 = after
    high0, low0 = (jnp.where(restart1, 0, x) for x in (high0, low0))
    total = high0 + high1
    added = total - high0
    lost = (high0 - (total - added)) + (high1 - added)
    # what rounding took has no derivative of its own
    return total, low0 + low1 + jax.lax.stop_gradient(lost), restart0 | restart1

"""The memory of mLSTM: linear attention behind exponential gates, with a normaliser."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common import checks, context
from memseq.pallas_kernels.common.segments import begins, hide_padding
from memseq.pallas_kernels.linear_attention import linear_attention


@context.splits_time(("query", "key", "value", "log_input", "log_forget"), silent=None, matrix=True)
def mlstm(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_input: jax.Array,
    log_forget: jax.Array,
    *,
    scale: float | None = None,
    initial_state: tuple[jax.Array, jax.Array] | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """A normalised matrix memory with gates that may be exponentials of anything (mLSTM).

        C_t = f_t C_{t-1} + i_t k_t v_t^T,  n_t = f_t n_{t-1} + i_t k_t,
        out_t = C_t^T q_t / max(|n_t . q_t|, 1)

    Beck et al. 2024, "xLSTM", arXiv:2405.04517, equations 19 to 27; `scale` multiplies the query.
    A composition: `linear_attention` on gates that `stabilized` keeps in range, with n as a value
    column of ones; its forms are those of `linear_attention`. The gradient is complete, also
    through the normaliser and from the returned state.

    Args:
        query, key: [batch, time, heads, key_dim], as `linear_attention` takes them.
        value: [batch, time, heads, value_dim].
        log_input, log_forget: [batch, time, heads], log i of any size and log f <= 0.
        scale: of the query; None is key_dim ** -0.5.
        initial_state: (memory [batch, heads, key_dim, value_dim + 1], stabilizer [batch, heads]),
            where exp(stabilizer) memory is what is remembered and the stabiliser at least 0; None
            is an empty one.
        segment_ids, chunk_size, implementation: as of `linear_attention`.

    Returns:
        out, as value, and the state after the last step, as `initial_state`.

    Raises:
        ValueError: for shapes that do not fit, and for a form that does not exist.
    """
    batch, time, _, _, heads, _ = checks.check_pairs(query, key, value)
    for name, gate in (("log_input", log_input), ("log_forget", log_forget)):
        checks.check_array(name, gate, (batch, time, heads), "[batch, time, heads]")
    checks.check_segment_ids(segment_ids, batch, time)
    dtype = checks.state_dtype(query, key, value, log_input, log_forget)
    log_input, log_forget = (x.astype(dtype) for x in (log_input, log_forget))
    memory, start = (None, None) if initial_state is None else initial_state
    start = checks.check_state(start, (batch, heads), dtype, "[batch, heads]", "stabilizer")
    log_write, log_decay, level, last = stabilized(log_input, log_forget, start, segment_ids)
    wide = value.astype(dtype)
    wide = jnp.concatenate([wide, jnp.ones_like(wide[..., :1])], axis=-1)
    out, memory = linear_attention(
        query,
        key,
        jnp.exp(log_write)[..., None] * wide,
        log_decay,
        scale=scale,
        initial_state=memory,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
    )
    return normalized(out, level).astype(value.dtype), (memory, last)


def stabilized(
    log_input: jax.Array,
    log_forget: jax.Array,
    start: jax.Array,
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Takes a common exponent out of a memory with exponential gates, so that nothing overflows.

    The memory M_t = f_t M_{t-1} + i_t u_t is held as M_t exp(-m_t) with
    m_t = max(log f_t + m_{t-1}, log i_t, 0): the stabiliser of xLSTM (equation 15), which at 0 and
    below has nothing to do, as the read-out is divided by at least 1. Any m describes the same
    memory, so it is a constant to the gradient.

    Args:
        log_input, log_forget: [batch, time, heads], log_forget <= 0.
        start: [batch, heads], m before the first step, >= 0.
        segment_ids: as the operations take them; m starts at 0 in each segment but the first.

    Returns:
        log_write and log_decay [batch, time, heads], both <= 0, to write and keep with; m_t
        [batch, time, heads], and the last one [batch, heads].
    """
    falls, rises = log_forget, jnp.maximum(log_input, 0)
    restart = None
    if segment_ids is not None:
        log_input, log_forget, falls, rises = (
            hide_padding(x, segment_ids >= 0) for x in (log_input, log_forget, falls, rises)
        )
        restart = begins(segment_ids)[..., None]
        falls = jnp.where(restart, -jnp.inf, falls)

    start = start.astype(falls.dtype)
    steps = jax.lax.stop_gradient((falls, rises))
    fall, rise = jax.lax.associative_scan(one_after_another, steps, axis=1)
    start = jax.lax.stop_gradient(start)
    split = context.axis() is not None
    if split:
        start = context.carried_in(
            start, (fall[:, -1], rise[:, -1]), lambda s, m: jnp.maximum(m + s[0], s[1]), None
        )
    start = start[:, None]
    level = jnp.maximum(start + fall, rise)
    last = context.at_the_end(level[:, -1]) if split else level[:, -1]
    before = jnp.concatenate([start, level[:, :-1]], axis=1)
    log_decay = _rounded_down(log_forget + before - level)
    if restart is not None:
        log_decay = jnp.where(restart, 0, log_decay)
    return _rounded_down(log_input - level), log_decay, level, last


def one_after_another(first: tuple, second: tuple) -> tuple[jax.Array, jax.Array]:
    """The map m -> max(m + fall, rise) of two steps from those of each, as (fall, rise).

    A fall of -inf forgets what came before.
    """
    (fall_1, rise_1), (fall_2, rise_2) = first, second
    return fall_1 + fall_2, jnp.maximum(rise_1 + fall_2, rise_2)


def _rounded_down(x: jax.Array) -> jax.Array:
    """x, which exceeds 0 by rounding alone, at most 0; its slope is 1 also at 0."""
    return x - jax.lax.stop_gradient(jnp.maximum(x, 0))


def normalized(out: jax.Array, level: jax.Array) -> jax.Array:
    """C q / max(|n . q|, exp(-m)), from both reads side by side [..., value_dim + 1]."""
    least = jnp.maximum(jnp.exp(-level), 1e-30)  # the exponential may underflow to 0
    return out[..., :-1] / jnp.maximum(jnp.abs(out[..., -1]), least)[..., None]

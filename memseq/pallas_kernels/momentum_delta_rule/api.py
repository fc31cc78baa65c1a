"""`momentum_delta_rule`: arguments, checks and dispatch."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common import checks
from memseq.pallas_kernels.common.context import nothing_written, splits_time
from memseq.pallas_kernels.common.dispatch import Forms, run
from memseq.pallas_kernels.common.segments import hide_padding, segments
from memseq.pallas_kernels.momentum_delta_rule.chunked import chunked
from memseq.pallas_kernels.momentum_delta_rule.reference import reference

FORMS = Forms("momentum_delta_rule", reference, chunked)


@splits_time(
    ("query", "key", "value", "beta", "step", "log_momentum", "log_decay"),
    nothing_written,
    matrix=True,
)
def momentum_delta_rule(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    step: jax.Array,
    log_momentum: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    erase: str = "decayed",
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """A matrix memory that is written with a running sum of what it got wrong.

        error_t = v_t - (decay_t S_{t-1})^T k_t,  M_t = momentum_t M_{t-1} + step_t k_t error_t^T,
        S_t = decay_t S_{t-1} + beta_t M_t,  out_t = scale S_t^T q_t

    Huang et al. 2026, "MDN: Parallelizing Stepwise Momentum for Delta Linear Attention",
    arXiv:2605.05838, whose M has the other sign. Without momentum this is `delta_rule` with write
    strength beta step. With unit keys a step is stable for beta step decay below
    (1 + decay) (1 + momentum), so for beta step <= 1 whatever the gates; between two keys that
    take turns momentum can still build up, as it does in gradient descent.

    Args:
        query: [batch, time, key_heads, key_dim], floating.
        key: as query. Value head h uses query and key head h // (heads // key_heads). Keys are
            taken as they come; normalise them outside.
        value: [batch, time, heads, value_dim].
        beta: what is written of the momentum, [batch, time, heads].
        step: what of an error enters the momentum, [batch, time, heads].
        log_momentum: natural logarithm of what is kept of the momentum, finite and <= 0: [heads]
            or [batch, time, heads].
        log_decay: the same of the memory. None keeps all.
        erase: "decayed", or "undecayed": the error reads the memory before this step's decay.
        scale: factor on the output; None is key_dim ** -0.5.
        initial_state: [batch, heads, 2 * key_dim, value_dim]: the memory, and below it its
            momentum; None is empty.
        segment_ids: int32 [batch, time]. Memory and momentum restart empty wherever the id
            changes; the initial state continues the first segment. Negative ids are padding: no
            write, no decay, output 0.
        chunk_size: steps taken together by the chunked form; changes speed only.
        implementation: "auto", or one of `FORMS.available`.

    Returns:
        out [batch, time, heads, value_dim] in value's dtype, and the state after the last step
        [batch, heads, 2 * key_dim, value_dim], float32 (float64 if an input is).

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, at trace time.
    """
    batch, time, key_heads, key_dim, heads, value_dim = checks.check_pairs(query, key, value)
    checks.check_array("beta", beta, (batch, time, heads), "[batch, time, heads]")
    checks.check_array("step", step, (batch, time, heads), "[batch, time, heads]")
    checks.check_floating("log_momentum", log_momentum)
    checks.check_choice("erase", erase, ("decayed", "undecayed"))
    dtype = checks.state_dtype(
        query, key, value, beta, step, log_momentum, log_decay, initial_state
    )
    if log_decay is None:
        log_decay = jnp.zeros((batch, time, heads), dtype)
    sizes = (batch, time, heads, None, dtype)
    log_momentum = checks.check_log_decay(log_momentum, *sizes, name="log_momentum")
    log_decay = checks.check_log_decay(log_decay, *sizes)
    state = checks.check_state(
        initial_state,
        (batch, heads, 2 * key_dim, value_dim),
        dtype,
        "[batch, heads, 2 * key_dim, value_dim]",
    )
    checks.check_segment_ids(segment_ids, batch, time)
    checks.check_chunk_size(chunk_size)

    query, key = (jnp.repeat(x, heads // key_heads, axis=2) for x in (query, key))
    by_time = (query, key, value, beta, step, log_momentum, log_decay)
    index = None
    if segment_ids is not None:
        valid, index = segments(segment_ids)
        by_time = (hide_padding(x, valid) for x in by_time)
    scale = key_dim**-0.5 if scale is None else scale
    options = {"scale": scale, "erase": erase, "chunk_size": chunk_size}
    return run(FORMS, implementation, time, (*by_time, state, index), **options)

"""`diagonal_plus_low_rank`: arguments, checks and dispatch."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common import checks
from memseq.pallas_kernels.common.context import nothing_written, splits_time
from memseq.pallas_kernels.common.dispatch import Forms, run
from memseq.pallas_kernels.common.segments import hide_padding, segments
from memseq.pallas_kernels.diagonal_plus_low_rank.chunked import chunked
from memseq.pallas_kernels.diagonal_plus_low_rank.mosaic_tpu import MOSAIC_TPU
from memseq.pallas_kernels.diagonal_plus_low_rank.reference import reference

FORMS = Forms(
    "diagonal_plus_low_rank",
    reference,
    chunked,
    MOSAIC_TPU,
    axes=("bthk", "bthk", "bthv", "bthk", "bthk", "bthk", "bhkv", "bt"),
    out_axes=("bthv", "bhkv"),
)


@splits_time(("query", "key", "value", "a", "b", "log_decay"), nothing_written, matrix=True)
def diagonal_plus_low_rank(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    a: jax.Array,
    b: jax.Array,
    log_decay: jax.Array,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """A matrix memory that decays and moves what it holds under one direction to another.

        S_t = (Diag(decay_t) + b_t a_t^T) S_{t-1} + k_t v_t^T,  out_t = scale S_t^T q_t

    So `a` reads the memory before this step's decay, and what it finds is added under `b`. The
    state evolution of RWKV-7 (Peng et al. 2025, arXiv:2503.14456), with the memory transposed:
    there a = -kappa and b = eta kappa, with the unit removal key kappa and the in-context learning
    rate eta in (0, 1) of each channel. a = 0 leaves `linear_attention` with a decay of channels;
    a = k and b = -beta k without decay is `delta_rule` with keys k and values v, if the key here is
    beta k.

    Nothing bounds the transition. For a unit a and b = -strength a it is symmetric with eigenvalues
    between the least decay - strength and the greatest decay: a step cannot make the memory grow
    for a strength in [0, 1 + the least decay].

    Args:
        query: [batch, time, key_heads, key_dim], floating.
        key: as query. Value head h uses query and key head h // (heads // key_heads).
        value: [batch, time, heads, value_dim].
        a: the direction that is read, as key, or with value's heads: [batch, time, heads, key_dim].
        b: the direction that is written to, likewise.
        log_decay: natural logarithm of what is kept at each step, finite and <= 0: [heads],
            [batch, time, heads] or [batch, time, heads, key_dim].
        scale: factor on the output; None is key_dim ** -0.5. RWKV-7 has 1.
        initial_state: [batch, heads, key_dim, value_dim]; None is an empty memory.
        segment_ids: int32 [batch, time]. The memory restarts empty wherever the id changes; the
            initial state continues the first segment. Negative ids are padding: no write, no
            decay, output 0.
        chunk_size: steps taken together by the chunked form; changes speed only.
        implementation: "auto", or one of `FORMS.available`.

    Returns:
        out [batch, time, heads, value_dim] in value's dtype, and the state after the last step
        [batch, heads, key_dim, value_dim], float32 (float64 if an input is).

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, at trace time.
    """
    batch, time, _, key_dim, heads, value_dim = checks.check_pairs(query, key, value)
    by_head = (batch, time, heads, key_dim)
    for name, x in (("a", a), ("b", b)):
        checks.check_floating(name, x)
        if x.shape not in (key.shape, by_head):
            raise ValueError(
                f"{name}: expected key's shape = {list(key.shape)} or "
                f"[batch, time, heads, key_dim] = {list(by_head)}, got shape {list(x.shape)}"
            )
    checks.check_floating("log_decay", log_decay)
    dtype = checks.state_dtype(query, key, value, a, b, log_decay, initial_state)
    log_decay = checks.check_log_decay(log_decay, batch, time, heads, key_dim, dtype)
    state = checks.check_state(initial_state, (batch, heads, key_dim, value_dim), dtype)
    checks.check_segment_ids(segment_ids, batch, time)
    checks.check_chunk_size(chunk_size)

    if log_decay.ndim == 3:
        log_decay = jnp.broadcast_to(log_decay[..., None], by_head)
    query, key, a, b = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (query, key, a, b))
    index = None
    if segment_ids is not None:
        valid, index = segments(segment_ids)
        query, key, value, a, b, log_decay = (
            hide_padding(x, valid) for x in (query, key, value, a, b, log_decay)
        )
    arrays = (query, key, value, a, b, log_decay, state, index)
    scale = key_dim**-0.5 if scale is None else scale
    return run(FORMS, implementation, time, arrays, scale=scale, chunk_size=chunk_size)

"""`linear_attention`: arguments, checks and dispatch."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common import checks
from memseq.pallas_kernels.common.context import splits_time
from memseq.pallas_kernels.common.dispatch import Forms, run
from memseq.pallas_kernels.common.segments import hide_padding, segments
from memseq.pallas_kernels.linear_attention.chunked import chunked
from memseq.pallas_kernels.linear_attention.mosaic_tpu import MOSAIC_TPU
from memseq.pallas_kernels.linear_attention.reference import reference

FORMS = Forms(
    "linear_attention",
    reference,
    chunked,
    MOSAIC_TPU,
    axes=("bthk", "bthk", "bthv", "bthk", "bthv", "hk", "bhkv", "bt"),
    out_axes=("bthv", "bhkv"),
)


def _silent(arguments, _):
    return arguments | {"key": jnp.zeros_like(arguments["key"])}


@splits_time(
    ("query", "key", "value", "log_decay", "value_log_decay"),
    _silent,
    matrix=False,
    whole=("bonus",),
)
def linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    value_log_decay: jax.Array | None = None,
    bonus: jax.Array | None = None,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """A matrix memory that decays and adds.

        S_t = decay_t * S_{t-1} + k_t v_t^T,  out_t = scale S_t^T q_t

    Without decay this is the linear transformer (Katharopoulos et al. 2020, arXiv:2006.16236,
    equations 16 to 20); with a decay per head RetNet, Mamba-2 and mLSTM; with one per key channel
    gated linear attention (Yang et al. 2024, arXiv:2312.06635, equation 4); with `bonus` RWKV-6
    (Peng et al. 2024, arXiv:2404.05892, equation 19), whose read comes before the write:
    out_t = scale (S_{t-1} + (bonus * k_t) v_t^T)^T q_t.

    A normaliser is a value column of ones.

    Args:
        query: [batch, time, key_heads, key_dim], floating.
        key: as query. Value head h uses query and key head h // (heads // key_heads).
        value: [batch, time, heads, value_dim].
        log_decay: natural logarithm of what is kept at each step, finite and <= 0: [heads],
            [batch, time, heads] or [batch, time, heads, key_dim]. None keeps all.
        value_log_decay: the same for value channels, [batch, time, heads, value_dim].
        bonus: [heads, key_dim]; reads before the write, adding the present pair with this weight.
        scale: factor on the output; None is key_dim ** -0.5.
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
    batch, time, key_heads, key_dim, heads, value_dim = checks.check_pairs(query, key, value)
    dtype = checks.state_dtype(query, key, value, log_decay, value_log_decay, bonus, initial_state)
    log_decay = checks.check_log_decay(log_decay, batch, time, heads, key_dim, dtype)
    if value_log_decay is not None:
        checks.check_array(
            "value_log_decay", value_log_decay, value.shape, "[batch, time, heads, value_dim]"
        )
        value_log_decay = value_log_decay.astype(dtype)
    if bonus is not None:
        checks.check_array("bonus", bonus, (heads, key_dim), "[heads, key_dim]")
        bonus = bonus.astype(dtype)
    state = checks.check_state(initial_state, (batch, heads, key_dim, value_dim), dtype)
    checks.check_segment_ids(segment_ids, batch, time)
    checks.check_chunk_size(chunk_size)

    query, key = (jnp.repeat(x, heads // key_heads, axis=2) for x in (query, key))
    index = None
    if segment_ids is not None:
        valid, index = segments(segment_ids)
        query, key, value, log_decay, value_log_decay = (
            hide_padding(x, valid) for x in (query, key, value, log_decay, value_log_decay)
        )
    arrays = (query, key, value, log_decay, value_log_decay, bonus, state, index)
    scale = key_dim**-0.5 if scale is None else scale
    return run(FORMS, implementation, time, arrays, scale=scale, chunk_size=chunk_size)

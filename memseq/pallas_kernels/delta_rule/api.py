"""`delta_rule`: arguments, checks and dispatch."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common import checks
from memseq.pallas_kernels.common.context import nothing_written, splits_time
from memseq.pallas_kernels.common.dispatch import Forms, run
from memseq.pallas_kernels.common.segments import hide_padding, segments
from memseq.pallas_kernels.delta_rule.chunked import chunked
from memseq.pallas_kernels.delta_rule.mosaic_tpu import MOSAIC_TPU
from memseq.pallas_kernels.delta_rule.reference import reference

FORMS = Forms(
    "delta_rule",
    reference,
    chunked,
    MOSAIC_TPU,
    axes=("bthk", "bthk", "bthv", "bth", "bthk", "bthk", "bhkv", "bt"),
    out_axes=("bthv", "bhkv"),
)


@splits_time(
    ("query", "key", "value", "beta", "log_decay", "erase_key"), nothing_written, matrix=True
)
def delta_rule(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    erase_key: jax.Array | None = None,
    erase: str = "decayed",
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """A matrix memory that first decays, then corrects what it holds under a key.

        S'_t = decay_t * S_{t-1},  S_t = S'_t + beta_t k_t (v_t - S'_t^T k_t)^T,
        out_t = scale S_t^T q_t

    Without decay DeltaNet (Schlag et al. 2021, arXiv:2102.11174, equation 23; Yang et al. 2024,
    arXiv:2406.06484); with a decay per head Gated DeltaNet (Yang et al. 2025, arXiv:2412.06464,
    equation 10); with one per key channel Kimi Delta Attention (Kimi Team 2025, arXiv:2510.26692,
    equation 1). With unit keys each step is stable for beta in [0, 2]; beta above 1 gives negative
    eigenvalues, which state tracking needs (Grazzi et al. 2025, arXiv:2411.12537).

    Args:
        query: [batch, time, key_heads, key_dim], floating.
        key: as query. Value head h uses query and key head h // (heads // key_heads). Keys are
            taken as they come; normalise them outside.
        value: [batch, time, heads, value_dim].
        beta: write strength, [batch, time, heads].
        log_decay: natural logarithm of what is kept at each step, finite and <= 0: [heads],
            [batch, time, heads] or [batch, time, heads, key_dim]. None keeps all.
        erase_key: as key; the error reads the memory under it in place of the key.
        erase: "decayed", or "undecayed": the error reads the memory before this step's decay, as
            in Comba (Hu et al. 2025, arXiv:2506.02475, equation 9).
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
    checks.check_array("beta", beta, (batch, time, heads), "[batch, time, heads]")
    checks.check_choice("erase", erase, ("decayed", "undecayed"))
    if erase_key is not None:
        checks.check_array("erase_key", erase_key, key.shape, "key's shape")
    dtype = checks.state_dtype(query, key, value, beta, log_decay, erase_key, initial_state)
    log_decay = checks.check_log_decay(log_decay, batch, time, heads, key_dim, dtype)
    state = checks.check_state(initial_state, (batch, heads, key_dim, value_dim), dtype)
    checks.check_segment_ids(segment_ids, batch, time)
    checks.check_chunk_size(chunk_size)

    query, key, erase_key = (
        None if x is None else jnp.repeat(x, heads // key_heads, axis=2)
        for x in (query, key, erase_key)
    )
    index = None
    if segment_ids is not None:
        valid, index = segments(segment_ids)
        query, key, value, beta, log_decay, erase_key = (
            hide_padding(x, valid) for x in (query, key, value, beta, log_decay, erase_key)
        )
    arrays = (query, key, value, beta, log_decay, erase_key, state, index)
    scale = key_dim**-0.5 if scale is None else scale
    return run(FORMS, implementation, time, arrays, scale=scale, erase=erase, chunk_size=chunk_size)

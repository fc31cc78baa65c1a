"""`ridge_readout`: arguments, checks and dispatch."""

from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp

from memseq.pallas_kernels.common import checks
from memseq.pallas_kernels.common.context import splits_time
from memseq.pallas_kernels.common.dispatch import Forms, run
from memseq.pallas_kernels.common.segments import hide_padding, segments
from memseq.pallas_kernels.ridge_readout.chunked import chunked
from memseq.pallas_kernels.ridge_readout.reference import reference

FORMS = Forms("ridge_readout", reference, chunked)


class RidgeState(NamedTuple):
    """The two sums of a ridge regression.

    gram: [batch, heads, key_dim, key_dim], the decayed sum of beta k k^T.
    memory: [batch, heads, key_dim, value_dim], the decayed sum of beta k v^T.
    """

    gram: jax.Array
    memory: jax.Array


jax.export.register_namedtuple_serialization(
    RidgeState, serialized_name="memseq.pallas_kernels.RidgeState"
)


def _silent(arguments, _):
    return arguments | {"beta": jnp.zeros_like(arguments["beta"])}


@splits_time(
    ("query", "key", "value", "beta", "log_decay"), _silent, matrix=False, whole=("ridge",)
)
def ridge_readout(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None,
    ridge: jax.Array,
    *,
    iterations: int = 30,
    scale: float | None = None,
    initial_state: RidgeState | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, RidgeState]:
    """A matrix memory that is read through the inverse of what its keys add up to.

        G_t = decay_t G_{t-1} + beta_t k_t k_t^T,  S_t = decay_t S_{t-1} + beta_t k_t v_t^T,
        out_t = scale S_t^T (G_t + Diag(ridge))^-1 q_t

    which reads q_t with the matrix W that makes sum_j beta_j decay_(j to t) |W^T k_j - v_j|^2 +
    sum_c ridge_c |W_c|^2 least: MesaNet (von Oswald et al. 2025, arXiv:2506.05233, equation 6; the
    chunked form, section 3). With a large ridge this is gated linear attention over the ridge.

    `reference` solves each step's system exactly. `chunked` takes conjugate gradient steps on all
    of a chunk's systems at once, preconditioned with their diagonals, and its derivative solves
    the same systems again. After n steps the error is at most about
    2 ((sqrt(c) - 1) / (sqrt(c) + 1))^n of the solution, and in float32 no less than about 1e-7 c,
    where c, the condition number, is at most about 1 + (sum_j beta_j decay_(j to t) |k_j|^2) / the
    least ridge. key_dim steps solve exactly but for rounding. With unit keys, decay 0.5 and the
    ridge of MesaNet, at least 0.25, c is 9 at most; without decay it grows with time wherever keys
    are alike.

    Args:
        query: [batch, time, key_heads, key_dim], floating.
        key: as query. Value head h uses query and key head h // (heads // key_heads). Keys are
            taken as they come; normalise them outside.
        value: [batch, time, heads, value_dim].
        beta: weight of a pair in the regression, >= 0, [batch, time, heads].
        log_decay: natural logarithm of what is kept at each step, finite and <= 0: [heads] or
            [batch, time, heads]. None keeps all.
        ridge: [heads, key_dim], positive. It does not decay.
        iterations: the most conjugate gradient steps that `chunked` takes.
        scale: factor on the output; None is key_dim ** -0.5.
        initial_state: a `RidgeState` or such a pair of arrays; None is an empty memory. Of a gram
            the symmetric part counts, which must have no negative eigenvalue.
        segment_ids: int32 [batch, time]. The memory restarts empty wherever the id changes; the
            initial state continues the first segment. Negative ids are padding: no write, no
            decay, output 0.
        chunk_size: steps taken together by the chunked form; changes speed only.
        implementation: "auto", or one of `FORMS.available`.

    Returns:
        out [batch, time, heads, value_dim] in value's dtype, and the `RidgeState` after the last
        step, float32 (float64 if an input is).

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, at trace time.
    """
    batch, time, key_heads, key_dim, heads, value_dim = checks.check_pairs(query, key, value)
    checks.check_array("beta", beta, (batch, time, heads), "[batch, time, heads]")
    checks.check_array("ridge", ridge, (heads, key_dim), "[heads, key_dim]")
    checks.check_count("iterations", iterations, 1)
    gram, memory = _check_pair(initial_state)
    dtype = checks.state_dtype(query, key, value, beta, log_decay, ridge, gram, memory)
    log_decay = checks.check_log_decay(log_decay, batch, time, heads, None, dtype)
    gram = checks.check_state(
        gram,
        (batch, heads, key_dim, key_dim),
        dtype,
        "[batch, heads, key_dim, key_dim]",
        "initial_state.gram",
    )
    memory = checks.check_state(
        memory, (batch, heads, key_dim, value_dim), dtype, name="initial_state.memory"
    )
    checks.check_segment_ids(segment_ids, batch, time)
    checks.check_chunk_size(chunk_size)

    query, key = (jnp.repeat(x, heads // key_heads, axis=2) for x in (query, key))
    index = None
    if segment_ids is not None:
        valid, index = segments(segment_ids)
        query, key, value, beta, log_decay = (
            hide_padding(x, valid) for x in (query, key, value, beta, log_decay)
        )
    # one memory, whose values are the keys and the values; as an array of its own, an initial gram
    # is not known to be symmetric, nor are its tangents
    gram = (gram + gram.swapaxes(-1, -2)) / 2
    both = jnp.concatenate([gram, memory], axis=-1)
    arrays = (query, key, value, beta, log_decay, ridge.astype(dtype), both, index)
    scale = key_dim**-0.5 if scale is None else scale
    options = {"scale": scale, "iterations": iterations, "chunk_size": chunk_size}
    out, both = run(FORMS, implementation, time, arrays, **options)
    return out, RidgeState(both[..., :key_dim], both[..., key_dim:])


def _check_pair(state: RidgeState | None) -> tuple[jax.Array | None, jax.Array | None]:
    if state is None:
        return None, None
    if not isinstance(state, tuple) or len(state) != 2:
        raise ValueError(
            f"initial_state: expected a RidgeState (gram, memory), got {type(state).__name__}"
        )
    return state

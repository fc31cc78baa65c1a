"""The definition of `hopfield_retrieve`: the whole matrix of scores at every step."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.precision import products_precision
from memseq.pallas_kernels.hopfield_retrieve.iterate import retrieve
from memseq.pallas_kernels.hopfield_retrieve.separation import separate


def reference(
    query,
    stored,
    values,
    beta,
    alpha,
    sink,
    mask,
    position,
    *,
    separation,
    budget,
    dtype,
    chunk_size,
    **options,
):
    """See `hopfield_retrieve`.

    Args:
        query: [batch, queries, heads, group, dim]; group queries share each stored head.
        stored, values: [batch, patterns, heads, dim] and [..., value_dim], or None for values.
        beta, alpha, sink: [heads, group] in `dtype`; None where the separation has none.
        mask: bool [batch or 1, queries or 1, patterns], or None.
        position: int32 [1, queries]: a query sees patterns up to this one; None sees all.

    Returns:
        out and energies as `retrieve` does, out in the dtype of values, or of query without them.
    """
    del chunk_size
    precision = products_precision(query, stored, *([] if values is None else [values]))
    result = query.dtype if values is None else values.dtype
    memory = {
        "stored": stored.astype(dtype),
        "values": None if values is None else values.astype(dtype),
        "beta": beta,
        "alpha": alpha,
        "sink": sink,
        "mask": mask,
        "position": position,
    }
    attend = whole_rows(separation, budget, precision)
    out, energies, _ = retrieve(attend, query.astype(dtype), memory, **options)
    return out.astype(result), energies


def whole_rows(separation: str, budget: int | None, precision: jax.lax.Precision):
    """`attend` of `retrieve` that takes all scores of its queries at once."""

    def attend(state, memory, read):
        scores = score(state, memory["stored"], memory["beta"], precision)
        part = visible(memory["mask"], memory["position"], 0, scores.shape[-1])
        p, conjugate = separate(
            scores,
            part,
            separation=separation,
            alpha=None if memory["alpha"] is None else memory["alpha"][..., None],
            sink=None if memory["sink"] is None else memory["sink"][..., None],
            budget=budget,
        )
        out = jnp.einsum("bhgqn,bnhv->bqhgv", p, memory[read], precision=precision)
        return out, jnp.moveaxis(conjugate, -1, 1)

    return attend


def score(state, stored, beta, precision):
    """beta state . stored: [batch, heads, group, queries, patterns]."""
    products = jnp.einsum("bqhgd,bnhd->bhgqn", state, stored, precision=precision)
    return beta[..., None, None] * products


def visible(mask, position, first, count):
    """bool, broadcasts to [batch, heads, group, queries, count]: which patterns a query sees.

    Of the patterns from `first` on; mask [batch or 1, queries or 1, count] is of these alone.
    """
    part = jnp.ones((1, 1, 1, 1, count), bool)
    if mask is not None:
        part &= mask[:, None, None]
    if position is not None:
        part &= (first + jnp.arange(count)) <= position[:, None, None, :, None]
    return part

"""The chunked form: chunks follow one another in a scan.

A group of chunks is taken again in the backward pass, which keeps the states between groups only.
"""

import functools
import math

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.sharded import vary_together
from memseq.pallas_kernels.neural_memory.chunks import cut_up, put_together
from memseq.pallas_kernels.neural_memory.losses import Loss
from memseq.pallas_kernels.neural_memory.memory import Memory
from memseq.pallas_kernels.neural_memory.one_chunk import advance
from memseq.pallas_kernels.neural_memory.retention import Retention
from memseq.pallas_kernels.neural_memory.state import Inputs, MemoryState

GROUP = 8  # chunks of a group, at most
EQUATIONS = {"nn": "...ij,...jk->...ik", "nt": "...ij,...kj->...ik", "tn": "...ji,...jk->...ik"}


def chunked(
    *arrays: jax.Array,
    tree,
    memory: Memory,
    loss: Loss,
    retention: Retention,
    update_chunk: int,
    anchor: str,
    read: str,
    outer_grad: str | tuple[str, int],
    max_chunks: int,
    precision: jax.lax.Precision,
    carried: bool,
) -> tuple[jax.Array, MemoryState]:
    """`neural_memory` on checked arguments: the leaves of `Inputs`, whose structure is `tree`."""
    inputs: Inputs = jax.tree.unflatten(tree, arrays)
    cut = cut_up(
        inputs,
        update_chunk=update_chunk,
        anchor=anchor,
        read=read,
        outer_grad=outer_grad,
        max_chunks=max_chunks,
        carried=carried,
    )

    def product(kind, a, b):
        return jnp.einsum(EQUATIONS[kind], a, b, precision=precision)

    step = functools.partial(
        advance,
        fixed=cut.fixed,
        memory=memory,
        loss=loss,
        retention=retention,
        anchor=anchor,
        read=read,
        outer_grad=outer_grad,
        product=product,
    )

    def body(carry, now):
        chunk, needed = now
        if needed is None:
            return step(carry, chunk)
        out = jax.eval_shape(step, carry, chunk)[1]
        nothing, _ = vary_together((jnp.zeros(out.shape, out.dtype), chunk.query))
        return jax.lax.cond(needed, step, lambda carry, _: (carry, nothing), carry, chunk)

    # chunks that no row has a token in, of which packing can leave many, are not computed
    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), cut.chunks)
    carry, out = _scan_by_group(body, cut.carry, (by_time, cut.needed))
    return put_together(inputs, cut, jnp.moveaxis(out, 0, 2), carry)


def _scan_by_group(body, carry, xs):
    """`jax.lax.scan` that keeps the carry between groups of steps and takes a group again."""
    steps = jax.tree.leaves(xs)[0].shape[0]
    groups = max(math.ceil(steps / GROUP), min(steps, math.isqrt(steps)))
    size = math.ceil(steps / groups)
    whole = size * (steps // size)

    def scan(carry, xs):
        return jax.lax.scan(body, carry, xs)

    if groups == 1:
        return scan(carry, xs)
    outs = []
    if whole:
        by_group = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), xs)
        carry, out = jax.lax.scan(jax.checkpoint(scan, prevent_cse=False), carry, by_group)
        outs.append(out.reshape(whole, *out.shape[2:]))
    if whole < steps:
        carry, out = jax.checkpoint(scan)(carry, jax.tree.map(lambda x: x[whole:], xs))
        outs.append(out)
    return carry, jnp.concatenate(outs)

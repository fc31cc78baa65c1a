"""The dual form: a chunk's writes act on its reads through scores, as in linear attention.

The gradients of a chunk are taken at one anchor, so in every layer token j's is an outer product
of an input x_j and an error d_j that one batched pass gives for the whole chunk. A layer that step
t reads with answers an input h with

    h W_t = kept_t h W_0 + carried_t h S_0 - sum_j written_tj (h . x_j) d_j

and no array of the weights' size is made for a token. Chunks follow one another in a scan, and a
group of them is taken again in the backward pass, which keeps the states between groups only.
"""

import math

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.segments import Segments, hide_padding
from memseq.pallas_kernels.common.sharded import vary_together
from memseq.pallas_kernels.neural_memory.alignment import align, shifted, unmoved
from memseq.pallas_kernels.neural_memory.coefficients import Coefficients, coefficients
from memseq.pallas_kernels.neural_memory.losses import Loss
from memseq.pallas_kernels.neural_memory.memory import Memory, forward, local_errors, through
from memseq.pallas_kernels.neural_memory.retention import Retention
from memseq.pallas_kernels.neural_memory.state import Inputs, MemoryState, entered

GROUP = 8  # chunks of a group, at most


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
    state = entered(inputs, anchor)
    batch, time = inputs.query.shape[:2]
    recent = state.recent_key.shape[1]
    if inputs.valid is not None:
        layout = align(
            Segments(inputs.valid, inputs.index),
            state.position,
            state.recent_count,
            recent,
            update_chunk,
            max_chunks,
        )
    elif carried:
        layout = shifted(state.position, state.recent_count, recent, time, update_chunk, max_chunks)
    else:
        layout = unmoved(batch, time, recent, update_chunk)
    key = layout.gather(inputs.key, state.recent_key)
    value = layout.gather(inputs.value, state.recent_value)
    # a token has no step along the gradients of tokens before its segment
    lag = jnp.arange(recent + 1)
    step = jnp.where((lag <= layout.age[..., None])[:, :, None], layout.gather(inputs.step), 0)
    gates = [
        None if x is None else _by_chunk(layout.gather(x), update_chunk)
        for x in (inputs.keep, inputs.momentum, inputs.threshold)
    ]
    keep, momentum, threshold = gates
    filled = jnp.asarray(layout.filled).reshape(batch, 1, -1, update_chunk)
    weights_of, momentum_of = coefficients(
        keep, momentum, _by_chunk(step, update_chunk, recent + 1), filled
    )
    by_chunk = (
        _by_chunk(layout.gather(inputs.query), update_chunk, inputs.query.shape[-1]),
        _overlapping(key, update_chunk, recent),
        _overlapping(value, update_chunk, recent),
        threshold,
        weights_of,
        momentum_of,
    )
    cut = jnp.zeros_like(layout.full)
    if isinstance(outer_grad, tuple):
        cut = (layout.number > 0) & (layout.number % outer_grad[1] == 0) & filled.any((1, 3))
    flags = (layout.restart, layout.full, cut)

    def one_chunk(carry, now, flags, initial, affine, scale):
        """One chunk of one head: (start, weights, momentum) to those after it, and its reads."""
        restart, full, cut = flags
        start, weights, momentum = carry
        start, weights = (_where(restart, initial, w) for w in (start, weights))
        momentum = jax.tree.map(lambda s: jnp.where(restart, 0, s), momentum)
        if isinstance(outer_grad, tuple):
            carry = (start, weights, momentum)
            start, weights, momentum = _where(cut, jax.lax.stop_gradient(carry), carry)
        query, key, value, threshold, weights_of, momentum_of = now
        end = weights_of.last()

        at = start
        if anchor == "decayed":  # chunks of one token
            at = jax.tree.map(lambda w: end.kept * w, start)
        seen = retention.view(at, at)
        if outer_grad == "stop_anchor":
            seen = jax.lax.stop_gradient(seen)
        xs, ds = local_errors(
            memory,
            lambda out: loss(out, value, threshold).sum(),
            seen,
            affine,
            key,
            precision,
        )
        if outer_grad == "stop_writes":
            xs, ds = jax.lax.stop_gradient((xs, ds))

        if read == "chunk":
            linear = through(retention.view(start, start), precision)
        else:
            of, moved = weights_of, scale
            if read == "before":
                of = of.before()
                if scale is not None:
                    moved = jnp.concatenate([jnp.ones((1,), scale.dtype), scale[:-1]])
            make = _dual if retention.scales else _materialised
            linear = make(start, weights, momentum, xs, ds, of, moved, retention, precision)
        out = forward(memory, len(weights), linear, affine, query)

        weights = _stepped(weights, momentum, xs, ds, end, precision)
        if momentum:
            momentum = _stepped(momentum, (), xs, ds, momentum_of, precision)
        moved = weights
        if scale is not None:
            moved = jax.tree.map(lambda a, w: a + scale[-1] * (w - a), start, weights)
        weights = _where(full, retention.border(moved, initial), weights)
        if anchor != "call":
            start = _where(full, weights, start)
        return (start, weights, momentum), out

    by_head = jax.vmap(one_chunk, (0, 0, None, 0, 0, 0))
    by_row = jax.vmap(by_head, (0, 0, 0, None, None, None))

    def body(carry, now):
        *now, needed = now

        def step(carry):
            return by_row(carry, *now, inputs.initial, inputs.affine, inputs.position_scale)

        if needed is None:
            return step(carry)
        out = jax.eval_shape(step, carry)[1]
        nothing, _ = vary_together((jnp.zeros(out.shape, out.dtype), now[0][0]))
        return jax.lax.cond(needed, step, lambda carry: (carry, nothing), carry)

    carry = (state.anchor, state.weights, state.momentum)
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), by_chunk)
    flags = jax.tree.map(lambda x: jnp.moveaxis(jnp.asarray(x), 1, 0), flags)
    # chunks that no row has a token in, of which packing can leave many, are not computed
    needed = None if layout.source is None else filled.any((0, 1, 3))
    (start, weights, momentum), out = _scan_by_group(body, carry, (xs, flags, needed))
    out = jnp.moveaxis(out, (0, 3), (1, 2))  # [batch, chunks, chunk, heads, dim]
    out = layout.scatter(out.reshape(batch, -1, *out.shape[3:]))

    last = jnp.arange(recent) + _filled_slots(layout, state.position)[:, None]
    last = last.reshape(*last.shape, 1, 1)
    held = jnp.arange(recent) >= recent - jnp.asarray(layout.state_count)[:, None]
    none = ~jnp.asarray(layout.filled).any(axis=1)
    untouched = (inputs.state.position < 0) & none
    return out, MemoryState(
        weights=weights,
        anchor=start,
        momentum=momentum,
        recent_key=hide_padding(jnp.take_along_axis(key, last, axis=1), held),
        recent_value=hide_padding(jnp.take_along_axis(value, last, axis=1), held),
        recent_count=jnp.asarray(layout.state_count, jnp.int32),
        position=jnp.where(untouched, -1, layout.state_position).astype(jnp.int32),
    )


def _filled_slots(layout, position):
    """int32 [batch]: one past the last slot that is filled; the state's position where none is."""
    slots = jnp.arange(layout.filled.shape[1]) + 1
    last = jnp.max(jnp.where(layout.filled, slots, 0), axis=1)
    return jnp.where(last == 0, position, last)


def _by_chunk(x, chunk, *features):
    """[batch, slots, heads, *features] -> [batch, heads, chunks, chunk, *features]."""
    x = x.reshape(x.shape[0], -1, chunk, x.shape[2], *features)
    return jnp.moveaxis(x, 3, 1)


def _overlapping(x, chunk, recent):
    """[batch, recent + slots, heads, dim] -> [batch, heads, chunks, recent + chunk, dim]."""
    own = _by_chunk(x[:, recent:], chunk, x.shape[-1])
    if recent == 0:
        return own
    starts = chunk * jnp.arange(own.shape[2])[:, None] + jnp.arange(recent)
    before = jnp.moveaxis(x[:, starts], 3, 1)
    return jnp.concatenate([before, own], axis=3)


def _where(choose, new, old):
    return jax.tree.map(lambda a, b: jnp.where(choose, a, b), new, old)


def _dual(start, weights, momentum, xs, ds, of: Coefficients, scale, retention, precision):
    """`linear` of `forward` at every step of a chunk, from scores."""

    def dot(a, b):
        return jnp.matmul(a, b, precision=precision)

    def linear(i, h):
        weight = weights[i]["weight"]
        z = of.kept[:, None] * dot(h, weight) - dot(of.written * dot(h, xs[i].T), ds[i])
        if momentum:
            z += of.carried[:, None] * dot(h, momentum[i]["weight"])
        if scale is not None:
            z = (1 - scale)[:, None] * dot(h, start[i]["weight"]) + scale[:, None] * z
        if retention.kind != "none":
            z *= retention.factor(start[i]["weight"])
        if "bias" in weights[i]:
            z += _bias(start, weights, momentum, ds, of, scale, precision, i)
        return z

    return linear


def _bias(start, weights, momentum, ds, of, scale, precision, i):
    """The bias of the i-th layer at every step of a chunk, [chunk, out]."""
    bias = of.kept[:, None] * weights[i]["bias"]
    bias -= jnp.matmul(of.written, ds[i], precision=precision)
    if momentum:
        bias += of.carried[:, None] * momentum[i]["bias"]
    if scale is not None:
        bias = (1 - scale)[:, None] * start[i]["bias"] + scale[:, None] * bias
    return bias


def _materialised(start, weights, momentum, xs, ds, of, scale, retention, precision):
    """`linear` of `forward` at every step of a chunk, from the weights of every step."""

    def linear(i, h):
        a = of.kept[:, None, None] * weights[i]["weight"]
        a -= jnp.einsum("tj,ji,jo->tio", of.written, xs[i], ds[i], precision=precision)
        if momentum:
            a += of.carried[:, None, None] * momentum[i]["weight"]
        if scale is not None:
            first = start[i]["weight"]
            a = first + scale[:, None, None] * (a - first)
        z = jnp.einsum("ti,tio->to", h, retention.soft(a), precision=precision)
        if "bias" in weights[i]:
            z += _bias(start, weights, momentum, ds, of, scale, precision, i)
        return z

    return linear


def _stepped(weights, momentum, xs, ds, end: Coefficients, precision):
    """The weights (or the momentum) after a chunk."""
    after = []
    for i, layer in enumerate(weights):
        error = end.written[:, None] * ds[i]
        written = {"weight": jnp.matmul(xs[i].T, error, precision=precision)}
        if "bias" in layer:
            written["bias"] = error.sum(axis=0)
        new = {name: end.kept * w - written[name] for name, w in layer.items()}
        if momentum:
            new = {name: w + end.carried * momentum[i][name] for name, w in new.items()}
        after.append(new)
    return tuple(after)


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

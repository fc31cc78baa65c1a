"""One update chunk: the dual form, in which its writes act on its reads through scores.

The gradients of a chunk are taken at one anchor, so in every layer token j's is an outer product
of an input x_j and an error d_j that one batched pass gives for the whole chunk. A layer that step
t reads with answers an input h with

    h W_t = kept_t h W_0 + carried_t h S_0 - sum_j written_tj (h . x_j) d_j

and no array of the weights' size is made for a token. The `chunked` form and the kernels take the
same function, each with its own matrix products.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.neural_memory.chunks import Carry, Chunk, Fixed
from memseq.pallas_kernels.neural_memory.losses import Loss
from memseq.pallas_kernels.neural_memory.memory import Layer, Memory, forward, local_errors
from memseq.pallas_kernels.neural_memory.retention import BORDER, Retention

# product(kind, a, b): a b for "nn", a b^T for "nt", a^T b for "tn", of the last two axes
Product = Callable[[str, jax.Array, jax.Array], jax.Array]


def advance(
    carry: Carry,
    chunk: Chunk,
    fixed: Fixed,
    *,
    memory: Memory,
    loss: Loss,
    retention: Retention,
    anchor: str,
    read: str,
    outer_grad: str | tuple[str, int],
    product: Product,
) -> tuple[Carry, jax.Array]:
    """The memory after a chunk, and the chunk's reads [..., C, value_dim]."""
    own_anchor = carry.anchor is not None
    if chunk.restart is not None:
        begin = functools.partial(_where, chunk.restart)
        carry = Carry(
            begin(fixed.initial, carry.anchor) if own_anchor else None,
            begin(fixed.initial, carry.weights),
            jax.tree.map(lambda s: jnp.where(chunk.restart, 0, s), carry.momentum),
        )
    if chunk.cut is not None:
        carry = jax.tree.map(functools.partial(_constant_where, chunk.cut), carry)
    weights, momentum = carry.weights, carry.momentum
    start = carry.anchor if own_anchor else weights

    at = start
    if anchor == "decayed":  # chunks of one token
        at = jax.tree.map(lambda w: chunk.kept_end * w, start)
    seen = retention.view(at, at)
    if outer_grad == "stop_anchor":
        seen = jax.lax.stop_gradient(seen)
    xs, ds = local_errors(
        memory,
        lambda out: loss(out, chunk.value, chunk.threshold),
        _through(seen, product),
        [layer["weight"].shape[-1] for layer in seen],
        fixed.affine,
        chunk.key,
    )
    if outer_grad == "stop_writes":
        xs, ds = jax.lax.stop_gradient((xs, ds))

    if read == "chunk":
        linear = _through(retention.view(start, start), product)
    else:
        make = _dual if retention.scales else _materialised
        linear = make(start, weights, momentum, xs, ds, chunk, fixed, retention, product)
    out = forward(memory, len(weights), linear, fixed.affine, chunk.query)

    after = _stepped(weights, chunk.kept_end, xs, ds, chunk.written_end, product)
    if momentum:
        after = jax.tree.map(lambda w, s: w + chunk.carried_end * s, after, momentum)
        momentum = _stepped(momentum, chunk.held_end, xs, ds, chunk.added_end, product)
    border = after
    if fixed.scale_end is not None:
        border = jax.tree.map(lambda a, w: a + fixed.scale_end * (w - a), start, after)
    if retention.kind in BORDER:
        border = retention.border(border, fixed.initial)
    if border is not after:
        after = border if chunk.full is None else _where(chunk.full, border, after)
    if own_anchor and anchor != "call":
        start = after if chunk.full is None else _where(chunk.full, after, start)
    return Carry(start if own_anchor else None, after, momentum), out


def _where(choose, new, old):
    return jax.tree.map(lambda a, b: jnp.where(choose, a, b), new, old)


@jax.custom_jvp
def _constant_where(cut, x):
    """x, whose derivative is 0 where `cut`."""
    return x


@_constant_where.defjvp
def _constant_where_jvp(primals, tangents):
    (cut, x), (_, tangent) = primals, tangents
    return x, jnp.where(cut, 0, tangent)


def _through(weights: tuple[Layer, ...], product: Product):
    """`linear` of `forward` for these weights as they are."""

    def linear(i, h):
        z = product("nn", h, weights[i]["weight"])
        return z + weights[i]["bias"] if "bias" in weights[i] else z

    return linear


def _dual(start, weights, momentum, xs, ds, chunk: Chunk, fixed: Fixed, retention, product):
    """`linear` of `forward` at every step of a chunk, from scores."""

    def linear(i, h):
        scores = chunk.written * product("nt", h, xs[i])
        z = chunk.kept * product("nn", h, weights[i]["weight"]) - product("nn", scores, ds[i])
        if momentum:
            z += chunk.carried * product("nn", h, momentum[i]["weight"])
        if fixed.scale is not None:
            z = _moved(product("nn", h, start[i]["weight"]), z, fixed.scale)
        if retention.kind != "none":
            z *= retention.factor(start[i]["weight"])
        if "bias" in weights[i]:
            z += _bias(start, weights, momentum, ds, chunk, fixed, product, i)
        return z

    return linear


def _moved(a, w, scale):
    return (1 - scale) * a + scale * w


def _bias(start, weights, momentum, ds, chunk, fixed, product, i):
    """The bias of the i-th layer at every step of a chunk, [..., C, out]."""
    bias = chunk.kept * weights[i]["bias"] - product("nn", chunk.written, ds[i])
    if momentum:
        bias += chunk.carried * momentum[i]["bias"]
    return bias if fixed.scale is None else _moved(start[i]["bias"], bias, fixed.scale)


def _materialised(start, weights, momentum, xs, ds, chunk, fixed, retention, product):
    """`linear` of `forward` at every step of a chunk, from the weights of every step."""

    def each(x):  # [..., a, b] -> [..., 1, a, b]: the same at every step
        return x[..., None, :, :]

    def by_step(x):  # [..., C, 1] -> [..., C, 1, 1]
        return x[..., None]

    def linear(i, h):
        a = by_step(chunk.kept) * each(weights[i]["weight"])
        a -= product("tn", each(xs[i]), chunk.written[..., None] * each(ds[i]))
        if momentum:
            a += by_step(chunk.carried) * each(momentum[i]["weight"])
        if fixed.scale is not None:
            a = _moved(each(start[i]["weight"]), a, by_step(fixed.scale))
        z = product("nn", h[..., None, :], retention.soft(a))[..., 0, :]
        if "bias" in weights[i]:
            z += _bias(start, weights, momentum, ds, chunk, fixed, product, i)
        return z

    return linear


def _stepped(layers, kept, xs, ds, written, product):
    """kept * layers - sum_j written_j (gradient of token j)."""
    after = []
    for layer, x, d in zip(layers, xs, ds, strict=True):
        error = written * d
        new = {"weight": kept * layer["weight"] - product("tn", x, error)}
        if "bias" in layer:
            new["bias"] = kept * layer["bias"] - jnp.sum(error, axis=-2, keepdims=True)
        after.append(new)
    return tuple(after)

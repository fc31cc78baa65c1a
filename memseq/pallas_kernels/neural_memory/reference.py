"""The definition: a loop over tokens that differentiates the inner loss by `jax.grad`."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.segments import restarts
from memseq.pallas_kernels.neural_memory.losses import Loss
from memseq.pallas_kernels.neural_memory.memory import Memory, forward, through
from memseq.pallas_kernels.neural_memory.retention import Retention
from memseq.pallas_kernels.neural_memory.state import Inputs, MemoryState, entered


def reference(
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
    valid = jnp.ones((batch, time), bool) if inputs.valid is None else inputs.valid
    restart = jnp.zeros((batch, time), bool) if inputs.index is None else restarts(inputs.index)

    def grow(weights, affine, key, value, threshold):
        """The gradient of one pair's loss in the weights."""

        def pair_loss(weights):
            out = forward(memory, len(weights), through(weights, precision), affine, key)
            each = None if threshold is None else threshold[None]
            return loss(out, value, each).sum()

        return jax.grad(pair_loss)(weights)

    def one_head(arrays, shared, held, initial, affine, scale):
        """arrays: by time; shared: `valid` and `restart`; held: state; all without batch, heads."""

        def token(carry, now):
            (query, key, value, keep, steps, mixing, threshold), (valid, restart) = now
            before = carry
            weights, start, momentum, keys, values, count, position, chunks = carry
            weights, start = (_where(restart, initial, w) for w in (weights, start))
            momentum = jax.tree.map(lambda s: jnp.where(restart, 0, s), momentum)
            keys, values = (jnp.where(restart, 0, x) for x in (keys, values))
            count, position, chunks = (jnp.where(restart, 0, n) for n in (count, position, chunks))
            if isinstance(outer_grad, tuple):
                cut = (position == 0) & (chunks > 0) & (chunks % outer_grad[1] == 0)
                weights, start, momentum = _where(
                    cut,
                    jax.lax.stop_gradient((weights, start, momentum)),
                    (weights, start, momentum),
                )

            at = jax.tree.map(lambda w: keep * w, start) if anchor == "decayed" else start
            seen = retention.view(at, at)
            if outer_grad == "stop_anchor":
                seen = jax.lax.stop_gradient(seen)
            keys = jnp.concatenate([keys, key[None]])
            values = jnp.concatenate([values, value[None]])
            gradients = jax.vmap(grow, (None, None, 0, 0, None))(
                seen, affine, keys, values, threshold
            )
            if outer_grad == "stop_writes":
                gradients = jax.lax.stop_gradient(gradients)
            lag = jnp.arange(len(keys))[::-1]
            steps = jnp.where(lag <= count, steps[::-1], 0)  # in the order of keys
            write = jax.tree.map(lambda u: -jnp.tensordot(steps, u, 1), gradients)
            if momentum:
                write = momentum = jax.tree.map(lambda s, u: mixing * s + u, momentum, write)
            old, weights = weights, jax.tree.map(lambda w, u: keep * w + u, weights, write)

            def read_with(weights, scale):
                moved = jax.tree.map(lambda a, w: a + scale * (w - a), start, weights)
                return retention.view(moved, start)

            after = jnp.concatenate([jnp.ones((1,), scale.dtype), scale])  # after 0, 1, ... steps
            if read == "after":
                seen = read_with(weights, after[position + 1])
            elif read == "before":
                seen = read_with(old, after[position])
            else:
                seen = retention.view(start, start)
            out = forward(memory, len(seen), through(seen, precision), affine, query)

            border = position + 1 == update_chunk
            moved = jax.tree.map(lambda a, w: a + scale[-1] * (w - a), start, weights)
            weights = _where(border, retention.border(moved, initial), weights)
            if anchor != "call":
                start = _where(border, weights, start)
            carry = (
                weights,
                start,
                momentum,
                keys[1:],
                values[1:],
                jnp.minimum(count + 1, len(keys) - 1),
                jnp.where(border, 0, position + 1),
                chunks + border,
            )
            return _where(valid, carry, before), jnp.where(valid, out, 0)

        carry = (*held, jnp.zeros_like(held.position))
        carry, out = jax.lax.scan(token, carry, (arrays, shared))
        return out, MemoryState(*carry[:-1])

    by_time = (
        inputs.query,
        inputs.key,
        inputs.value,
        inputs.keep,
        inputs.step,
        inputs.momentum,
        inputs.threshold,
    )
    scale = inputs.position_scale
    if scale is None:
        scale = jnp.ones((inputs.query.shape[2], update_chunk), inputs.query.dtype)
    # of the state, what each head has for itself and where its axis is once the batch's is gone
    held_axes = MemoryState(0, 0, 0, 1, 1, None, None)
    by_head = jax.vmap(one_head, (1, None, held_axes, 0, 0, 0), (1, held_axes))
    by_row = jax.vmap(by_head, (0, 0, 0, None, None, None))
    out, held = by_row(by_time, (valid, restart), state, inputs.initial, inputs.affine, scale)
    untouched = (inputs.state.position < 0) & ~valid.any(axis=1)
    return out, held._replace(position=jnp.where(untouched, -1, held.position))


def _where(choose, new, old):
    return jax.tree.map(lambda a, b: jnp.where(choose, a, b), new, old)

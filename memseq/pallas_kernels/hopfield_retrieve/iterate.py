"""Steps of a state towards a fixed point, and three ways to take the gradient of where it ends."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.hopfield_retrieve.separation import confinement, normalize

GRADIENTS = ("unrolled", "implicit", "last")


def retrieve(
    attend: Callable,
    query: jax.Array,
    memory: dict,
    *,
    steps: int,
    gradient: str,
    tolerance: float | None,
    state_norm: str | None,
    energies: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """steps - 1 updates of the state, then one read.

    Args:
        attend: (state, memory, read) -> (read-out, conjugate [batch, queries, heads, group]);
            `read` says whether "stored" or "values" are summed.
        query: [batch, queries, heads, group, dim], the first state.
        memory: what `attend` needs, a dict of arrays and None: stored, values, beta and more.

    Returns:
        out [batch, queries, heads, group, value_dim], and of the state that each step started from
        the energy [batch, queries, heads, group, steps] (None unless `energies`).
    """

    def update(state, memory):
        new, conjugate = attend(state, memory, "stored")
        energy = _energy(state, conjugate, memory["beta"], state_norm) if energies else None
        return normalize(new, state_norm), energy

    if memory["values"] is None and gradient == "unrolled" and tolerance is None:
        # the read is a step like the others: in one scan one gradient of the patterns is held less
        out, found = _walk(update, query, memory, steps, tolerance)
        return out, None if found is None else jnp.moveaxis(found, 0, -1)
    walk = functools.partial(_walk, update, count=steps - 1, tolerance=tolerance)
    state, found = query, None
    if steps > 1:
        if gradient == "implicit":
            state, found = _fixed_point(update, walk, steps - 1, query, memory)
        else:
            state, found = walk(query, memory)
            if gradient == "last":
                state, found = jax.lax.stop_gradient((state, found))
    if memory["values"] is None:
        out, conjugate = attend(state, memory, "stored")
        out = normalize(out, state_norm)
    else:
        out, conjugate = attend(state, memory, "values")
    if not energies:
        return out, None
    energy = _energy(state, conjugate, memory["beta"], state_norm)[..., None]
    if found is not None:
        energy = jnp.concatenate([jnp.moveaxis(found, 0, -1), energy], axis=-1)
    return out, energy


def _energy(state, conjugate, beta, state_norm):
    return confinement(state, state_norm) - conjugate / beta


def _walk(update, state, memory, count, tolerance):
    """`count` updates, of each row only until it has moved by no more than `tolerance`."""

    def step(state, _):
        return update(state, memory)

    if tolerance is None:
        return jax.lax.scan(step, state, None, length=count)

    def step_if_moving(carry, _):
        state, moving, energy = carry

        def move():
            new, new_energy = update(state, memory)
            far = jnp.abs(new - state).max(-1) > tolerance
            kept = jnp.where(moving[..., None], new, state)
            return kept, moving & far, energy if new_energy is None else new_energy

        carry = jax.lax.cond(jnp.any(moving), move, lambda: (state, moving, energy))
        return carry, carry[2]

    shapes = jax.eval_shape(update, state, memory)[1]
    energy = None if shapes is None else 0 * state[..., 0]
    moving = state[..., 0] == state[..., 0]
    (state, _, _), energies = jax.lax.scan(
        step_if_moving, (state, moving, energy), None, length=count
    )
    return state, energies


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fixed_point(update, walk, count, query, memory):
    """Where the steps lead, with the gradient of a fixed point: it does not depend on the query.

    At state = f(state, memory) a cotangent g of the state becomes that of f's memory with
    u = g + J^T u, J the derivative of f in the state; as many terms of its series are summed as
    steps were taken.
    """
    return walk(query, memory)


def _fixed_point_forward(update, walk, count, query, memory):
    state, energies = walk(query, memory)
    return (state, energies), (state, memory)


def _fixed_point_backward(update, walk, count, kept, cotangents):
    state, memory = kept
    _, pull_state = jax.vjp(lambda state: update(state, memory)[0], state)
    given = cotangents[0]
    summed = jax.lax.fori_loop(0, count, lambda _, u: given + pull_state(u)[0], given)
    arrays = {k: x for k, x in memory.items() if x is not None and x.dtype == state.dtype}
    _, pull_memory = jax.vjp(lambda arrays: update(state, memory | arrays)[0], arrays)
    found = pull_memory(summed)[0]
    return jnp.zeros_like(state), {k: found.get(k) for k in memory}


_fixed_point.defvjp(_fixed_point_forward, _fixed_point_backward)

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
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """steps - 1 updates of the state, then one read.

    Args:
        attend: (state, memory, read) -> (read-out, conjugate [batch, queries, heads, group]);
            `read` says whether "stored" or "values" are summed.
        query: [batch, queries, heads, group, dim], the first state.
        memory: what `attend` needs, a dict of arrays and None: stored, values, beta and more.

    Returns:
        out [batch, queries, heads, group, value_dim], of the state that each step started from
        the energy [batch, queries, heads, group, steps] (None unless `energies`), and
        memory["stored"] for the next tile of queries, see `follow`.
    """
    lead = fixed = memory["stored"]

    def update(state, memory):
        new, conjugate = attend(state, memory, "stored")
        energy = _energy(state, conjugate, memory["beta"], state_norm) if energies else None
        return normalize(new, state_norm), energy

    if memory["values"] is None and gradient == "unrolled" and tolerance is None:
        # the read is a step like the others: in one scan one gradient of the patterns is held less
        out, found, lead = _walk(update, query, memory, steps, tolerance, lead)
        return out, None if found is None else jnp.moveaxis(found, 0, -1), lead
    walk = functools.partial(_walk, update, count=steps - 1, tolerance=tolerance)
    state, found = query, None
    if steps > 1:
        if gradient == "implicit":
            state, found = _fixed_point(update, walk, steps - 1, query, memory)
        elif gradient == "last":
            state, found, _ = jax.lax.stop_gradient(walk(query, memory))
        else:
            state, found, lead = walk(query, memory, lead=lead)
    memory = memory | {"stored": follow(fixed, lead)}
    if memory["values"] is None:
        out, conjugate = attend(state, memory, "stored")
        out = normalize(out, state_norm)
    else:
        out, conjugate = attend(state, memory, "values")
    lead = follow(lead, lead)
    if not energies:
        return out, None, lead
    energy = _energy(state, conjugate, memory["beta"], state_norm)[..., None]
    if found is not None:
        energy = jnp.concatenate([jnp.moveaxis(found, 0, -1), energy], axis=-1)
    return out, energy, lead


@jax.custom_jvp
def follow(value: jax.Array, lead: jax.Array) -> jax.Array:
    """`value`, with the tangent of `lead`: the same array, but carried through loops.

    The gradient of what the body of a loop reads from outside is added up in an array of its own in
    each of several nested loops. That of what all of them carry, and return as it came, is one.
    But what is carried is kept at every turn for the backward pass: so `value` is read from outside
    in its place. A derivative of the derivative takes its part in that.
    """
    return value


follow.defjvp(lambda primals, tangents: (primals[0], tangents[1]))


def _energy(state, conjugate, beta, state_norm):
    return confinement(state, state_norm) - conjugate / beta


def _walk(update, state, memory, count, tolerance, lead=None):
    """`count` updates, of each row only until it has moved by no more than `tolerance`.

    lead: memory["stored"], see `follow`; None where it is not differentiated.

    Returns the state, the energies and the lead.
    """

    def seen(lead):
        return memory if lead is None else memory | {"stored": follow(memory["stored"], lead)}

    def on(lead):
        return None if lead is None else follow(lead, lead)

    def step(carry, _):
        state, lead = carry
        new, energy = update(state, seen(lead))
        return (new, on(lead)), energy

    if tolerance is None:
        (state, lead), energies = jax.lax.scan(step, (state, lead), None, length=count)
        return state, energies, lead

    def step_if_moving(carry, _):
        state, moving, energy, lead = carry

        def move():
            new, new_energy = update(state, seen(lead))
            far = jnp.abs(new - state).max(-1) > tolerance
            kept = jnp.where(moving[..., None], new, state)
            return kept, moving & far, energy if new_energy is None else new_energy

        carry = jax.lax.cond(jnp.any(moving), move, lambda: (state, moving, energy))
        return (*carry, on(lead)), carry[2]

    shapes = jax.eval_shape(update, state, memory)[1]
    energy = None if shapes is None else 0 * state[..., 0]
    moving = state[..., 0] == state[..., 0]
    (state, _, _, lead), energies = jax.lax.scan(
        step_if_moving, (state, moving, energy, lead), None, length=count
    )
    return state, energies, lead


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fixed_point(update, walk, count, query, memory):
    """Where the steps lead, with the gradient of a fixed point: it does not depend on the query.

    At state = f(state, memory) a cotangent g of the state becomes that of f's memory with
    u = g + J^T u, J the derivative of f in the state; as many terms of its series are summed as
    steps were taken.
    """
    return walk(query, memory)[:2]


def _fixed_point_forward(update, walk, count, query, memory):
    state, energies, _ = walk(query, memory)
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

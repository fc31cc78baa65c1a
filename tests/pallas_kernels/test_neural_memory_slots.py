"""Lattice's slots: what one step writes, and a chunk of steps as gated linear attention (E20, E21).

A memory is m slots s_i, read as sum_i q_i s_i / |s_i| and trained to give the value v for the key
k [m] (Karami and Mirrokni 2025, arXiv:2504.05646). There is no layer of it; what the operations
must be for one is tested here.
"""

import jax
import jax.numpy as jnp
import numpy as np

from memseq.pallas_kernels import linear_attention

SLOTS, DIM, TIME = 5, 4, 9


def units(slots):
    return slots / np.linalg.norm(slots, axis=-1, keepdims=True)


def orthogonal_step(slots, key, error):
    """Each slot's step along the part of the error that is orthogonal to it, slot by slot."""
    steps = []
    for slot, k in zip(slots, key, strict=True):
        unit = slot / np.linalg.norm(slot)
        steps.append(k / np.linalg.norm(slot) * (error - unit * (unit @ error)))
    return np.array(steps)


def test_a_slot_is_written_with_what_is_orthogonal_to_it():
    """E20: the gradient of |v - sum_i k_i s_i / |s_i||^2 / 2, and none of it along a slot."""
    rng = np.random.default_rng(0)
    slots, key, value = (rng.normal(size=n) for n in ((SLOTS, DIM), SLOTS, DIM))

    def loss(slots):
        unit = slots / jnp.linalg.norm(slots, axis=-1, keepdims=True)
        return jnp.sum((value - key @ unit) ** 2) / 2

    with jax.enable_x64(True):
        found = -np.asarray(jax.grad(loss)(jnp.asarray(slots)))
    want = orthogonal_step(slots, key, value - key @ units(slots))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-12)
    np.testing.assert_allclose((found * slots).sum(-1), 0, rtol=0, atol=1e-12)
    assert np.abs(found - np.outer(key, value - key @ units(slots))).max() > 0.1  # not the rest


def test_a_chunk_of_slots_is_gated_linear_attention():
    """E21: with its share c = k_i (s_i . error) taken at the chunk's start, a slot decays by 1 - c.

    The first step is then exactly the orthogonal one; later ones are not, as the slots have moved.
    """
    rng = np.random.default_rng(1)
    slots = units(rng.normal(size=(SLOTS, DIM)))
    errors, query = rng.normal(size=(TIME, DIM)), rng.normal(size=(TIME, SLOTS))
    along = errors @ slots.T
    key = np.sign(along) * rng.uniform(0.05, 0.2, size=along.shape)  # so that no slot grows
    share = key * along
    assert 0 <= share.min() and share.max() < 1

    state, states = slots, []
    for k, h, projected in zip(key, errors, along, strict=True):
        state = state + k[:, None] * (h - projected[:, None] * state)
        states.append(state)
    first = slots + orthogonal_step(slots, key[0], errors[0])
    np.testing.assert_allclose(states[0], first, rtol=0, atol=1e-12)
    second = states[0] + orthogonal_step(states[0], key[1], errors[1])
    assert np.abs(states[1] - second).max() > 1e-3

    with jax.enable_x64(True):
        arrays = (x[None, :, None] for x in (query, key, errors, np.log1p(-share)))
        start = slots[None, None]
        out, after = jax.jit(lambda *x: linear_attention(*x, scale=1.0, initial_state=start))(
            *arrays
        )
    np.testing.assert_allclose(after[0, 0], states[-1], rtol=0, atol=1e-12)
    want = np.einsum("tm,tmd->td", query, states)
    np.testing.assert_allclose(out[0, :, 0], want, rtol=0, atol=1e-12)

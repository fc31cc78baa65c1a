"""What the steps of `hopfield_retrieve` do to the energy, and how exactly they recall."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memseq.pallas_kernels import hopfield_retrieve
from tests.pallas_kernels.harness import assert_same


def descent(**options):
    """(relative excess of the energy over what a step must lower it by) of many instances."""

    def one(query, stored, beta, alpha, sink, part):
        extra = {"alpha": alpha} if options["separation"] == "entmax" else {}
        extra |= {"sink": sink} if options["separation"] == "softmax_n" else {}
        states, energies = [query], []
        for _ in range(7):
            state, energy = hopfield_retrieve(
                states[-1][None, None, None],
                stored[None, :, None],
                beta=beta,
                mask=part[None],
                return_energy=True,
                implementation="reference",
                **options,
                **extra,
            )
            states.append(state[0, 0, 0])
            energies.append(energy[0, 0, 0, 0])
        states, energies = jnp.stack(states[:-1]), jnp.stack(energies)
        moved = ((states[1:] - states[:-1]) ** 2).sum(-1)
        excess = energies[1:] - energies[:-1] + moved / 2
        # in float32 an energy is a difference of two larger numbers
        size = 1 + jnp.abs(energies[:-1]) + (states[:-1] ** 2).sum(-1)
        return excess / size

    return jax.jit(jax.vmap(one))


INSTANCES = 1000
DESCENT = {
    "softmax": {"separation": "softmax"},
    "softmax_n": {"separation": "softmax_n"},
    "entmax": {"separation": "entmax"},
    "budget": {"separation": "budget", "budget": 2},
}


@pytest.mark.parametrize("name", DESCENT)
def test_every_step_lowers_the_energy_by_half_its_square(name):
    """H1, on 10,000 random instances a separation: any start, temperature and set of patterns."""
    call = descent(**DESCENT[name])
    narrow = descent(**DESCENT[name])

    @settings(max_examples=10)
    @given(seed=st.integers(0, 2**32 - 1))
    def check(seed):
        rng = np.random.default_rng(seed)
        lead = (INSTANCES,)
        scale = np.exp(rng.uniform(-2, 1, (INSTANCES, 1, 1)))
        instances = (
            rng.normal(size=(*lead, 6)) * 2,
            rng.normal(size=(*lead, 9, 6)) * scale,
            np.exp(rng.uniform(np.log(1e-2), np.log(30), lead)),
            np.where(rng.random(lead) < 0.2, 2.0, rng.uniform(1, 2, lead)),  # 2 is sparsemax
            rng.normal(size=lead) * 5,
            (rng.random((*lead, 9)) < 0.7) | (np.arange(9) == 0),
        )
        with jax.enable_x64(True):
            excess = np.asarray(call(*instances))
        assert np.isfinite(excess).all() and excess.max() <= 1e-12
        excess = np.asarray(narrow(*(x if x.dtype == bool else np.float32(x) for x in instances)))
        assert np.isfinite(excess).all() and excess.max() <= 1e-5

    check()


@pytest.mark.parametrize("state_norm", ["l2", "layer", "tanh"])
def test_normalized_states_lower_their_energy_too(state_norm):
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(1, 12, 1, 6))
    query = rng.normal(size=(1, 200, 1, 6)) * 0.1
    with jax.enable_x64(True):
        _, energies = hopfield_retrieve(
            query, stored, beta=2.0, steps=9, state_norm=state_norm, return_energy=True
        )
    change = np.diff(np.asarray(energies)[..., 1:])
    assert np.isfinite(change).all() and change.min() < -1e-3
    assert change.max() <= (1e-5 if state_norm == "layer" else 1e-12)  # its eps is of 1e-5


def test_sparse_recall_is_exact():
    """S2: one step from a pattern, where the margin fits between it and all others."""
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(1, 200, 1, 64))
    products = stored[0, :, 0] @ stored[0, :, 0].T
    apart = np.diag(products) - (products - np.diag(np.full(200, np.inf))).max(-1)
    assert apart.min() > 0
    with jax.enable_x64(True):
        for separation, alpha in (("entmax", 1.5), ("sparsemax", 2.0)):
            beta = 1.05 / ((alpha - 1) * apart.min())
            out = hopfield_retrieve(stored, stored, beta=beta, separation=separation, alpha=alpha)
            assert_same(out, stored)
            soft = hopfield_retrieve(stored, stored, beta=beta)
            assert np.linalg.norm(soft - stored, axis=-1).max() > 1
            loose = hopfield_retrieve(
                stored, stored, beta=0.9 * beta / 1.05, separation=separation, alpha=alpha
            )
            assert (np.abs(loose - stored).max(axis=(0, 2, 3)) > 0).sum() >= 1

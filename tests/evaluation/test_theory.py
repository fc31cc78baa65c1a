"""Theory of Hopfield networks against the network itself: `hopfield_retrieve` obeys its bounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memseq.evaluation import theory
from memseq.pallas_kernels import hopfield_retrieve

generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def sphere(rng, patterns, dim, radius):
    x = rng.normal(size=(patterns, dim))
    return radius * x / np.linalg.norm(x, axis=1, keepdims=True)


@jax.jit
def network(states, stored, beta):
    """One step, and the energies without constants, of states [n, dim] in float64."""
    out, energy = hopfield_retrieve(
        states[None, :, None],
        stored[None, :, None],
        beta=beta,
        return_energy=True,
        implementation="chunked",
    )
    return out[0, :, 0], energy[0, :, 0, 0]


def run(states, stored, beta):
    with jax.enable_x64(True):
        return [np.asarray(x) for x in network(states, stored, jnp.float64(beta))]


@settings(max_examples=30)
@given(rng=generators, log_beta=st.floats(-4, 3), scale=st.floats(0.1, 5))
def test_energy_lies_between_its_bounds_on_the_convex_hull(rng, log_beta, scale):
    """H2, and that the network's energy is the closed form without its constants."""
    stored, beta = rng.normal(size=(12, 7)) * scale, np.exp(log_beta)
    states = rng.dirichlet(np.full(12, 0.3), size=40) @ stored
    energy = theory.energy(states, stored, beta)
    m = theory.largest_norm(stored)
    assert (energy >= -1e-9 * m**2).all() and (energy <= 2 * m**2 * (1 + 1e-12)).all()
    out, found = run(states, stored, beta)
    constant = np.log(12) / beta + m**2 / 2
    np.testing.assert_allclose(found + constant, energy, rtol=0, atol=1e-9 * (1 + m**2 + 1 / beta))
    np.testing.assert_allclose(out, theory.step(states, stored, beta), rtol=0, atol=1e-9 * m)


@settings(max_examples=60)
@given(rng=generators, log_beta=st.floats(-2, 2), spread=st.floats(0.01, 1))
def test_one_step_error_is_within_its_bound(rng, log_beta, spread):
    """H3, first part, for every pattern and any start near it."""
    stored, beta = sphere(rng, 12, 16, 4.0), np.exp(log_beta)
    states = stored + spread * rng.normal(size=stored.shape)
    ends = stored
    for _ in range(300):
        ends = theory.step(ends, stored, beta)
    delta = np.maximum(
        np.linalg.norm(states - stored, axis=1), np.linalg.norm(ends - stored, axis=1)
    )
    out, _ = run(states, stored, beta)
    error = np.linalg.norm(out - stored, axis=1)
    assert (error <= theory.one_step_error_bound(stored, beta, delta) + 1e-12).all()


@settings(max_examples=40)
@given(rng=generators, beta=st.floats(0.5, 4), radius=st.floats(3, 8))
def test_well_separated_patterns_have_a_fixed_point_where_the_theory_says(rng, beta, radius):
    """H3, second part: its distance, and that the step contracts around it."""
    stored = sphere(rng, 12, 16, radius)
    chosen = np.flatnonzero(theory.well_separated(stored, beta))
    ends = stored
    for _ in range(100):
        ends, _ = run(ends, stored, beta)
    error = np.linalg.norm(ends - stored, axis=1)
    assert (error[chosen] <= theory.fixed_point_error_bound(stored, beta)[chosen] + 1e-12).all()
    delta = theory.contraction_radius(stored, beta)
    assert (error[chosen] <= delta + 1e-12).all()
    bound = theory.jacobian_bound(stored, beta, delta)
    away = rng.normal(size=stored.shape)
    near = stored + delta * rng.random((12, 1)) * away / np.linalg.norm(away, axis=1, keepdims=True)
    for i in chosen:
        norm = np.linalg.norm(theory.jacobian(near[i], stored, beta), 2)
        assert norm <= bound[i] + 1e-12 and bound[i] < 1


def test_separated_instances_are_among_those_tried():
    stored = sphere(np.random.default_rng(0), 12, 16, 6.0)
    assert theory.well_separated(stored, 2.0).all()
    assert not theory.well_separated(stored, 0.01).any()


def test_jacobian_is_the_derivative_of_the_network():
    rng = np.random.default_rng(0)
    stored, state = rng.normal(size=(9, 5)), rng.normal(size=5)
    with jax.enable_x64(True):
        found = jax.jacfwd(lambda s: network(s[None], stored, 1.3)[0][0])(state)
    np.testing.assert_allclose(found, theory.jacobian(state, stored, 1.3), atol=1e-12)


@pytest.mark.parametrize(
    "dim, beta, radius, c", [(20, 1, 3, 3.1546), (75, 1, 1, 1.3719)], ids=["K=3", "K=1"]
)
def test_capacity_constants(dim, beta, radius, c):
    """H4: the two examples of the paper's theorem 3."""
    np.testing.assert_allclose(theory.capacity_base(dim, beta, radius), c, atol=1e-3)
    bound = theory.capacity_lower_bound(dim, beta, radius)
    np.testing.assert_allclose(bound, np.sqrt(1e-3) * c ** ((dim - 1) / 4), rtol=2e-3)
    for message, changes in (("dim", {"dim": 1}), ("beta", {"beta": 0})):
        with pytest.raises(ValueError, match=f"^{message}: expected"):
            theory.capacity_base(**{"dim": dim, "beta": beta, "radius": radius} | changes)


@pytest.mark.parametrize("dim, low, high", [(12, 0, 0.05), (20, 0.95, 1)])
def test_capacity_grows_exponentially(dim, low, high):
    """H5: 4,000 patterns on the sphere of radius sqrt(dim - 1); one step from a noisy pattern."""
    rng = np.random.default_rng(0)
    radius = np.sqrt(dim - 1)
    stored = sphere(rng, 4000, dim, radius)
    states = stored[:400] + 0.3 * rng.normal(size=(400, dim))
    out, _ = run(states, stored, 1.0)
    success = (np.linalg.norm(out - stored[:400], axis=1) < 0.1 * radius).mean()
    assert low <= success <= high


@pytest.mark.parametrize("beta, points", [(0.01, 1), (0.2, 16)])
def test_metastable_states(beta, points):
    """H5: 16 clusters of 16 patterns: one fixed point, then one a cluster."""
    rng = np.random.default_rng(0)
    centres = sphere(rng, 16, 64, 8.0)
    stored = (centres[:, None] + 0.25 * rng.normal(size=(16, 16, 64))).reshape(256, 64)
    found = theory.fixed_points(stored, beta)
    assert len(found) == points
    moved, _ = run(found, stored, beta)
    np.testing.assert_allclose(moved, found, atol=1e-6)


def test_k90_tells_the_regimes_apart():
    stored = sphere(np.random.default_rng(0), 256, 64, 8.0)
    counts = [theory.k90(theory.weights(stored, stored, b)).mean() for b in (0.001, 0.1, 0.3)]
    assert counts[0] > 225 and 50 < counts[1] < 180 and counts[2] < 1.5
    np.testing.assert_array_equal(theory.k90(np.array([[0.5, 0.3, 0.2], [0, 0, 0]])), [3, 0])
    np.testing.assert_array_equal(theory.k90(np.eye(3)), 1)


def test_kurtosis():
    """S4: 3 for a normal distribution, 1 for a coin, much where one value stands out."""
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(theory.kurtosis(rng.normal(size=200_000)), 3, atol=0.1)
    np.testing.assert_allclose(theory.kurtosis(np.array([[1.0, -1, 1, -1]] * 2), axis=1), 1)
    assert theory.kurtosis(np.append(rng.normal(size=999), 100.0)) > 500


def test_retrieval_snr():
    target = np.array([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    found = np.array([[6.0, 8.0], [2.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(theory.retrieval_snr(found, target), [np.inf, 4.0, 0.0, 0.0])


def test_bad_patterns():
    with pytest.raises(ValueError, match=r"^stored: expected \[patterns, dim\]"):
        theory.separation(np.zeros((2, 3, 4)))
    assert theory.separation(np.ones((1, 3))) == np.inf

"""`ridge_readout`: its forms against exact solutions, and what conjugate gradients reach."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.pallas_kernels import linear_attention, ridge_readout
from memseq.pallas_kernels.ridge_readout import RidgeState
from memseq.pallas_kernels.ridge_readout.chunked import conjugate_gradients
from memseq.pallas_kernels.ridge_readout.shapes import Shape, example, forward_products
from tests.pallas_kernels import oracles_readout
from tests.pallas_kernels.harness import (
    PairsCase,
    assert_close,
    check_16_bit,
    check_agreement,
    correlated_keys,
    with_gradients,
)
from tests.pallas_kernels.test_bench import multiply_adds


@dataclasses.dataclass(frozen=True)
class Case(PairsCase):
    """gates: None, "head" or "step"; ridge: the least."""

    gates: str | None = None
    cosine: float = 0.5
    ridge: float = 0.25
    iterations: int = 30

    def arrays(self, rng):
        roots = rng.normal(size=(self.batch, self.heads, self.dim, self.dim))
        inputs = self.pairs(rng, self.cosine) | {
            # up to 1 and down to 0, both included
            "beta": rng.uniform(-0.2, 1.2, size=self.by_head).clip(0, 1),
            "log_decay": None,
            "ridge": self.ridge * (1 + rng.exponential(2.0, size=(self.heads, self.dim))),
            "initial_state": RidgeState(
                roots @ roots.swapaxes(-1, -2) / self.dim, self.memory(rng)["initial_state"]
            ),
        }
        return inputs | self.decay(rng, self.gates)

    def options(self):
        return super().options() | {"iterations": self.iterations}


CASES = {
    "one step": Case(1, "step"),
    "grouped heads, a step short of a chunk": Case(31, "head", heads=4, chunk_size=32, scale=1.0),
    "odd length, hard gates, short segments": Case(
        97, "step", longest=9, batch=3, heads=4, chunk_size=16
    ),
    "close keys, nothing decays": Case(65, None, 0.9, batch=1),
}


@pytest.mark.parametrize("name", CASES)
def test_forms_agree(name):
    inputs, options, rng = CASES[name].build()
    check_agreement(ridge_readout, oracles_readout.ridge_readout, inputs, options, rng)


@pytest.mark.slow
@pytest.mark.parametrize("time", [2, 64, 65, 200])
@pytest.mark.parametrize("decay", [None, "step"])
@pytest.mark.parametrize("longest", [None, 5, 80])
def test_forms_agree_everywhere(time, decay, longest):
    case = Case(time, decay, 0.9, longest=longest, batch=3, heads=4)
    inputs, options, rng = case.build(time)
    check_agreement(ridge_readout, oracles_readout.ridge_readout, inputs, options, rng)


def test_16_bit_inputs():
    inputs, options, rng = Case(40, "step", longest=17, batch=3, chunk_size=16).build()
    check_16_bit(ridge_readout, inputs, options, rng)


def test_a_large_ridge_is_gated_linear_attention():
    """E14 of the notes on neural memory; E13 and E15 are the two after it."""
    inputs, _, _ = Case(40, "step").build()
    memory = inputs.pop("initial_state").memory
    state = RidgeState(np.zeros((2, 2, 6, 6)), memory)
    ridge = np.full((2, 6), 1e9)
    with jax.enable_x64(True):
        inputs |= {"ridge": ridge, "initial_state": state}
        out, (_, after) = jax.jit(lambda x: ridge_readout(**x))(inputs)
        weighted = inputs["beta"][..., None] * inputs["value"]
        arrays = (inputs["query"], inputs["key"], weighted, inputs["log_decay"])
        want, memory = jax.jit(lambda *x: linear_attention(*x, initial_state=memory))(*arrays)
    assert_close(1e9 * np.asarray(out), want, 1e-7)
    assert_close(after, memory, 1e-12)


def test_what_it_holds_read_without_solving_is_gated_linear_attention():
    """E15: no step of conjugate gradients, so the query itself reads S_t, after every t."""
    inputs, _, _ = Case(10, "step").build()
    inputs["initial_state"] = RidgeState(np.zeros((2, 2, 6, 6)), inputs["initial_state"].memory)
    with jax.enable_x64(True):

        def after(last):
            ids = jnp.broadcast_to(jnp.where(jnp.arange(10) <= last, 0, -1), (2, 10))
            return ridge_readout(**inputs, segment_ids=ids.astype(jnp.int32))[1].memory

        memory = jax.jit(jax.vmap(after))(jnp.arange(10))
        weighted = inputs["beta"][..., None] * inputs["value"]
        arrays = (inputs["query"], inputs["key"], weighted, inputs["log_decay"])
        start = inputs["initial_state"].memory
        want, _ = jax.jit(lambda *x: linear_attention(*x, initial_state=start, scale=1.0))(*arrays)
    read = np.einsum("bthk,tbhkv->bthv", inputs["query"], memory)
    assert_close(read, want, 1e-12)


def test_without_decay_it_is_recursive_least_squares():
    """E13: W += (P k / (1 + k P k)) (v - W k)^T with P the inverse of ridge and gram."""
    inputs, _, _ = Case(40, heads=1, key_heads=1, batch=1, dim=4).build()
    del inputs["initial_state"]
    inputs |= {"beta": np.ones((1, 40, 1)), "query": inputs["key"]}
    with jax.enable_x64(True):
        out, _ = jax.jit(lambda x: ridge_readout(**x, scale=1.0, implementation="chunked"))(inputs)
    inverse, weights = np.diag(1 / inputs["ridge"][0]), np.zeros((4, 3))
    for t in range(40):
        k, v = inputs["key"][0, t, 0], inputs["value"][0, t, 0]
        gain = inverse @ k / (1 + k @ inverse @ k)
        weights = weights + np.outer(gain, v - k @ weights)
        inverse = inverse - np.outer(gain, inverse @ k)
        np.testing.assert_allclose(out[0, t, 0], k @ weights, rtol=0, atol=1e-10)


def test_pairs_are_recalled_that_a_sum_would_mix_up():
    """A small ridge returns the values of keys that lie close together, as long as they differ."""
    rng = np.random.default_rng(0)
    key = correlated_keys(rng, 1, 8, 1, 8, 0.9)
    value = rng.normal(size=(1, 8, 1, 3))
    ones, ridge = np.ones((1, 8, 1)), np.full((1, 8), 1e-6)
    options = {"scale": 1.0, "implementation": "chunked"}

    @jax.jit
    def write_then_read():
        _, state = ridge_readout(key, key, value, ones, None, ridge, **options)
        options["initial_state"] = state
        return ridge_readout(key, key, value, 0 * ones, None, ridge, **options)

    with jax.enable_x64(True):
        read, state = write_then_read()
        summed = np.einsum("btk,bkv->btv", key[:, :, 0], state.memory[:, 0])
    np.testing.assert_allclose(read, value, atol=1e-3)
    assert np.abs(summed - value[:, :, 0]).mean() > 1


def systems(rng, condition, size=16, count=20):
    """Symmetric matrices with eigenvalues between 1 / condition and 1, and right sides."""
    bases = np.linalg.qr(rng.normal(size=(count, size, size)))[0]
    values = np.geomspace(1 / condition, 1, size)
    return bases * values @ bases.swapaxes(-1, -2), rng.normal(size=(count, size))


@pytest.mark.parametrize("condition", [9.0, 1e2, 1e4])
def test_error_after_some_iterations_is_as_documented(condition):
    matrices, right = systems(np.random.default_rng(0), condition, size=60)
    exact = np.linalg.solve(matrices, right[..., None])[..., 0]
    rate = (np.sqrt(condition) - 1) / (np.sqrt(condition) + 1)
    with jax.enable_x64(True):
        for iterations in (3, 10, 30):
            x = conjugate_gradients(
                lambda x: jnp.einsum("nij,nj->ni", matrices, x),
                jnp.asarray(right),
                diagonal=jnp.ones_like(right),
                iterations=iterations,
            )
            error = x - exact

            def energy(x):
                return np.sqrt(np.einsum("ni,nij,nj->n", x, matrices, x))

            assert np.isfinite(error).all()
            assert (energy(error) <= 2 * rate**iterations * energy(exact) + 1e-12).all()


def test_conjugate_gradients_stop_where_they_are_done():
    """Right sides of 0, tiny and huge size, and far more iterations than there are dimensions."""
    matrices, right = systems(np.random.default_rng(0), 100.0, size=8, count=4)
    right *= np.array([[0.0], [1e-30], [1e30], [1.0]])

    def solve(right, iterations):
        return conjugate_gradients(
            lambda x: jnp.einsum("nij,nj->ni", matrices.astype(np.float32), x, precision="highest"),
            right.astype(np.float32),
            diagonal=jnp.ones_like(right, dtype=np.float32),
            iterations=iterations,
        )

    exact = np.linalg.solve(matrices, right[..., None])[..., 0]
    for row, want in zip(solve(right, 500), exact, strict=True):
        assert_close(row, want, 1e-4)
    alone = np.where(np.arange(4)[:, None] == 3, right, 0)
    np.testing.assert_array_equal(solve(alone, 500)[3], solve(right, 500)[3])


def test_hard_inputs_stay_finite():
    """One key again and again, no decay and a ridge of 1e-4, in float32."""
    rng = np.random.default_rng(0)
    inputs = {
        "query": rng.normal(size=(1, 128, 1, 4)),
        "key": np.repeat(correlated_keys(rng, 1, 1, 1, 4, 0), 128, axis=1),
        "value": rng.normal(size=(1, 128, 1, 3)),
        "beta": np.ones((1, 128, 1)),
        "ridge": np.full((1, 4), 1e-4),
    }
    inputs = jax.tree.map(lambda x: x.astype(np.float32), inputs)

    def call(inputs):
        return ridge_readout(**inputs, log_decay=None, implementation="chunked")[0]

    # read where something was written: elsewhere the solution is the query over the ridge
    inputs["query"] = inputs["key"]
    cotangent = rng.normal(size=(1, 128, 1, 3))
    out, gradients = jax.jit(with_gradients(call))(inputs, cotangent)
    means = np.cumsum(inputs["value"], axis=1) / (np.arange(1, 129)[:, None, None] + 1e-4)
    assert_close(out, means / 2, 1e-3)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_products_are_those_that_the_chunked_form_takes():
    shape = Shape(2, 64, 2, 2, 6, 5, None)
    inputs = jax.eval_shape(lambda: example(shape, jax.random.key(0)))

    def taken(iterations):
        def call(inputs):
            options = {"chunk_size": 8, "iterations": iterations, "implementation": "chunked"}
            return ridge_readout(**inputs, **options)

        return multiply_adds(jax.make_jaxpr(call)(inputs).jaxpr)

    # the program holds the solution and its transpose, and a product with the system for each
    product = (taken(5) - taken(4)) // 2
    counted = [forward_products(shape, 8, n) for n in (0, 1)]
    assert product == counted[1] - counted[0]
    assert counted[0] == taken(4) - 2 * (4 + 1) * product


def test_no_matrix_is_made_for_every_step():
    """Of a program with its gradients, the largest array is a matrix a chunk."""
    inputs, options, _ = Case(128, "step", dim=64, chunk_size=16, batch=1).build()
    shapes = jax.eval_shape(lambda x: ridge_readout(**x, **options), inputs)
    cotangents = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    call = with_gradients(lambda x: ridge_readout(**x, **options, implementation="chunked"))
    text = jax.jit(call).lower(inputs, cotangents).as_text()
    arrays = set(re.findall(r"tensor<((?:\d+x)+)f32>", text))
    sizes = [np.prod([int(n) for n in array.split("x")[:-1]]) for array in arrays]
    assert max(sizes) == 2 * (128 // 16) * 64 * (64 + 3)

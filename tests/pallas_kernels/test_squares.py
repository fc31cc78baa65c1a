"""Matrices of several heads side by side, as the TPU kernels keep them, and their inverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.pallas_kernels.common.mosaic_tpu import blocks, squares
from tests.pallas_kernels.harness import correlated_keys


def side_by_side(matrices, side):
    """[H, C, C] -> [H / side, C, side C]."""
    heads, chunk, _ = matrices.shape
    each = matrices.reshape(heads // side, side, chunk, chunk)
    return np.moveaxis(each, 1, 2).reshape(heads // side, chunk, side * chunk)


@pytest.mark.parametrize(
    ("heads", "chunk", "side"), [(8, 64, 2), (3, 64, 1), (6, 32, 3), (16, 16, 8), (2, 128, 1)]
)
def test_as_many_heads_as_fit_a_register(heads, chunk, side):
    assert squares.side_by_side(heads, chunk) == side


def test_products_are_those_of_each_head():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6, 16, 5)).astype(np.float32)
    x = rng.normal(size=(6, 16, 16)).astype(np.float32)
    (found,) = blocks.scores((6,), (a,), b, 3)
    np.testing.assert_allclose(found, side_by_side(a @ b.swapaxes(1, 2), 3), rtol=1e-4, atol=1e-5)
    found = blocks.weighted(6, side_by_side(x, 3), b, 3)
    np.testing.assert_allclose(found, x @ b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [4, 8, 32])
def test_rows_of_later_halves(size):
    x = jnp.arange(2.0 * 64 * 3).reshape(2, 64, 3)
    half = squares.half(size)
    rows = squares.later(half, x)
    if size == 4:  # a register's rows stay together
        np.testing.assert_array_equal(rows, x)
    else:
        wanted = np.flatnonzero(np.arange(64) & size)
        np.testing.assert_array_equal(rows, x[:, wanted])
    np.testing.assert_array_equal(
        squares.put_later(half, rows, jnp.zeros_like(x)) + 0,
        x * (np.ones((64, 1)) if size == 4 else (np.arange(64) & size > 0)[:, None]),
    )


@pytest.mark.parametrize(("passes", "limit"), [(3, 3e-4), (6, 3e-6)])
@pytest.mark.parametrize(("heads", "chunk"), [(4, 64), (3, 64), (8, 16)])
def test_inverse_of_correlated_keys(heads, chunk, passes, limit):
    rng = np.random.default_rng(chunk)
    keys = correlated_keys(rng, 1, chunk, heads, 32, 0.9)[0].swapaxes(0, 1)
    system = 2 * keys @ keys.swapaxes(1, 2)
    side = squares.side_by_side(heads, chunk)
    a = jnp.asarray(side_by_side(system, side), jnp.float32)  # above the diagonal too
    found, pull = jax.vjp(lambda a: blocks.unit_lower_inverse(passes, a), a)
    exact = np.linalg.inv(np.eye(chunk) + np.tril(system, -1))
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - side_by_side(exact, side)) < limit * np.linalg.norm(exact)
    cotangent = rng.normal(size=exact.shape)
    turned = exact.swapaxes(1, 2)
    wanted = side_by_side(-np.tril(turned @ cotangent @ turned, -1), side)
    (gradient,) = pull(jnp.asarray(side_by_side(cotangent, side), jnp.float32))
    assert np.isfinite(gradient).all()
    assert np.linalg.norm(gradient - wanted) < limit * np.linalg.norm(wanted)

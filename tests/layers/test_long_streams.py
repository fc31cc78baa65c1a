"""A hundred thousand tokens, one after another, through a state of constant size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import REGISTRY

TOKENS, COMPARED, FEATURES = 100_000, 2_000, 16
# memories with a transition a token; those that train at every token take minutes each
OPERATIONS = (
    "linear_attention",
    "delta_rule",
    "diagonal_plus_low_rank",
    "momentum_delta_rule",
    "ridge_readout",
    "log_linear_attention",
)
NAMES = [name for name, layer in REGISTRY.items() if layer.OPERATION in OPERATIONS]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_stream(name):
    """Finite throughout, and at first what one parallel call gives."""
    layer = REGISTRY[name](FEATURES)
    x = jax.random.normal(jax.random.key(1), (1, TOKENS, FEATURES))
    shapes = jax.eval_shape(layer.init, jax.random.key(2), x[:, :4])
    draw = np.random.default_rng(3).normal
    params = jax.tree.map(lambda a: jnp.asarray(0.2 * draw(size=a.shape), a.dtype), shapes)

    @jax.jit
    def stream(params, x):
        def step(state, token):
            y, state = layer.apply(params, token[:, None], state)
            return state, y[:, 0]

        # a scan's state has one shape and one dtype throughout, or it does not trace
        state, y = jax.lax.scan(step, layer.init_state(1), jnp.moveaxis(x, 1, 0))
        return jnp.moveaxis(y, 0, 1), state

    y, state = stream(params, x)
    for leaf in (y, *jax.tree.leaves(state)):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    counted = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert counted == layer.state_bytes(1)
    want, _ = jax.jit(layer.apply)(params, x[:, :COMPARED])
    error = np.abs(np.asarray(y[:, :COMPARED] - want)).max(axis=-1)
    assert np.isfinite(error).all()
    np.testing.assert_allclose(error, 0, rtol=0, atol=1e-3 * np.abs(want).max())

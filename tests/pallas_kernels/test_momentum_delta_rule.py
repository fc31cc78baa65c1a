"""`momentum_delta_rule`: its forms against the equations, and the rules it contains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.pallas_kernels import delta_rule, momentum_delta_rule, neural_memory
from memseq.pallas_kernels.neural_memory import Loss, Memory
from tests.pallas_kernels import oracles
from tests.pallas_kernels.harness import (
    PairsCase,
    assert_close,
    check_16_bit,
    check_agreement,
    hard_decay,
)


@dataclasses.dataclass(frozen=True)
class Case(PairsCase):
    """gates: "head", "step" or "momentum" (no decay)."""

    gates: str = "step"
    cosine: float = 0.5
    erase: str = "decayed"

    def arrays(self, rng):
        inputs = self.pairs(rng, self.cosine) | {
            # down to 0 and up to 1, both included
            "beta": rng.uniform(-0.2, 1.2, size=self.by_head).clip(0, 1),
            "step": rng.uniform(-0.2, 1.2, size=self.by_head).clip(0, 1),
            "initial_state": rng.normal(size=(self.batch, self.heads, 2 * self.dim, self.values)),
        }
        if self.gates == "head":
            inputs |= self.decay(rng, "head")
            inputs["log_momentum"] = -rng.exponential(0.5, size=self.heads)
        else:
            inputs["log_momentum"] = hard_decay(rng, self.by_head)
            inputs |= self.decay(rng, "step" if self.gates == "step" else None)
        return inputs

    def options(self):
        return super().options() | {"erase": self.erase}


CASES = {
    "a step short of a chunk, gates of heads, grouped heads": Case(63, "head", heads=4),
    "odd length, segments, close keys": Case(97, cosine=0.9, longest=40, batch=3, chunk_size=16),
}
MORE = {
    "one step": Case(1),
    "undecayed, short segments": Case(65, erase="undecayed", longest=3, batch=3, scale=1.0),
    "two steps": Case(2, "momentum", scale=1.0),
    "one chunk, nothing decays": Case(64, "momentum", longest=30, batch=3),
    "a step more, undecayed, gates of heads": Case(65, "head", 0.9, erase="undecayed"),
    "long, close keys": Case(500, cosine=0.9, batch=1),
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE)])
def test_forms_agree(name):
    inputs, options, rng = (CASES | MORE)[name].build()
    check_agreement(momentum_delta_rule, oracles.momentum_delta_rule, inputs, options, rng)


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 97, 500])
@pytest.mark.parametrize("gates", ["head", "step"])
@pytest.mark.parametrize("cosine", [0.0, 0.9])
@pytest.mark.parametrize("longest", [None, 5, 80])
@pytest.mark.parametrize("erase", ["decayed", "undecayed"])
def test_forms_agree_everywhere(time, gates, cosine, longest, erase):
    case = Case(time, gates, cosine, erase=erase, longest=longest, batch=3, heads=4)
    inputs, options, rng = case.build(time)
    check_agreement(momentum_delta_rule, oracles.momentum_delta_rule, inputs, options, rng)


@pytest.mark.slow
def test_16_bit_inputs():
    inputs, options, rng = Case(97, longest=40, batch=3).build()
    check_16_bit(momentum_delta_rule, inputs, options, rng)


def as_stated(inputs):
    """As arrays of JAX, float64 where that is enabled."""
    return {name: jnp.asarray(x) for name, x in inputs.items()}


@pytest.mark.parametrize("erase", ["decayed", pytest.param("undecayed", marks=pytest.mark.slow)])
def test_without_momentum_it_is_the_delta_rule(erase):
    """Nothing of the momentum kept: write strength beta step."""
    inputs, _, _ = Case(40, heads=4).build()
    inputs["log_momentum"] = np.full(4, -1e4)
    inputs["initial_state"][:, :, 6:] = 0
    own = {k: v for k, v in inputs.items() if k not in ("step", "log_momentum")}
    own["beta"] = inputs["beta"] * inputs["step"]
    own["initial_state"] = inputs["initial_state"][:, :, :6]
    with jax.enable_x64(True):
        found, plain = jax.jit(
            lambda a, b: (
                momentum_delta_rule(**a, erase=erase, implementation="chunked"),
                delta_rule(**b, erase=erase, implementation="chunked"),
            )
        )(as_stated(inputs), as_stated(own))
    assert_close(found[0], plain[0], 1e-12)
    assert_close(found[1][:, :, :6], plain[1], 1e-12)


@pytest.mark.slow
def test_a_matrix_that_takes_gradient_steps_one_by_one():
    """With beta 1: a linear memory with momentum, in update chunks of one."""
    inputs, _, _ = Case(30, key_heads=2, heads=2).build()
    del inputs["initial_state"]
    inputs["beta"] = np.ones_like(inputs["beta"])
    with jax.enable_x64(True):
        out, state = momentum_delta_rule(**as_stated(inputs), scale=1.0, implementation="chunked")
        want, after = neural_memory(
            *(jnp.asarray(inputs[name]) for name in ("query", "key", "value")),
            ({"weight": jnp.zeros((2, 6, 3))},),
            jnp.asarray(inputs["log_decay"]),
            jnp.asarray(inputs["step"]),
            jnp.exp(inputs["log_momentum"]),
            memory=Memory(residual=False, normalisation="none"),
            loss=Loss(),
            update_chunk=1,
            anchor="decayed",
            implementation="reference",
        )
    assert_close(out, want, 1e-12)
    assert_close(state[:, :, :6], after.weights[0]["weight"], 1e-12)


def test_momentum_carries_a_write_on():
    """One pair, then nothing: the memory goes on toward sum momentum^t, where it stays."""
    time, momentum = 60, 0.8
    key = np.zeros((1, time, 1, 4))
    key[0, 0, 0, 1] = 1
    out, _ = jax.jit(lambda *arrays: momentum_delta_rule(*arrays, scale=1.0))(
        np.eye(4)[[1] * time][None, :, None],
        key,
        np.ones((1, time, 1, 2)),
        np.ones((1, time, 1)),
        np.full((1, time, 1), 0.1),
        np.log(np.full(1, momentum)),
    )
    want = 0.1 * (1 - momentum ** np.arange(1, time + 1)) / (1 - momentum)
    np.testing.assert_allclose(out[0, :, 0], np.stack([want, want], axis=1), rtol=1e-5)

"""`linear_attention`: its forms against the equations, at the sizes and values that break them."""

import dataclasses

import jax
import numpy as np
import pytest

from memseq.pallas_kernels import linear_attention
from tests.pallas_kernels import oracles
from tests.pallas_kernels.harness import (
    PairsCase,
    check_16_bit,
    check_agreement,
    check_kernel,
    check_kernel_16_bit,
    hard_decay,
)


@dataclasses.dataclass(frozen=True)
class Case(PairsCase):
    """gates: None, "head", "step" or "channel"."""

    gates: str | None = None
    value_decay: bool = False
    bonus: bool = False
    dim: int = dataclasses.field(default=5, kw_only=True)

    def arrays(self, rng):
        inputs = self.pairs(rng, 0.5) | self.memory(rng) | self.decay(rng, self.gates)
        if self.value_decay:
            inputs["value_log_decay"] = hard_decay(rng, inputs["value"].shape)
        if self.bonus:
            inputs["bonus"] = rng.normal(size=(self.heads, self.dim))
        return inputs


CASES = {
    "one step": Case(1),
    "two steps, decay of a head": Case(2, "head", scale=1.0),
    "a step short of a chunk, grouped heads": Case(63, "step", heads=4),
    "one chunk, segments": Case(64, "step", longest=30, batch=3),
    "a step more, channels, short segments": Case(65, "channel", longest=3, batch=3),
    "odd length, everything": Case(
        97, "channel", value_decay=True, bonus=True, longest=40, batch=3, heads=4, chunk_size=16
    ),
    "bonus with gates of heads": Case(97, "step", bonus=True, longest=40, chunk_size=32),
    "no decay, segments": Case(33, longest=9, chunk_size=8),
    "long": Case(500, "step", batch=1),
}


@pytest.mark.parametrize("name", CASES)
def test_forms_agree(name):
    inputs, options, rng = CASES[name].build()
    check_agreement(linear_attention, oracles.linear_attention, inputs, options, rng)


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 97, 500])
@pytest.mark.parametrize("decay", [None, "head", "step", "channel"])
@pytest.mark.parametrize("longest", [None, 5, 80])
@pytest.mark.parametrize("extra", [{}, {"bonus": True}, {"value_decay": True}])
def test_forms_agree_everywhere(time, decay, longest, extra):
    case = Case(time, decay, longest=longest, batch=3, heads=4, **extra)
    inputs, options, rng = case.build(time)
    check_agreement(linear_attention, oracles.linear_attention, inputs, options, rng)


def test_16_bit_inputs():
    inputs, options, rng = Case(97, "step", longest=40, batch=3).build()
    check_16_bit(linear_attention, inputs, options, rng)


KERNEL_CASES = {
    "no decay, 128 steps and some": Case(130, scale=1.0),
    "decay of a head, grouped heads": Case(64, "head", heads=4),
    "hard gates of heads, segments": Case(97, "step", longest=40, batch=3, chunk_size=32),
    "hard gates of channels, short segments, bonus": Case(
        65, "channel", bonus=True, longest=3, batch=3, chunk_size=16
    ),
    "gates of heads, bonus": Case(63, "step", bonus=True, longest=40, batch=3),
    "gates of channels, two grid steps": Case(97, "channel", batch=1, chunk_size=16),
    "hard gates of values, segments": Case(
        97, value_decay=True, longest=40, batch=3, chunk_size=32
    ),
    "all gates, bonus": Case(33, "channel", value_decay=True, bonus=True, heads=4, chunk_size=16),
    "one step": Case(1, "step"),
}


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_tpu_kernels(name):
    check_kernel(linear_attention, *KERNEL_CASES[name].build())


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 97, 500, 1100])
@pytest.mark.parametrize("decay", [None, "head", "step", "channel"])
@pytest.mark.parametrize("longest", [None, 5, 80])
@pytest.mark.parametrize("bonus", [False, True])
def test_tpu_kernels_everywhere(time, decay, longest, bonus):
    case = Case(time, decay, longest=longest, batch=3, heads=4, bonus=bonus)
    check_kernel(linear_attention, *case.build(time))


@pytest.mark.parametrize("decay", [None, "step", "channel"])
def test_tpu_kernels_with_16_bit_inputs(decay):
    inputs, options, rng = Case(200, decay, dim=32, values=16).build()
    check_kernel_16_bit(linear_attention, inputs, options, rng, 64)


def test_normaliser_is_a_value_column_of_ones():
    rng = np.random.default_rng(0)
    query, key = jax.nn.softplus(rng.normal(size=(2, 1, 20, 2, 4)).astype(np.float32))
    value = rng.normal(size=(1, 20, 2, 3)).astype(np.float32)
    ones = np.ones((1, 20, 2, 1), np.float32)
    out, _ = jax.jit(linear_attention)(query, key, np.concatenate([value, ones], axis=-1))
    scores = np.tril(np.einsum("bihk,bjhk->bhij", query, key))
    weights = scores / scores.sum(-1, keepdims=True)
    expected = np.einsum("bhij,bjhv->bihv", weights, value)
    np.testing.assert_allclose(out[..., :-1] / out[..., -1:], expected, rtol=1e-4, atol=1e-5)

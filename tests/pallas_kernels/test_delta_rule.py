"""`delta_rule`: its forms against the equations, at the sizes and values that break them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.pallas_kernels import delta_rule
from tests.pallas_kernels import oracles
from tests.pallas_kernels.harness import (
    PairsCase,
    assert_close,
    check_16_bit,
    check_agreement,
    check_kernel,
    check_kernel_16_bit,
    correlated_keys,
    interpreted,
    with_gradients,
)


@dataclasses.dataclass(frozen=True)
class Case(PairsCase):
    """gates: None, "head", "step" or "channel"; beta: the largest."""

    gates: str | None = None
    cosine: float = 0.5
    beta: float = 2.0
    erase_key: bool = False
    erase: str = "decayed"

    def arrays(self, rng):
        inputs = self.pairs(rng, self.cosine)
        # up to the largest and down to 0, both included
        inputs["beta"] = self.beta * rng.uniform(-0.2, 1.2, size=self.by_head).clip(0, 1)
        inputs |= self.memory(rng) | self.decay(rng, self.gates)
        if self.erase_key:
            # a step contracts as long as the erase key is not far from the key
            moved = inputs["key"] + 0.1 * rng.normal(size=inputs["key"].shape)
            inputs["erase_key"] = moved / np.linalg.norm(moved, axis=-1, keepdims=True)
        return inputs

    def options(self):
        return super().options() | {"erase": self.erase}


CASES = {
    "one step": Case(1),
    "two steps, decay of a head": Case(2, "head", scale=1.0),
    "a step short of a chunk, grouped heads, erase key": Case(63, "step", heads=4, erase_key=True),
    "one chunk, segments, close keys": Case(64, cosine=0.9, longest=30, batch=3),
    "a step more, short segments": Case(65, "head", 0.9, longest=3, batch=3),
    "odd length, everything": Case(
        97, "channel", erase_key=True, erase="undecayed", longest=40, batch=3, heads=4,
        chunk_size=16,
    ),
    "undecayed, gates of heads": Case(97, "step", 0.9, erase="undecayed", beta=1.0, chunk_size=32),
    "long, close keys": Case(500, "step", 0.9, batch=1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_forms_agree(name):
    inputs, options, rng = CASES[name].build()
    check_agreement(delta_rule, oracles.delta_rule, inputs, options, rng)


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 97, 500])
@pytest.mark.parametrize("decay", [None, "head", "step", "channel"])
@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("longest", [None, 5, 80])
@pytest.mark.parametrize("erase", ["decayed", "undecayed"])
def test_forms_agree_everywhere(time, decay, cosine, longest, erase):
    case = Case(time, decay, cosine, erase=erase, longest=longest, batch=3, heads=4)
    inputs, options, rng = case.build(time)
    check_agreement(delta_rule, oracles.delta_rule, inputs, options, rng)


def test_16_bit_inputs():
    inputs, options, rng = Case(97, "step", longest=40, batch=3).build()
    check_16_bit(delta_rule, inputs, options, rng)


KERNEL_CASES = {
    "close keys, a step more than a chunk": Case(65, None, 0.9, scale=1.0),
    "decay of a head, a key for three heads": Case(
        64, "head", key_heads=1, heads=3, erase_key=True
    ),
    "hard gates of heads, segments": Case(97, "step", 0.9, longest=40, batch=3, chunk_size=32),
    "hard gates of channels, short segments, undecayed": Case(
        63, "channel", erase_key=True, erase="undecayed", longest=3, batch=3, chunk_size=16
    ),
    "undecayed, gates of heads": Case(97, "step", erase="undecayed", longest=40, batch=3),
    "gates of channels, two grid steps": Case(97, "channel", batch=1, chunk_size=16),
    "one step": Case(1, "step"),
}


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_tpu_kernels(name):
    check_kernel(delta_rule, *KERNEL_CASES[name].build())


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 97, 500])
@pytest.mark.parametrize("decay", [None, "head", "step", "channel"])
@pytest.mark.parametrize("longest", [None, 5, 80])
@pytest.mark.parametrize("erase", ["decayed", "undecayed"])
def test_tpu_kernels_everywhere(time, decay, longest, erase):
    case = Case(time, decay, 0.9, erase=erase, longest=longest, batch=3, heads=4)
    check_kernel(delta_rule, *case.build(time))


@pytest.mark.parametrize("decay", [None, "step", "channel"])
def test_tpu_kernels_with_16_bit_inputs(decay):
    inputs, options, rng = Case(200, decay, dim=32, values=16).build()
    check_kernel_16_bit(delta_rule, inputs, options, rng, 64)


def test_small_correction_of_a_large_value_survives():
    """v - S^T k, a small difference of large numbers, is float32 for 16-bit inputs too."""
    key = jnp.zeros((1, 2, 1, 2), jnp.bfloat16).at[..., 0].set(1)
    value = jnp.asarray([[[[4096.0]], [[4064.0]]]], jnp.bfloat16)
    beta = jnp.full((1, 2, 1), 0.25, jnp.bfloat16)
    state = jnp.asarray([[[[4097.0], [0.0]]]])
    for form in ("reference", "chunked", "mosaic_tpu"):
        options = {"initial_state": state, "implementation": form}
        with interpreted(form):
            _, after = jax.jit(lambda *x, o=options: delta_rule(*x, **o))(key, key, value, beta)
        expected = 4097 + 0.25 * (4096 - 4097)
        expected += 0.25 * (4064 - expected)
        np.testing.assert_allclose(after[0, 0, 0, 0], expected, rtol=1e-7)


def test_erasing_a_key_with_strength_one_overwrites_it():
    rng = np.random.default_rng(0)
    key = np.repeat(correlated_keys(rng, 1, 1, 1, 4, 0), 40, axis=1)
    value = rng.normal(size=(1, 40, 1, 3))
    call = jax.jit(lambda *arrays: delta_rule(*arrays, scale=1.0)[0])
    out = call(key, key, value, np.ones((1, 40, 1)))
    np.testing.assert_allclose(out, value, rtol=1e-5, atol=1e-5)


def test_gate_of_a_head_is_the_same_gate_on_every_channel():
    inputs, _, rng = Case(40, "step", heads=4).build()
    by_channel = np.repeat(inputs["log_decay"][..., None], inputs["key"].shape[-1], axis=-1)
    call = jax.jit(lambda inputs: delta_rule(**inputs))
    assert_close(call(inputs | {"log_decay": by_channel}), call(inputs), 1e-5)


def test_gradients_stay_finite_where_keys_repeat():
    """The hardest system to invert: one key again and again, strength 2, nothing decays."""
    rng = np.random.default_rng(0)
    inputs = {
        "query": rng.normal(size=(1, 128, 1, 4)),
        "key": np.repeat(correlated_keys(rng, 1, 1, 1, 4, 0), 128, axis=1),
        "value": rng.normal(size=(1, 128, 1, 3)),
        "beta": np.full((1, 128, 1), 2.0),
    }
    shapes = jax.eval_shape(lambda x: delta_rule(**x), inputs)
    cotangents = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)
    results = {
        form: jax.jit(with_gradients(lambda x, f=form: delta_rule(**x, implementation=f)))(
            inputs, cotangents
        )
        for form in ("reference", "chunked")
    }
    assert_close(results["chunked"], results["reference"], 1e-4)

"""`diagonal_plus_low_rank`: its forms against the equation, and the memories it contains."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.pallas_kernels import delta_rule, linear_attention
from memseq.pallas_kernels.diagonal_plus_low_rank import diagonal_plus_low_rank
from memseq.pallas_kernels.diagonal_plus_low_rank.shapes import SHAPES, Shape, example
from tests.pallas_kernels.harness import (
    PairsCase,
    assert_close,
    assert_same,
    check_16_bit,
    check_agreement,
    check_kernel,
    correlated_keys,
    cotangents_like,
    einsum_of_a_tpu,
    hard_decay,
    interpreted,
    with_gradients,
)


def oracle(query, key, value, a, b, log_decay, *, scale=None, initial_state=None, segment_ids=None):
    """The transition as a matrix, in NumPy: one row, head and position after another."""
    batch, time, heads, values = value.shape
    keys = key.shape[-1]
    scale = keys**-0.5 if scale is None else scale
    out, states = np.zeros(value.shape), np.zeros((batch, heads, keys, values))
    log_decay = np.broadcast_to(
        log_decay if log_decay.ndim == 4 else log_decay[..., None], (batch, time, heads, keys)
    )
    for row in range(batch):
        ids = np.zeros(time, int) if segment_ids is None else segment_ids[row]
        for head in range(heads):
            memory = states[row, head]
            if initial_state is not None:
                memory = initial_state[row, head]
            last = None
            for t in np.flatnonzero(ids >= 0):
                if last is not None and ids[t] != last:
                    memory = np.zeros((keys, values))
                last = ids[t]
                q, k, a_t, b_t = (x[row, t, head * x.shape[2] // heads] for x in (query, key, a, b))
                transition = np.diag(np.exp(log_decay[row, t, head])) + np.outer(b_t, a_t)
                memory = transition @ memory + np.outer(k, value[row, t, head])
                out[row, t, head] = scale * memory.T @ q
            states[row, head] = memory
    return out, states


@dataclasses.dataclass(frozen=True)
class Case(PairsCase):
    """gates: "head", "step", "channel" or "hard" (of a channel); eta: the largest of b = eta a."""

    gates: str = "channel"
    cosine: float = 0.5
    eta: float = 1.0

    def arrays(self, rng):
        removal = correlated_keys(rng, self.batch, self.time, self.key_heads, self.dim, self.cosine)
        # b of value's heads, in channels of its own strength: up to the largest and down to 0
        by_channel = (*self.by_head, self.dim)
        eta = self.eta * rng.uniform(-0.2, 1.2, size=by_channel).clip(0, 1)
        gates = {
            "head": lambda: -rng.exponential(0.1, size=self.by_head),
            "step": lambda: hard_decay(rng, self.by_head),
            "channel": lambda: -0.6065 * rng.uniform(size=by_channel),
            "hard": lambda: hard_decay(rng, by_channel),
        }
        return {
            "query": rng.normal(size=removal.shape),
            "key": removal * rng.uniform(0.5, 2, size=(*removal.shape[:3], 1)),
            "value": rng.normal(size=(*self.by_head, self.values)),
            "a": -removal,
            "b": np.repeat(removal, self.heads // self.key_heads, axis=2) * eta,
            "log_decay": gates[self.gates](),
        } | self.memory(rng)


CASES = {
    "one step": Case(1),
    "two steps, decay of a head": Case(2, "head", scale=1.0),
    "a step short of a chunk, grouped heads, short segments": Case(
        15, "step", 0.9, heads=4, longest=3, batch=3
    ),
    "odd length, hard decays, everything": Case(
        97, "hard", longest=40, batch=3, heads=4, chunk_size=16
    ),
    "long, close keys": Case(300, "channel", 0.9, batch=1),
}


@pytest.mark.parametrize("name", CASES)
def test_forms_agree(name):
    inputs, options, rng = CASES[name].build()
    check_agreement(diagonal_plus_low_rank, oracle, inputs, options, rng)


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 97, 500])
@pytest.mark.parametrize("decay", ["head", "step", "channel", "hard"])
@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("longest", [None, 5, 80])
def test_forms_agree_everywhere(time, decay, cosine, longest):
    inputs, options, rng = Case(time, decay, cosine, longest=longest, batch=3, heads=4).build(time)
    check_agreement(diagonal_plus_low_rank, oracle, inputs, options, rng)


def test_16_bit_inputs():
    inputs, options, rng = Case(40, longest=20, batch=3, chunk_size=16).build()
    check_16_bit(diagonal_plus_low_rank, inputs, options, rng)


def test_small_correction_of_a_large_value_survives():
    """b x + k v, a small difference of large numbers, is float32 for 16-bit inputs too."""
    unit = jnp.zeros((1, 2, 1, 2), jnp.bfloat16).at[..., 0].set(1)
    value = jnp.asarray([[[[4096.0]], [[4064.0]]]], jnp.bfloat16)
    gates = jnp.zeros((1, 2, 1))
    state = jnp.asarray([[[[4097.0], [0.0]]]])
    expected = 4097 + 0.25 * (4096 - 4097)
    expected += 0.25 * (4064 - expected)
    for form in ("reference", "chunked", "mosaic_tpu"):
        options = {"initial_state": state, "implementation": form}
        call = jax.jit(lambda *x, o=options: diagonal_plus_low_rank(*x, **o))
        with interpreted(form), mock.patch.object(jnp, "einsum", einsum_of_a_tpu):
            _, after = call(unit, 0.25 * unit, value, -unit, 0.25 * unit, gates)
        np.testing.assert_allclose(after[0, 0, 0, 0], expected, rtol=1e-6, err_msg=form)


def test_without_a_it_is_linear_attention():
    inputs, options, _ = Case(40, "hard", longest=20, batch=3, heads=4, chunk_size=16).build()
    call = jax.jit(lambda x: diagonal_plus_low_rank(**x | {"a": 0 * x["a"]}, **options))
    rest = {k: x for k, x in inputs.items() if k not in "ab"}
    assert_close(call(inputs), jax.jit(lambda x: linear_attention(**x, **options))(rest), 1e-5)


def test_with_a_and_b_along_the_key_it_is_the_delta_rule():
    """Strengths up to 2: no decay, so a reads what the delta rule's error reads."""
    inputs, options, rng = Case(40, longest=20, batch=3, chunk_size=16).build()
    key = -inputs["a"]
    beta = rng.uniform(0, 2, size=inputs["value"].shape[:3])
    strength = beta[..., None]
    changed = {"a": key, "b": -strength * key, "key": strength * key, "log_decay": np.zeros(2)}
    found = jax.jit(lambda x: diagonal_plus_low_rank(**x, **options))(inputs | changed)
    plain = {k: inputs[k] for k in ("query", "value", "initial_state")} | {"key": key, "beta": beta}
    assert_close(found, jax.jit(lambda x: delta_rule(**x, **options))(plain), 1e-5)


def test_what_a_finds_is_not_decayed_yet():
    """A memory that this step forgets altogether is still moved from a to b."""
    state = np.eye(2)[None, None]
    one = np.zeros((1, 1, 1, 2))
    a, b = one + [1, 0], one + [0, 3]
    gates = np.full((1, 1, 1), -50.0)
    for form in ("reference", "chunked", "mosaic_tpu"):
        options = {"initial_state": state, "implementation": form}
        with interpreted(form):
            _, after = jax.jit(lambda *x, o=options: diagonal_plus_low_rank(*x, **o))(
                one, one, one, a, b, gates
            )
        np.testing.assert_allclose(after[0, 0], [[0, 0], [3, 0]], atol=1e-6)


def test_gate_of_a_head_is_the_same_gate_on_every_channel():
    inputs, _, _ = Case(12, "step", heads=4).build()  # short: one step of time after another
    by_channel = np.repeat(inputs["log_decay"][..., None], inputs["key"].shape[-1], axis=-1)
    call = jax.jit(lambda inputs: diagonal_plus_low_rank(**inputs))
    assert_same(call(inputs | {"log_decay": by_channel}), call(inputs))
    rates = inputs["log_decay"][0, 0]
    every = np.broadcast_to(rates, inputs["log_decay"].shape)
    assert_same(call(inputs | {"log_decay": rates}), call(inputs | {"log_decay": every}))


def test_copies_of_copies():
    """Two vmaps, as of seeds and learning rates: XLA for CPUs aborts on products of eight axes."""
    inputs, _, rng = Case(32, batch=1).build()
    copies = {k: rng.permuted(np.stack([[x] * 2] * 2), axis=-1) for k, x in inputs.items()}

    def call(x):
        return diagonal_plus_low_rank(**x, chunk_size=16, implementation="chunked")

    found = jax.jit(jax.vmap(jax.vmap(call)))(copies)
    one = jax.jit(call)({k: x[1, 0] for k, x in copies.items()})
    assert_close(jax.tree.map(lambda x: x[1, 0], found), one, 1e-5)


KERNEL_CASES = {
    "odd length, close keys, two grid steps": Case(150, cosine=0.9, batch=1),
    "hard decays, segments, grouped heads": Case(
        70, "hard", longest=30, batch=3, heads=4, chunk_size=16
    ),
}


@pytest.mark.parametrize("name", KERNEL_CASES)
def test_tpu_kernels(name):
    check_kernel(diagonal_plus_low_rank, *KERNEL_CASES[name].build())


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 97, 500])
@pytest.mark.parametrize("decay", ["step", "channel", "hard"])
@pytest.mark.parametrize("longest", [None, 5, 80])
def test_tpu_kernels_everywhere(time, decay, longest):
    case = Case(time, decay, 0.9, longest=longest, batch=3, heads=4)
    check_kernel(diagonal_plus_low_rank, *case.build(time))


def test_tpu_kernels_with_16_bit_inputs():
    """Outputs and gradients are as good as bfloat16 products; the state is far better."""
    inputs, options, rng = Case(50, batch=1, dim=16, values=16, chunk_size=16).build()
    wide = ("log_decay", "initial_state")
    inputs = {k: jnp.asarray(x, None if k in wide else jnp.bfloat16) for k, x in inputs.items()}
    shapes = jax.eval_shape(lambda x: diagonal_plus_low_rank(**x, **options), inputs)
    cotangents = cotangents_like(rng, shapes)
    cotangents = jax.tree.map(lambda c, x: jnp.asarray(c, x.dtype), cotangents, shapes)

    def call(form):
        return jax.jit(
            with_gradients(lambda x: diagonal_plus_low_rank(**x, **options, implementation=form))
        )

    with interpreted():
        (out, state), gradients = call("mosaic_tpu")(inputs, cotangents)
    assert (out.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)
    assert all(x.dtype == inputs[k].dtype for k, x in gradients.items())
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, cotangents))
    exact = call("reference")(*rounded)
    assert_close(out, exact[0][0], 2**-8, "out")
    assert_close(state, exact[0][1], 2**-15, "state")
    assert_close(gradients, exact[1], 2**-7, "gradients")


def test_example_is_a_stable_memory():
    arrays = jax.jit(lambda key: example(SHAPES["odd"], key))(jax.random.key(0))
    np.testing.assert_allclose(np.linalg.norm(arrays["a"], axis=-1), 1, rtol=1e-5)
    eta = np.asarray(-arrays["b"] / arrays["a"])
    assert (eta > 0).all() and (eta < 1).all()
    gates = np.asarray(arrays["log_decay"])
    assert (gates > -0.6065).all() and (gates < 0).all()
    # the transition is not symmetric, its norm can be above 1: what counts is the long run
    long = example(Shape(1, 10_000, 1, 2, 8, 8), jax.random.key(0))
    out, state = jax.jit(lambda x: diagonal_plus_low_rank(**x, chunk_size=16))(long)
    for x in (out, state):
        np.testing.assert_array_less(np.abs(x), 20)

"""`log_linear_attention`: its forms against the equations, and which level holds which pair."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.pallas_kernels import delta_rule, linear_attention, log_linear_attention
from memseq.pallas_kernels.common.triangular import unit_lower_inverse
from memseq.pallas_kernels.log_linear_attention import LogLinearState
from memseq.pallas_kernels.log_linear_attention.levels import place, positions
from memseq.pallas_kernels.log_linear_attention.shapes import (
    Shape,
    example,
    forward_products,
)
from tests.pallas_kernels import oracles_readout
from tests.pallas_kernels.harness import (
    PairsCase,
    assert_close,
    assert_same,
    check_16_bit,
    check_agreement,
)
from tests.pallas_kernels.test_bench import multiply_adds


@dataclasses.dataclass(frozen=True)
class Case(PairsCase):
    """gates: None, "head" or "step"; beta: the largest or None; start: of the first row."""

    gates: str | None = None
    beta: float | None = None
    start: int = 0
    levels: int = 5
    cosine: float = 0.5

    @property
    def position(self):
        return (self.start + np.arange(self.batch)).astype(np.int32)

    def arrays(self, rng):
        exists = (self.position[:, None] >> np.arange(self.levels - 1)) & 1
        shape = (self.batch, self.heads, self.levels - 1, self.dim, self.values)
        inputs = self.pairs(rng, self.cosine) | {
            "level_scale": rng.normal(size=(*self.by_head, self.levels)),
            "memories": exists[:, None, :, None, None] * rng.normal(size=shape),
        }
        inputs |= self.decay(rng, self.gates)
        if self.beta is not None:
            inputs["beta"] = self.beta * rng.uniform(-0.2, 1.2, size=self.by_head).clip(0, 1)
        return inputs

    def options(self):
        return super().options() | {"position": self.position}


def split_state(function):
    """The operation with the initial state's memories among its arrays, and no position after."""

    def call(*, memories, position, **rest):
        out, state = function(**rest, initial_state=LogLinearState(memories, position))
        return out, state.memories

    return call


operation = split_state(log_linear_attention)

CASES = {
    "one step": Case(1, "head", start=3),
    "adds, hard gates, short segments, grouped heads": Case(
        45, "step", longest=9, batch=3, chunk_size=16, heads=4, start=5
    ),
    "delta, odd length, grouped heads, segments": Case(
        45, "step", 2.0, longest=30, batch=3, heads=4, chunk_size=16, start=6
    ),
    "delta, close keys, one chunk longer than the levels": Case(
        33, None, 2.0, levels=3, cosine=0.9, batch=1, scale=1.0
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forms_agree(name):
    inputs, options, rng = CASES[name].build()
    oracle = split_state(oracles_readout.log_linear_attention)
    check_agreement(operation, oracle, inputs, options, rng)


@pytest.mark.slow
@pytest.mark.parametrize("time", [2, 64, 65, 150])
@pytest.mark.parametrize("beta", [None, 2.0])
@pytest.mark.parametrize("longest", [None, 5, 80])
def test_forms_agree_everywhere(time, beta, longest):
    case = Case(time, "step", beta, levels=6, cosine=0.9, longest=longest, batch=3, start=7)
    inputs, options, rng = case.build(time)
    oracle = split_state(oracles_readout.log_linear_attention)
    check_agreement(operation, oracle, inputs, options, rng)


def test_16_bit_inputs():
    inputs, options, rng = Case(40, "step", 2.0, longest=17, batch=3, chunk_size=16).build()
    check_16_bit(operation, inputs, options, rng)


@pytest.mark.parametrize("beta", [None, 2.0])
def test_with_all_weights_one_it_is_the_plain_memory(beta):
    inputs, options, _ = Case(40, "step", beta, start=6, longest=15, batch=3, heads=4).build()
    del options["position"]
    position = np.array([6, 7, 8], np.int32)
    memories, weights = inputs.pop("memories"), inputs.pop("level_scale")
    start = LogLinearState(memories, position)

    @jax.jit
    def both(inputs):
        ones = {"level_scale": jnp.ones_like(weights)}
        levels = log_linear_attention(**inputs, **ones, **options, initial_state=start)
        plain = linear_attention if beta is None else delta_rule
        return levels, plain(**inputs, **options, initial_state=memories.sum(axis=2))

    with jax.enable_x64(True):
        (out, state), want = both(inputs)
    assert_close((out, np.asarray(state.memories).sum(axis=2)), want, 1e-12)


def test_levels_are_the_paper_s():
    """With keys of ones and values of unit vectors an output shows who is at a level."""
    time, levels = 24, 5
    ones = np.ones((1, time, 1, 1))
    value = np.eye(time)[None, :, None]
    for form in ("reference", "chunked"):
        options = {"chunk_size": 4, "implementation": form}
        call = jax.jit(lambda w, o=options: log_linear_attention(ones, ones, value, w, **o)[0])
        for level in range(levels):
            weights = np.zeros((1, time, 1, levels))
            weights[..., level] = 1
            read = call(weights)
            for t, row in enumerate(np.asarray(read)[0, :, 0]):
                first, end = (t, t + 1) if level == 0 else (0, 0)
                for size, bucket in oracles_readout.buckets(t).items():
                    if min(size, levels - 1) == level:
                        first, end = min(bucket), max(bucket)
                        first = 0 if level == levels - 1 else first
                np.testing.assert_array_equal(row, np.isin(np.arange(time), np.arange(first, end)))


def test_place_is_that_of_the_tree():
    found = place(np.arange(70)[:, None], np.arange(70), 5)
    for i in range(70):
        for j in range(i + 1):
            assert found[i, j] == oracles_readout.level_of(j, i, 6) - 1


def test_positions_skip_padding_and_restart():
    valid = np.array([[0, 1, 1, 0, 1, 1, 0, 1]], bool)
    index = np.array([[0, 0, 0, 0, 1, 1, 1, 2]], np.int32)
    before, after = positions(valid, index, np.array([5], np.int32))
    np.testing.assert_array_equal(before, [[5, 5, 6, 7, 0, 1, 2, 0]])
    np.testing.assert_array_equal(after, [[5, 6, 7, 7, 1, 2, 2, 1]])


def test_a_memory_goes_on_for_ever():
    """A position beyond 2^31 wraps, and the tree does not notice: its last level has no end."""
    inputs, _, _ = Case(12, "step", batch=1, levels=4).build()
    for form in ("reference", "chunked"):
        call = jax.jit(lambda o, form=form: operation(**inputs, **o, implementation=form))
        late, early = ({"position": np.array([p], np.int32)} for p in (2**31 - 8, 8))
        assert_same(call(late), call(early))


@pytest.mark.parametrize("delta", [False, True])
def test_products_are_those_that_the_chunked_form_takes(delta):
    shape = Shape(2, 64, 2, 2, 6, 5, None, levels=4, delta=delta)
    inputs = jax.eval_shape(lambda: example(shape, jax.random.key(0)))

    def call(inputs):
        return log_linear_attention(**inputs, chunk_size=8, implementation="chunked")

    taken = multiply_adds(jax.make_jaxpr(call)(inputs).jaxpr)
    if delta:
        systems = jax.ShapeDtypeStruct((2, 2, 8, 8, 8), np.float32)
        taken -= multiply_adds(jax.make_jaxpr(unit_lower_inverse)(systems).jaxpr)
    assert forward_products(shape, 8) == taken

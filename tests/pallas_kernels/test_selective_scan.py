"""`selective_scan`: its forms against the equations, at the sizes and values that break them."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest

from memseq.pallas_kernels.linear_scan import linear_scan
from memseq.pallas_kernels.selective_scan import chunked, selective_scan
from memseq.pallas_kernels.selective_scan.shapes import Shape, example
from tests.pallas_kernels import oracles_scan
from tests.pallas_kernels.harness import (
    assert_close,
    check_16_bit,
    check_agreement,
    check_kernel,
    check_kernel_16_bit,
    check_the_future,
    cotangents_like,
    hard_decay,
    packed_ids,
    with_gradients,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """groups: None for B and C [batch, time, state_dim]; longest: of packed segments."""

    time: int
    groups: int | None = None
    skip: bool = True
    longest: int | None = None
    batch: int = 2
    channels: int = 4
    state_dim: int = 3
    chunk_size: int | None = None

    def build(self, seed=0):
        rng = np.random.default_rng(seed)
        by_step = (self.batch, self.time, self.channels)
        groups = () if self.groups is None else (self.groups,)
        maps = (self.batch, self.time, *groups, self.state_dim)
        inputs = {
            "x": rng.normal(size=by_step),
            # 0 (nothing happens) beside 20 (all is forgotten)
            "dt": -hard_decay(rng, by_step),
            "A": -rng.uniform(0.1, 2, size=(self.channels, self.state_dim)),
            "B": rng.normal(size=maps),
            "C": rng.normal(size=maps),
            "initial_state": rng.normal(size=(self.batch, self.channels, self.state_dim)),
        }
        if self.skip:
            inputs["D"] = rng.normal(size=self.channels)
        options = {"chunk_size": self.chunk_size}
        if self.longest is not None:
            options["segment_ids"] = packed_ids(rng, self.batch, self.time, self.longest)
        return inputs, options, rng


CASES = {
    "one step": Case(1),
    "two steps, groups": Case(2, groups=2),
    "a step short": Case(63, skip=False),
    "chunks, segments": Case(64, longest=30, batch=3),
    "a step more, short segments": Case(65, groups=1, longest=3, batch=3, chunk_size=32),
    "odd length, everything": Case(97, groups=2, longest=40, batch=3, chunk_size=8),
}


@pytest.mark.parametrize("name", CASES)
def test_forms_agree(name):
    inputs, options, rng = CASES[name].build()
    check_agreement(selective_scan, oracles_scan.selective_scan, inputs, options, rng)


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 97, 500])
@pytest.mark.parametrize("groups", [None, 1, 2, 4])
@pytest.mark.parametrize("longest", [None, 5, 80])
@pytest.mark.parametrize("chunk_size", [None, 1, 64])
def test_forms_agree_everywhere(time, groups, longest, chunk_size):
    case = Case(time, groups, time % 2 == 0, longest, batch=3, chunk_size=chunk_size)
    inputs, options, rng = case.build(time)
    check_agreement(selective_scan, oracles_scan.selective_scan, inputs, options, rng)


@pytest.mark.parametrize("case", [Case(37, 2, longest=20, batch=3), Case(16, skip=False)])
def test_a_chunk_is_the_same_in_parallel(case):
    """What accelerators do in a chunk, which a CPU does not."""
    inputs, options, rng = case.build()
    state = inputs.pop("initial_state")
    inputs.setdefault("D", None)
    maps = {k: inputs[k].reshape(*inputs["x"].shape[:2], -1, case.state_dim) for k in "BC"}
    restart = None
    if case.longest is not None:
        restart = rng.random(inputs["x"].shape[:2]) < 0.2
    arrays = inputs | maps | {"state": state}

    def both(arrays, cotangents):
        return [
            with_gradients(lambda x, f=f: f(**x, restart=restart))(arrays, cotangents)
            for f in (chunked.parallel, chunked.steps)
        ]

    with jax.enable_x64(True):
        cotangents = cotangents_like(rng, (inputs["x"], state))
        assert_close(*jax.jit(both)(arrays, cotangents), 1e-12)


@pytest.mark.parametrize("backward", [False, True])
def test_states_of_all_steps_are_never_held(backward):
    """Memory against the size of [batch, time, channels, state_dim], for CPUs and accelerators."""
    batch, time, channels, state_dim = 1, 2048, 64, 64
    shapes = jax.eval_shape(
        lambda: example(Shape(batch, time, channels, state_dim), jax.random.key(0))
    )
    all_states = 4 * batch * time * channels * state_dim

    def loss(arrays, form):
        y, state = selective_scan(**arrays, implementation=form)
        return (y * y).sum() + (state * state).sum()

    def temporary(form):
        function = jax.grad(loss) if backward else loss
        compiled = jax.jit(lambda arrays: function(arrays, form)).lower(shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    found = [temporary("chunked")]
    with mock.patch.object(chunked, "steps", chunked.parallel):
        found.append(temporary("chunked"))
    assert 0 < min(found) and max(found) < all_states / 3
    if backward:
        assert temporary("reference") > all_states  # the measure sees such arrays


def test_memory_grows_with_the_state_by_one_state_a_chunk():
    def temporary(state_dim):
        shapes = jax.eval_shape(lambda: example(Shape(2, 2048, 16, state_dim), jax.random.key(0)))
        loss = jax.grad(lambda x: selective_scan(**x, implementation="chunked")[0].sum())
        return jax.jit(loss).lower(shapes).compile().memory_analysis().temp_size_in_bytes

    more = temporary(64) - temporary(32)
    # of what [batch, time, channels, state_dim] grows by
    assert 0 < more < 4 * 2 * 2048 * 16 * 32 / 4


def test_16_bit_inputs():
    inputs, options, rng = Case(97, 2, longest=40, batch=3).build()
    check_16_bit(selective_scan, inputs, options, rng)


# Blocks of 16 steps: several of them, and one that is not full.
KERNEL_CASES = {
    "two blocks of time, short segments": Case(18, longest=3, state_dim=10, chunk_size=16),
    "two groups of two blocks of channels": Case(16, 2, batch=1, channels=2400, chunk_size=16),
}


@pytest.mark.usefixtures("short_loops")
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_tpu_kernels(name):
    check_kernel(selective_scan, *KERNEL_CASES[name].build())


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 65, 97])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("longest", [None, 9])
@pytest.mark.parametrize("state_dim", [1, 16])
def test_tpu_kernels_everywhere(time, groups, longest, state_dim):
    case = Case(time, groups, time % 2 == 0, longest, 2, 4, state_dim, 64)
    check_kernel(selective_scan, *case.build(time))


@pytest.mark.slow
def test_tpu_kernels_on_long_rows():
    """Blocks of 128 steps, as they are on a TPU."""
    check_kernel(selective_scan, *Case(300, longest=80, batch=1, state_dim=16).build())


@pytest.mark.usefixtures("short_loops")
def test_tpu_kernels_with_16_bit_inputs():
    """Rates and step sizes may be narrow too."""
    case = Case(17, longest=20, batch=1, chunk_size=16)
    check_kernel_16_bit(selective_scan, *case.build(), 16, wide=())


@pytest.mark.slow
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("longest", [None, 20])
def test_tpu_kernels_with_16_bit_inputs_everywhere(groups, longest):
    case = Case(70, groups, longest=longest, state_dim=16, chunk_size=16)
    check_kernel_16_bit(selective_scan, *case.build(), 16)


@pytest.mark.usefixtures("short_loops")
@pytest.mark.parametrize(
    "form", ["reference", "chunked", pytest.param("mosaic_tpu", marks=pytest.mark.slow)]
)
def test_the_future_changes_nothing_and_runs_repeat(form):
    inputs, options, rng = Case(17, longest=9, batch=1, chunk_size=8).build()
    check_the_future(selective_scan, form, inputs, ("x", "dt", "B", "C"), options, rng)


def test_one_number_a_channel_is_a_linear_scan():
    inputs, _, _ = Case(40, state_dim=1).build()
    x, dt, A, B, C = (inputs[k] for k in ("x", "dt", "A", "B", "C"))
    out, _ = jax.jit(selective_scan)(x, dt, A, B, C)
    states, _ = jax.jit(linear_scan)(dt * x * B, dt * A[:, 0])
    np.testing.assert_allclose(out, C * states, rtol=1e-5, atol=1e-6)


def test_kernels_say_that_they_are_float32():
    x = np.zeros((2, 20, 4))
    with jax.enable_x64(True), pytest.raises(ValueError) as error:
        selective_scan(x, x, x[0, :4], x, x, implementation="mosaic_tpu")
    assert str(error.value) == (
        "implementation: 'mosaic_tpu' of selective_scan cannot run: "
        "the kernels compute in float32, got an input of float64"
    )

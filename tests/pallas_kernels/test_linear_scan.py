"""`linear_scan`: its forms against the equation, at the sizes and values that break them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.pallas_kernels.linear_scan import linear_scan
from tests.pallas_kernels import oracles_scan
from tests.pallas_kernels.harness import (
    check_16_bit,
    check_agreement,
    check_kernel,
    check_kernel_16_bit,
    check_the_future,
    hard_decay,
    packed_ids,
)


def by_parts(function, x, log_decay, *, x_imag=None, state_imag=None, **options):
    """The operation with every complex array as two real ones, in and out.

    Comparisons and cotangents are then of real numbers only, and the imaginary parts count as much.
    """
    if x_imag is not None:
        x = x + 1j * x_imag
    if state_imag is not None:
        options["initial_state"] = options["initial_state"] + 1j * state_imag
    outputs = function(x, log_decay, **options)
    xp = np if isinstance(outputs[0], np.ndarray) else jnp
    return [part for y in outputs for part in ((y.real, y.imag) if xp.iscomplexobj(y) else (y,))]


def operation(**inputs):
    return by_parts(linear_scan, **inputs)


def oracle(**inputs):
    return by_parts(oracles_scan.linear_scan, **inputs)


@dataclasses.dataclass(frozen=True)
class Case:
    """decay, sign, phase: "fixed" ([channels]), "step" ([batch, time, channels]) or None."""

    time: int
    decay: str = "step"
    sign: str | None = None
    phase: str | None = None
    complex_x: bool = False
    longest: int | None = None
    batch: int = 2
    channels: int = 5
    chunk_size: int | None = None

    def build(self, seed=0):
        rng = np.random.default_rng(seed)
        by_step = (self.batch, self.time, self.channels)
        shape = {"fixed": (self.channels,), "step": by_step}
        inputs = {
            "x": rng.normal(size=by_step),
            "log_decay": hard_decay(rng, shape[self.decay]),
            "initial_state": rng.normal(size=(self.batch, self.channels)),
        }
        if self.sign is not None:
            # -1, 0 and 1 among others
            inputs["sign"] = rng.uniform(-2, 2, size=shape[self.sign]).clip(-1, 1).round(1)
        if self.phase is not None:
            inputs["phase"] = rng.uniform(-7, 7, size=shape[self.phase])
        if self.complex_x:
            inputs["x_imag"] = rng.normal(size=by_step)
            inputs["state_imag"] = rng.normal(size=(self.batch, self.channels))
        options = {"chunk_size": self.chunk_size}
        if self.longest is not None:
            options["segment_ids"] = packed_ids(rng, self.batch, self.time, self.longest)
        return inputs, options, rng


CASES = {
    "one step": Case(1, phase="step"),
    "two steps, all fixed": Case(2, "fixed", "fixed", "fixed"),
    "a step short of a chunk": Case(63, sign="step", chunk_size=64),
    "one chunk, fixed, segments": Case(
        64, "fixed", phase="fixed", longest=30, batch=3, chunk_size=64
    ),
    "as a CPU takes it": Case(64, longest=30, batch=3),
    "a step more, short segments": Case(65, sign="fixed", longest=3, batch=3, chunk_size=64),
    "odd length, everything": Case(
        97, "step", "step", "step", True, longest=40, batch=3, chunk_size=16
    ),
    "complex x alone": Case(40, "fixed", complex_x=True, longest=40, batch=3, chunk_size=8),
}  # fmt: skip
GATES = [None, "fixed", "step"]


@pytest.mark.parametrize("name", CASES)
def test_forms_agree(name):
    inputs, options, rng = CASES[name].build()
    check_agreement(operation, oracle, inputs, options, rng)


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 97, 500])
@pytest.mark.parametrize("decay", GATES[1:])
@pytest.mark.parametrize("sign", GATES)
@pytest.mark.parametrize("phase", GATES)
@pytest.mark.parametrize("longest", [None, 40])
def test_forms_agree_everywhere(time, decay, sign, phase, longest):
    chunk = None if decay == sign else 16
    case = Case(time, decay, sign, phase, time % 2 == 0, longest, batch=3, chunk_size=chunk)
    inputs, options, rng = case.build(time)
    check_agreement(operation, oracle, inputs, options, rng)


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_16_bit_inputs(chunk_size):
    case = Case(97, "fixed", "step", longest=40, batch=3, chunk_size=chunk_size)
    inputs, options, rng = case.build()
    check_16_bit(operation, inputs, options, rng)


# Blocks of 16 steps: several of them, and one that is not full.
KERNEL_CASES = {
    "hard gates of a step": Case(16, batch=2, chunk_size=16),
    "everything, short segments": Case(
        18, "step", "step", "step", True, longest=3, batch=1, chunk_size=16
    ),
    "fixed gates, two blocks of channels": Case(
        17, "fixed", "fixed", "fixed", batch=1, channels=1200, chunk_size=16
    ),
    "complex x alone": Case(16, "fixed", complex_x=True, batch=1, chunk_size=16),
}  # fmt: skip


@pytest.mark.usefixtures("short_loops")
@pytest.mark.parametrize("name", KERNEL_CASES)
def test_tpu_kernels(name):
    check_kernel(operation, *KERNEL_CASES[name].build())


@pytest.mark.slow
@pytest.mark.parametrize("time", [1, 2, 65, 97])
@pytest.mark.parametrize("decay", GATES[1:])
@pytest.mark.parametrize("sign", GATES)
@pytest.mark.parametrize("phase", GATES)
def test_tpu_kernels_everywhere(time, decay, sign, phase):
    case = Case(
        time, decay, sign, phase, time == 2, 9 if time % 2 else None, batch=2, chunk_size=64
    )
    check_kernel(operation, *case.build(time))


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [None, 64])
def test_tpu_kernels_on_long_rows(chunk_size):
    case = Case(500, phase="fixed", longest=80, batch=1, chunk_size=chunk_size)
    check_kernel(operation, *case.build())


@pytest.mark.usefixtures("short_loops")
def test_tpu_kernels_with_16_bit_inputs():
    """Gates may be narrow too."""
    case = Case(33, longest=20, batch=1, chunk_size=16)
    check_kernel_16_bit(operation, *case.build(), 16, wide=())


@pytest.mark.slow
@pytest.mark.parametrize("phase", GATES)
@pytest.mark.parametrize("longest", [None, 20])
def test_tpu_kernels_with_16_bit_inputs_everywhere(phase, longest):
    case = Case(70, "step", "step", phase, phase is not None, longest, batch=2, chunk_size=16)
    check_kernel_16_bit(operation, *case.build(), 16)


@pytest.mark.usefixtures("short_loops")
@pytest.mark.parametrize(
    "form", ["reference", "chunked", pytest.param("mosaic_tpu", marks=pytest.mark.slow)]
)
def test_the_future_changes_nothing_and_runs_repeat(form):
    inputs, options, rng = Case(17, sign="step", longest=9, batch=1, chunk_size=8).build()
    check_the_future(operation, form, inputs, ("x", "log_decay", "sign"), options, rng)


def test_a_small_step_beside_a_large_one_keeps_its_digits():
    """Sums of log decays of -20 have none left for the -1e-3 of a later step; products do."""
    log_decay = np.full((1, 64, 1), -1e-3)
    log_decay[:, :60] = -20.0
    x = np.ones((1, 64, 1), np.float32)
    exact, _ = oracles_scan.linear_scan(x, log_decay)
    for form in ("reference", "chunked"):
        options = {"implementation": form, "chunk_size": 64}
        call = jax.jit(lambda x, g, o=options: linear_scan(x, g, **o)[0])
        np.testing.assert_allclose(call(x, log_decay.astype(np.float32)), exact, rtol=3e-7)


def test_an_oscillator_is_a_cosine():
    """x an impulse, no decay: Re h_t = cos(phase t)."""
    x = np.zeros((1, 100, 3), np.float32)
    x[:, 0] = 1
    phase = np.float32([0.1, 1.0, np.pi])
    out, state = jax.jit(linear_scan)(x, np.zeros(3, np.float32), phase=phase)
    assert out.dtype == state.dtype == jnp.complex64
    angle = np.arange(100)[:, None] * phase.astype(np.float64)
    np.testing.assert_allclose(out[0], np.exp(1j * angle), atol=2e-5)


def test_kernels_say_that_they_are_float32():
    x = np.zeros((2, 20, 4))
    with jax.enable_x64(True), pytest.raises(ValueError) as error:
        linear_scan(x, x, phase=x, implementation="mosaic_tpu")
    assert str(error.value) == (
        "implementation: 'mosaic_tpu' of linear_scan cannot run: "
        "the kernels compute in float32, the state of these inputs is complex128"
    )

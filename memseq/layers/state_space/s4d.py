"""Diagonal time-invariant state spaces, one a channel: S4D, DSS, and SMR."""

import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.parts import widen
from memseq.layers.common.vector import VectorState
from memseq.layers.state_space import hippo
from memseq.layers.state_space.block import StateSpaceLayer
from memseq.layers.state_space.invariant import (
    Dense,
    Diagonal,
    in_chunks,
    over_time,
    split,
    step_by_step,
)
from memseq.layers.state_space.rates import RATES, discretized
from memseq.pallas_kernels.common.checks import check_choice, check_count
from memseq.pallas_kernels.common.dispatch import SHORT


class InvariantLayer(StateSpaceLayer):
    """A small time-invariant linear system for every channel.

        h_t = A h_{t-1} + B x_t,  y_t = C . h_t + D x_t in each channel, then `StateSpaceLayer`'s
        gated linear unit, which mixes channels

    Subclasses write `system`. The `chunked` form (also "auto") is a Toeplitz product within chunks,
    see `memseq.layers.state_space.invariant`; other forms, and short calls, take the recurrence.

    Attributes:
        state_dim: real numbers that a channel remembers, even.
        dt_min, dt_max: step sizes start log-uniform between them, one a channel.
    """

    state_dim: int = 64
    dt_min: float = 1e-3
    dt_max: float = 1e-1

    OPERATION: ClassVar[str | None] = "linear_scan"

    @nn.nowrap
    def check_invariant(self) -> None:
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(
                f"dt_min: expected 0 < dt_min <= dt_max, got {self.dt_min} and {self.dt_max}"
            )

    @nn.nowrap
    def memory_shape(self):
        check_count("state_dim", self.state_dim, 2)
        if self.state_dim % 2:
            raise ValueError(f"state_dim: expected an even number, got {self.state_dim}")
        return self.features, self.state_dim

    @nn.nowrap
    def dt_log_init(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        return jax.random.uniform(key, shape, jnp.float32, low, high)

    def system(self) -> tuple[Diagonal | Dense, jax.Array, jax.Array]:
        """A, and B and C as real vectors [channels, state_dim]."""
        raise NotImplementedError(f"{type(self).__name__} has no system")

    def project(self, x):
        return x if self.dtype is None else x.astype(self.dtype)

    def mix(self, inputs, state, segment_ids):
        state = enter(state, self.init_state(inputs.shape[0]), segment_ids)
        out, memory = self.run_system(inputs, state.memory, segment_ids)
        return out, self.leave_with(state, segment_ids, memory=memory, conv=state.conv)

    def run_system(self, x: jax.Array, memory: jax.Array, segment_ids: jax.Array | None):
        """y as x, and the memory after the last step."""
        system, write, read = self.system()
        if isinstance(system, Diagonal):
            self.sow_decay(system.log_decay)
        arrays = (jax.tree.leaves(system), write, read, x, memory)
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(arrays))
        system, write, read, wide, memory = jax.tree.map(
            lambda a: a.astype(dtype), (system, write, read, widen(x), memory)
        )
        options = self.operation_options(segment_ids)
        form = step_by_step
        if self.implementation in ("auto", "chunked") and x.shape[1] >= SHORT:
            form = in_chunks
            options.pop("implementation")
        out, memory = over_time(form, system, write, read, wide, memory, **options)
        return out.astype(x.dtype), memory


@state_dataclass
class S4DState(VectorState):
    """State of `S4D`; `memory` is [batch, features, state_dim]: real parts, then imaginary ones."""


def spectrum_of(name: str, state_dim: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Rates [modes], turns [modes] or None, and what B is to each mode, of S4D's start values.

    Gu et al. 2022, "On the parameterization and initialization of diagonal state space models",
    arXiv:2206.11893, section 4: "lin" -1/2 + i pi n; "inv" -1/2 + i N/pi (N / (2n + 1) - 1);
    "legs" the eigenvalues of the normal part of HiPPO-LegS with its B; "real" -(n + 1). Complex
    modes stand for themselves and their conjugates: there are state_dim / 2.
    """
    check_choice("spectrum", name, ("lin", "inv", "legs", "real"))
    n = np.arange(state_dim // 2)
    half, ones = np.full(n.size, 0.5), np.ones(n.size)
    if name == "real":
        return np.arange(1, state_dim + 1.0), None, np.ones(state_dim)
    if name == "lin":
        return half, np.pi * n, ones
    if name == "inv":
        return half, state_dim / np.pi * (state_dim / (2 * n + 1) - 1), ones
    values, vectors = hippo.diagonalize("legs", state_dim)
    write = vectors.conj().T @ hippo.transition("legs", state_dim)[1]
    upper = slice(state_dim // 2, None)  # eigenvalues come by imaginary part
    return half, values.imag[upper], write[upper]


class S4D(InvariantLayer):
    """A diagonal state space for every channel.

        h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A x_t,  y_t = 2 Re(C . h_t) + D x_t,
        A = -rate(decay) + i phase, complex of state_dim / 2 modes, or real

    Gu et al. 2022, arXiv:2206.11893. As B and C only matter as a product, B is 1 and C, complex
    normal at the start, is learned. dt = exp(dt_log), one a channel.

    Attributes (beside those of every layer, of `StateSpaceLayer` and of `InvariantLayer`):
        spectrum: start of A, "legs", "lin", "inv" or "real"; see `spectrum_of`.
        discretization: "zoh" (above), or for complex modes "bilinear".
        rate: how `decay` becomes a rate, one of `rates.RATES`.
    """

    spectrum: str = "legs"
    discretization: str = "zoh"
    rate: str = "exp"

    PAPER: ClassVar[str] = "Gu et al. 2022, arXiv:2206.11893"
    MEMORY: ClassVar[str] = "vectors [features, state_dim]"
    STATE: ClassVar[type] = S4DState

    def setup(self):
        self.setup_modes()
        self.setup_read_out()

    @nn.nowrap
    def modes_shape(self) -> tuple[int, int]:
        """(systems of their own, real numbers that each remembers)."""
        return self.memory_shape()

    def setup_modes(self) -> None:
        """The parameters of the systems."""
        self.check_invariant()
        methods = ("zoh",) if self.spectrum == "real" else ("zoh", "bilinear")
        check_choice("discretization", self.discretization, methods)
        check_choice("rate", self.rate, RATES)
        channels, size = self.modes_shape()
        rates, turns, write = spectrum_of(self.spectrum, size)
        shape = (channels, len(rates))

        def decay_init(key, shape):
            del key
            return jnp.broadcast_to(RATES[self.rate][1](jnp.asarray(rates, jnp.float32)), shape)

        def read_init(key, shape):
            if turns is None:
                return jax.random.normal(key, shape)
            modes = jax.random.normal(key, (2, *shape)) * 0.5**0.5
            read = jax.lax.complex(modes[0], modes[1])[..., : size // 2]
            return split(read * jnp.asarray(write, jnp.complex64))

        self.dt_log = self.param("dt_log", self.dt_log_init, (channels, 1))
        self.decay = self.param("decay", decay_init, shape)
        self.phase = None
        if turns is not None:
            turns = jnp.asarray(turns, jnp.float32)
            self.phase = self.param("phase", lambda key: jnp.broadcast_to(turns, shape))
        self.read = self.param("C", read_init, (channels, size))

    def system(self):
        rate, dt = RATES[self.rate][0](self.decay), jnp.exp(self.dt_log)
        system, write = discretized(rate, self.phase, dt, self.discretization)
        if self.phase is None:
            return system, write, self.read
        real, imag = jnp.split(self.read, 2, axis=-1)
        return system, write, jnp.concatenate([2 * real, -2 * imag], axis=-1)


@state_dataclass
class DSSState(S4DState):
    """State of `DSS`; as `S4DState`."""


class DSS(S4D):
    """S4D whose kernel is normalised as a softmax over `length` steps.

        h_t = exp(dt A) h_{t-1} + x_t / (A sum_{l < length} exp(dt A l)),
        y_t = 2 Re(C . h_t) + D x_t

    Gupta et al. 2022, "Diagonal state spaces are as effective as structured state spaces",
    arXiv:2203.14343, proposition 1 and section 3.2, with the reciprocal conj(s) / (|s|^2 + 1e-7).
    The length is a constant here, so that a memory can go on. The paper's variant without softmax
    is `S4D` with another scale of C.

    Attributes (beside those of `S4D`; discretization changes nothing):
        length: steps that the normaliser adds up.
    """

    length: int = 1024

    PAPER: ClassVar[str] = "Gupta et al. 2022, arXiv:2203.14343"
    STATE: ClassVar[type] = DSSState

    def setup(self):
        check_count("length", self.length, 1)
        if self.spectrum == "real":
            raise ValueError("spectrum: expected a complex one for DSS, got 'real'")
        super().setup()

    def system(self):
        system, _, read = super().system()
        point = jax.lax.complex(-RATES[self.rate][0](self.decay), self.phase)
        step = jax.lax.complex(system.log_decay, system.phase)
        total = jnp.expm1(self.length * step)
        reciprocal = total.conj() / (jnp.abs(total) ** 2 + 1e-7)
        return system, split(jnp.expm1(step) * reciprocal / point), read


@state_dataclass
class SMRState(S4DState):
    """State of `SMR`; as `S4DState`."""


class SMR(S4D):
    """S4D whose input is multiplied by a short convolution of itself: state memory replay.

        h_t and y_t as in `S4D` for the input x_t * conv(x)_t

    Qi et al. 2024, "SMR: State memory replay for long sequence modeling", arXiv:2405.17534; no code
    was published. It is the multiplicative gate of H3 on the input's side.
    """

    conv_width: int = 4

    PAPER: ClassVar[str] = "Qi et al. 2024, arXiv:2405.17534"
    STATE: ClassVar[type] = SMRState

    def setup(self):
        super().setup()
        self.conv = self.make_conv(activation=None)

    def mix(self, inputs, state, segment_ids):
        state = enter(state, self.init_state(inputs.shape[0]), segment_ids)
        replayed, conv = self.conv(inputs, state.conv, segment_ids)
        out, memory = self.run_system(inputs * replayed, state.memory, segment_ids)
        return out, self.leave_with(state, segment_ids, memory=memory, conv=conv)

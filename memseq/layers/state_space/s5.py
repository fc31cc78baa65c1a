"""S5: one state space for all channels together, causal or in both directions."""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.parts import hidden, widen
from memseq.layers.common.vector import VectorState
from memseq.layers.state_space import hippo
from memseq.layers.state_space.block import StateSpaceLayer
from memseq.layers.state_space.rates import RATES, discretized
from memseq.pallas_kernels import linear_scan
from memseq.pallas_kernels.common.checks import (
    check_array,
    check_choice,
    check_count,
    check_segment_ids,
)


@state_dataclass
class S5State(VectorState):
    """State of `S5`; `memory` is [batch, state_dim]: real parts, then imaginary ones."""


class Modes(nn.Module):
    """The modes of an S5: x [batch, time, features] to their states at all steps.

    Start values: eigenvalues of the normal part of HiPPO-LegS in `blocks` equal blocks, B lecun
    normal in its coordinates, steps log-uniform in [dt_min, dt_max], one a mode.
    """

    features: int
    state_dim: int
    blocks: int
    rate: str
    dt_min: float
    dt_max: float
    dtype: Any
    param_dtype: Any

    def setup(self):
        check_count("blocks", self.blocks, 1)
        if self.state_dim < 1 or self.state_dim % (2 * self.blocks):
            raise ValueError(
                f"state_dim: expected a multiple of 2 * blocks = {2 * self.blocks}, "
                f"got {self.state_dim}"
            )
        check_choice("rate", self.rate, RATES)
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(
                f"dt_min: expected 0 < dt_min <= dt_max, got {self.dt_min} and {self.dt_max}"
            )
        size = (self.state_dim // 2,)
        turns, _ = block_modes(self.state_dim, self.blocks)

        def decay_init(key, shape):
            del key
            return jnp.full(shape, RATES[self.rate][1](jnp.float32(0.5)))

        def dt_log_init(key, shape):
            low, high = math.log(self.dt_min), math.log(self.dt_max)
            return jax.random.uniform(key, shape, jnp.float32, low, high)

        self.decay = self.param("decay", decay_init, size)
        self.phase = self.param("phase", lambda key: jnp.asarray(turns, jnp.float32))
        self.dt_log = self.param("dt_log", dt_log_init, size)
        self.write = nn.Dense(
            self.state_dim,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.write_init,
        )

    def write_init(self, key, shape, dtype):
        """[features, state_dim]: V^H B, for a real B of variance 1 / features."""
        _, vectors = block_modes(self.state_dim, self.blocks)
        real = jax.random.normal(key, shape, dtype) * shape[0] ** -0.5
        modes = real @ jnp.asarray(vectors.conj(), jnp.complex64)
        return jnp.concatenate([modes.real, modes.imag], axis=1).astype(dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """B x, [batch, time, state_dim]."""
        return self.write(x)

    def states(
        self, written: jax.Array, interval: jax.Array | None, memory: jax.Array, options: dict
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(states at all steps, the last one, mean decay a step), states as real numbers.

        interval: [batch, time] or None: time that each step takes, in steps.
        """
        dt = jnp.exp(self.dt_log)
        if interval is not None:
            dt = dt * widen(interval)[..., None]
        rate = RATES[self.rate][0](self.decay)
        system, gain = discretized(rate, self.phase, dt, "zoh")
        written = jax.lax.complex(*jnp.split(widen(written), 2, axis=-1))
        out, last = linear_scan(
            written * jax.lax.complex(*jnp.split(gain, 2, axis=-1)),
            system.log_decay,
            phase=system.phase,
            initial_state=jax.lax.complex(*jnp.split(memory, 2, axis=-1)),
            **options,
        )
        out, last = (jnp.concatenate([a.real, a.imag], axis=-1) for a in (out, last))
        return out, last, jnp.exp(system.log_decay).mean()


def block_modes(state_dim: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Turns [state_dim / 2] and eigenvectors [state_dim, state_dim / 2] of the upper half-plane."""
    size = state_dim // blocks
    values, vectors = hippo.diagonalize("legs", size)
    upper = slice(size // 2, None)
    turns = np.tile(values.imag[upper], blocks)
    return turns, np.kron(np.eye(blocks), vectors[:, upper])


def read_init(state_dim: int, blocks: int):
    """Initialiser of a kernel [directions * state_dim, features] that reads 2 Re(C V h)."""

    def init(key, shape, dtype):
        _, vectors = block_modes(state_dim, blocks)
        directions = shape[0] // state_dim
        real = jax.random.normal(key, (directions, shape[1], state_dim), dtype)
        modes = real * shape[0] ** -0.5 @ jnp.asarray(vectors, jnp.complex64)
        parts = jnp.concatenate([2 * modes.real, -2 * modes.imag], axis=-1)
        return parts.mT.reshape(shape).astype(dtype)

    return init


class S5(StateSpaceLayer):
    """One diagonal state space that takes all channels in and gives all channels out.

        h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A (B x_t),  y_t = 2 Re(C h_t) + D x_t,
        A = -rate(decay) + i phase: state_dim / 2 modes and their conjugates, dt one a mode

    then `StateSpaceLayer`'s gated linear unit. Smith et al. 2023, "Simplified state space layers
    for sequence modeling", arXiv:2208.04933, sections 3 and 4. The call takes `interval`
    [batch, time] beside the other arguments: the time that passes in each step, in steps, for
    observations at irregular times (section 6.3 there).

    Attributes (beside those of every layer and of `StateSpaceLayer`):
        state_dim: real numbers remembered, a multiple of 2 * blocks.
        blocks: HiPPO matrices side by side that the modes start as.
        rate: how `decay` becomes a rate, one of `rates.RATES`.
        dt_min, dt_max: step sizes start log-uniform between them.
    """

    state_dim: int = 64
    blocks: int = 4
    rate: str = "exp"
    dt_min: float = 1e-3
    dt_max: float = 1e-1

    PAPER: ClassVar[str] = "Smith et al. 2023, arXiv:2208.04933"
    MEMORY: ClassVar[str] = "vector [state_dim]"
    OPERATION: ClassVar[str] = "linear_scan"
    STATE: ClassVar[type] = S5State

    def setup(self):
        self.modes = Modes(**fields_of(self, FIELDS))
        self.read = nn.Dense(
            self.features,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=read_init(self.state_dim, self.blocks),
        )
        self.setup_read_out()

    @nn.nowrap
    def memory_shape(self):
        return (self.state_dim,)

    def __call__(self, x, state=None, segment_ids=None, shared=None, interval=None):
        """As every layer, with `interval` [batch, time]: positive, None is 1 for each step."""
        if interval is None:
            return super().__call__(x, state, segment_ids, shared)
        check_array("x", x, (None, None, self.features), "[batch, time, features]")
        check_segment_ids(segment_ids, *x.shape[:2])
        check_array("interval", interval, x.shape[:2], "[batch, time]")
        out, state = self.mix((self.modes(x), interval), state, segment_ids)
        return self.finish(x, out), state

    def project(self, x):
        return self.modes(x), None

    def mix(self, inputs, state, segment_ids):
        written, interval = inputs
        state = enter(state, self.init_state(written.shape[0]), segment_ids)
        out, memory, decay = self.modes.states(
            written, interval, state.memory, self.operation_options(segment_ids)
        )
        self.sow("intermediates", "mean_decay", decay)
        out = self.read(out.astype(written.dtype))
        return out, self.leave_with(state, segment_ids, memory=memory, conv=state.conv)

    def in_both_directions(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        """y [batch, time, features] from the states of a pass forward and one backward."""
        written, found = self.modes(x), []
        empty = jnp.zeros((x.shape[0], self.state_dim), jnp.float32)
        for way in (slice(None), slice(None, None, -1)):
            ids = None if segment_ids is None else segment_ids[:, way]
            options = self.operation_options(ids)
            out, _, _ = self.modes.states(written[:, way], None, empty, options)
            found.append(out[:, way])
        return self.finish(x, self.read(jnp.concatenate(found, axis=-1).astype(written.dtype)))


FIELDS = ("features", "state_dim", "blocks", "rate", "dt_min", "dt_max", "dtype", "param_dtype")


def fields_of(layer: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    """Values of these fields by name, for another module that has the same."""
    return {name: getattr(layer, name) for name in names}


class BidirectionalS5(nn.Module):
    """S5 over a sequence in both directions: y = layer(x, mask), for members that have an order.

        y_t = 2 Re(C [h_t, g_t]) + D x_t,  h forward and g backward in time, of the same A and B

    Smith et al. 2023, arXiv:2208.04933, appendix; then `StateSpaceLayer`'s gated linear unit.
    Attributes as `S5`.
    """

    features: int
    state_dim: int = 64
    blocks: int = 4
    rate: str = "exp"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    glu: bool = True
    implementation: str = "auto"
    chunk_size: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    PAPER: ClassVar[str] = "Smith et al. 2023, arXiv:2208.04933"
    MEMORY: ClassVar[str] = "vectors [2, state_dim], one a direction"
    OPERATION: ClassVar[str] = "linear_scan"
    ORDERED: ClassVar[bool] = True  # the order of the members means something

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """x [batch, n, features]; mask bool [batch, n], True takes part. y as x, 0 where not.

        Steps that take no part are left out: no time passes in them.
        """
        check_array("x", x, (None, None, self.features), "[batch, n, features]")
        ids = None
        x = hidden(x, mask)
        if mask is not None:
            ids = jnp.broadcast_to(jnp.where(mask, 0, -1), x.shape[:2])
        own = ("glu", "implementation", "chunk_size")
        layer = S5(**fields_of(self, (*FIELDS, *own)), name="s5")
        out = layer.in_both_directions(x, ids)
        return hidden(out, mask)

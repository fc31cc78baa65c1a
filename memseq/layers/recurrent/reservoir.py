"""Fixed random recurrences with a trained read-out: echo states and memory reservoirs."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.vector import VectorState
from memseq.layers.recurrent.step import StepLayer
from memseq.pallas_kernels.common.checks import check_choice, check_count

SKIPS = ("orthogonal", "cycle", "identity")


def random_matrix(seed: int, size: int, radius: float) -> np.ndarray:
    """[size, size], uniform, scaled so that its spectral radius is about `radius`.

    By the circular law a matrix of independent entries of variance 1 / size has a radius near 1, so
    no eigenvalue is computed: within 5% from 100 units on.
    """
    entries = np.random.default_rng(seed).uniform(-1, 1, size=(size, size))
    return radius * np.sqrt(3 / size) * entries


def skip_matrix(kind: str, seed: int, size: int) -> np.ndarray:
    """An orthogonal [size, size]: random, the cycle that shifts by one unit, or the identity."""
    check_choice("skip", kind, SKIPS)
    if kind == "identity":
        return np.eye(size)
    if kind == "cycle":
        return np.roll(np.eye(size), 1, axis=1)
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return q * np.sign(np.diag(r))


def ridge(states: jax.Array, targets: jax.Array, penalty: float = 1e-6) -> jax.Array:
    """The read-out [units, outputs] that minimises |states w - targets|^2 + penalty |w|^2.

    Args:
        states: [samples, units].
        targets: [samples, outputs].
        penalty: positive; times the mean square of the states, so that it has no unit.
    """
    if not penalty > 0:
        raise ValueError(f"penalty: expected a positive number, got {penalty}")
    gram = states.T @ states
    scale = penalty * jnp.trace(gram) / gram.shape[0]
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return jax.scipy.linalg.solve(gram + scale * eye, states.T @ targets, assume_a="pos")


@state_dataclass
class EchoStateState(VectorState):
    """State of `EchoState`; `memory` is [batch, units]."""


class EchoState(StepLayer):
    """A residual echo state network: nothing is trained but the read-out.

        h_t = alpha O h_{t-1} + beta tanh(W h_{t-1} + V x_t + b),  out = U h_t

    Jaeger 2001 for alpha = 0; Ceni and Gallicchio 2024, "Residual echo state networks",
    arXiv:2308.14841, with an orthogonal O on the linear path. W, V, b and O are constants of a
    seed, W with spectral radius `radius`. U is a parameter, `output`; `ridge` gives its kernel in
    closed form from the `states`.

    Attributes (beside those of every layer and of `StepLayer`):
        skip: O, "orthogonal" (random), "cycle" or "identity".
        alpha, beta: weights of the linear and the nonlinear path.
        radius: spectral radius of W.
        input_scale: V is uniform in +- this, and b too.
        seed: of the constants.
    """

    skip: str = "orthogonal"
    alpha: float = 0.5
    beta: float = 0.5
    radius: float = 0.9
    input_scale: float = 0.1
    seed: int = 0

    PAPER: ClassVar[str] = "Ceni and Gallicchio 2024, arXiv:2308.14841"
    MEMORY: ClassVar[str] = "vector [hidden_dim], fixed weights"
    STATE: ClassVar[type] = EchoStateState

    def setup(self):
        check_choice("skip", self.skip, SKIPS)
        self.output = self.dense(self.features)

    @nn.nowrap
    def memory_shape(self):
        return (self.units(),)

    @nn.nowrap
    def constants(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """O [units, units], W [units, units], V [features, units] and b [units]; float64."""
        units, rng = self.units(), np.random.default_rng(self.seed + 1)
        into = rng.uniform(-1, 1, size=(self.features, units)) * self.input_scale
        bias = rng.uniform(-1, 1, size=units) * self.input_scale
        skip = skip_matrix(self.skip, self.seed + 2, units)
        return skip, random_matrix(self.seed, units, self.radius), into, bias

    def feedback(self):
        return tuple(jnp.asarray(x, jnp.float32) for x in self.constants())

    def project(self, x):
        return x if self.dtype is None else x.astype(self.dtype)

    @nn.nowrap
    def step(self, weights, memory, inputs):
        skip, kernel, into, bias = weights
        fresh = jnp.tanh(memory @ kernel + inputs @ into + bias)
        memory = self.alpha * memory @ skip + self.beta * fresh
        return memory, memory

    def states(self, x: jax.Array) -> jax.Array:
        """h_t at all steps, [batch, time, units]: what `ridge` fits a read-out to."""
        return self.mix(self.project(x), None, None)[0]


@state_dataclass
class ReservoirMemoryState(VectorState):
    """State of `ReservoirMemory`; `memory` is [batch, memory_dim + units]: m, then h."""


class ReservoirMemory(EchoState):
    """A reservoir memory network: an echo state network that also hears a linear delay line.

        m_t = decay C m_{t-1} + U_m x_t,
        h_t = alpha O h_{t-1} + beta tanh(W h_{t-1} + V x_t + W_m m_t + b),  out = U h_t

    Gallicchio and Ceni 2024, "Reservoir memory networks", with the residual path of `EchoState`; C
    is the cycle, and dense random U_m and decay < 1 keep its taps apart: with decay 1 a cycle never
    forgets, and with one input unit its taps wrap and add up.

    Attributes (beside those of `EchoState`):
        memory_dim: units of the linear reservoir; None is as many as the nonlinear one's.
        memory_decay: of the cycle, in (0, 1].
    """

    memory_dim: int | None = None
    memory_decay: float = 0.99

    PAPER: ClassVar[str] = "Gallicchio and Ceni 2024, reservoir memory networks"
    MEMORY: ClassVar[str] = "vector [memory_dim + hidden_dim], fixed weights"
    STATE: ClassVar[type] = ReservoirMemoryState

    def setup(self):
        super().setup()
        if not 0 < self.memory_decay <= 1:
            raise ValueError(f"memory_decay: expected 0 < decay <= 1, got {self.memory_decay}")

    @nn.nowrap
    def linear_units(self) -> int:
        check_count("memory_dim", self.memory_dim, 1, optional=True)
        return self.units() if self.memory_dim is None else self.memory_dim

    @nn.nowrap
    def memory_shape(self):
        return (self.linear_units() + self.units(),)

    @nn.nowrap
    def constants(self):
        """Those of `EchoState`, then U_m [features, memory_dim] and W_m [memory_dim, units]."""
        size, rng = self.linear_units(), np.random.default_rng(self.seed + 3)
        into = rng.uniform(-1, 1, size=(self.features, size)) * self.input_scale
        out = rng.uniform(-1, 1, size=(size, self.units())) / np.sqrt(size)
        return *super().constants(), into, out

    @nn.nowrap
    def step(self, weights, memory, inputs):
        skip, kernel, into, bias, into_line, from_line = weights
        line, hidden = jnp.split(memory, [self.linear_units()], axis=-1)
        line = self.memory_decay * jnp.roll(line, 1, axis=-1) + inputs @ into_line
        fresh = jnp.tanh(hidden @ kernel + inputs @ into + line @ from_line + bias)
        hidden = self.alpha * hidden @ skip + self.beta * fresh
        return jnp.concatenate([line, hidden], axis=-1), hidden

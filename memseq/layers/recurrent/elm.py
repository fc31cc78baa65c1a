"""The expressive leaky memory neuron."""

from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.vector import VectorState
from memseq.layers.recurrent.step import Feedback, StepLayer
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class ELMNeuronState(VectorState):
    """State of `ELMNeuron`; `memory` is [batch, branches + units]: branch inputs, then memory."""


class ELMNeuron(StepLayer):
    """The expressive leaky memory neuron: slow memory units that a small network writes to.

        b_t = k_b b_{t-1} + w_s x_t,  k_b = exp(-1 / 5),
        d_t = 1.7159 tanh(2/3 MLP([b_t, k_m m_{t-1}])),
        m_t = k_m m_{t-1} + (1 - k_lambda) d_t,  out = U m_t,
        k_m = exp(-1 / tau), k_lambda = exp(-lambda / tau), lambda = 5

    Spieler et al. 2024, "The ELM neuron", arXiv:2306.16922, section 2 (version 2). Inputs go to
    `branches` in equal groups, with synapse weights w_s = relu(synapse) that start at 1/2; the time
    scales tau of the memory units lie between 1 and `tau_max` steps by a sigmoid of parameters, and
    start spaced by equal factors. The network has one hidden layer of twice as many units, relu.

    Attributes (beside those of every layer and of `StepLayer`):
        hidden_dim: memory units; None is features.
        branches: groups of inputs, a divisor of features; None is features.
        tau_max: longest time scale, in steps.
    """

    branches: int | None = None
    tau_max: float = 1000.0

    PAPER: ClassVar[str] = "Spieler et al. 2024, arXiv:2306.16922"
    MEMORY: ClassVar[str] = "vectors [branches] and [hidden_dim]"
    STATE: ClassVar[type] = ELMNeuronState

    def setup(self):
        units, branches = self.units(), self._branches()
        if not self.tau_max > 1:
            raise ValueError(f"tau_max: expected more than 1 step, got {self.tau_max}")

        def tau_init(key, shape):
            """The sigmoid's inverse of time scales spaced by equal factors within the range."""
            del key
            tau = self.tau_max ** jnp.linspace(0.02, 0.98, *shape)
            share = (tau - 1) / (self.tau_max - 1)
            return jnp.log(share) - jnp.log1p(-share)

        lecun, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros
        half = nn.initializers.constant(0.5)
        self.synapse = self.param("synapse_bias", half, (self.features,), self.param_dtype)
        self.tau = self.param("tau_bias", tau_init, (units,))
        self.into = Feedback((branches + units, 2 * units), lecun, self.param_dtype)
        self.into_bias = self.param("into_bias", zeros, (2 * units,), self.param_dtype)
        self.out_of = Feedback((2 * units, units), lecun, self.param_dtype)
        self.out_bias = self.param("out_bias", zeros, (units,), self.param_dtype)
        self.output = self.dense(self.features)

    @nn.nowrap
    def _branches(self) -> int:
        check_count("branches", self.branches, 1, optional=True)
        branches = self.features if self.branches is None else self.branches
        if self.features % branches:
            raise ValueError(f"branches: expected a divisor of {self.features}, got {branches}")
        return branches

    @nn.nowrap
    def memory_shape(self):
        return (self._branches() + self.units(),)

    def feedback(self):
        tau = 1 + (self.tau_max - 1) * nn.sigmoid(self.tau)
        return tau, self.into(), self.into_bias, self.out_of(), self.out_bias

    def project(self, x):
        x = (nn.relu(self.synapse) * x).astype(x.dtype if self.dtype is None else self.dtype)
        return x.reshape(*x.shape[:-1], self._branches(), -1).sum(-1)

    @nn.nowrap
    def step(self, weights, memory, inputs):
        tau, into, into_bias, out_of, out_bias = weights
        branch, slow = jnp.split(memory, [self._branches()], axis=-1)
        branch = jnp.exp(-1 / 5) * branch + inputs
        slow = jnp.exp(-1 / tau) * slow
        hidden = nn.relu(jnp.concatenate([branch, slow], axis=-1) @ into + into_bias)
        change = 1.7159 * jnp.tanh(2 / 3 * (hidden @ out_of + out_bias))
        slow = slow - jnp.expm1(-5 / tau) * change
        return jnp.concatenate([branch, slow], axis=-1), slow

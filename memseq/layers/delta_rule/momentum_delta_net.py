"""Momentum DeltaNet."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.matrix import MatrixState
from memseq.layers.common.parts import MambaGate, l2_normalize, widen
from memseq.layers.delta_rule.gated_delta_net import GatedDeltaNet
from memseq.pallas_kernels import momentum_delta_rule


@state_dataclass
class MomentumDeltaNetState(MatrixState):
    """State of `MomentumDeltaNet`; `momentum` has the shape of `memory`."""

    momentum: jax.Array


class MomentumDeltaNet(GatedDeltaNet):
    """The gated delta rule, whose errors are written through a momentum.

        M_t = mu_t M_{t-1} + step_t k_t (v_t - (a_t S_{t-1})^T k_t)^T,
        S_t = a_t S_{t-1} + beta_t M_t,  out_t = S_t^T q_t / sqrt(key_dim),
        log mu_t = max(-exp(A_log) softplus(W_m x_t + dt_bias), min_log_momentum),
        step_t = 1 + tanh(W_s x_t / sqrt(features)),  z_t = factor step_t,
        beta_t = z_t^2 / (1 + z_t^2) max_beta sigmoid(W_b x_t),
        log a_t = -exp(A'_log) softplus(W_a x_t + dt_bias') - log(1 + z_t^2)

    Huang et al. 2026, "MDN: Parallelizing Stepwise Momentum for Delta Linear Attention",
    arXiv:2605.05838, with the gates and start values of the authors' code: the memory and its
    momentum oscillate together, and what a large step writes more of, the memory keeps less of
    (sin^2 and cos^2 of one angle, whose tangent is z). `factor`, a number a head, starts uniform in
    [0, 4]. As in Comba the query is moved away from the key, q_t = unit(q - d k), with a d of each
    head that starts uniform in [0, 1]. Keys are unit vectors. The read-out's gate is a sigmoid.

    Attributes (beside those of `GatedDeltaNet`):
        min_log_momentum: the least log momentum, negative.
    """

    gate_activation: str = "sigmoid"
    min_log_momentum: float = -2.0

    PAPER: ClassVar[str] = "Huang et al. 2026, arXiv:2605.05838"
    MEMORY: ClassVar[str] = "matrix and momentum [value_heads, 2 key_dim, value_dim]"
    OPERATION: ClassVar[str] = "momentum_delta_rule"
    STATE: ClassVar[type] = MomentumDeltaNetState

    def setup(self):
        super().setup()
        if not self.min_log_momentum < 0:
            raise ValueError(
                f"min_log_momentum: expected a negative number, got {self.min_log_momentum}"
            )
        value_heads = self.dims()[2]
        self.step = self.dense(value_heads)
        self.momentum = self.dense(value_heads)
        self.momentum_gate = MambaGate(value_heads)
        self.factor_log = self.param("factor_log", _log_uniform(4.0), (value_heads,))
        self.correction_log = self.param("correction_log", _log_uniform(1.0), (self.heads,))

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> MomentumDeltaNetState:
        _, key_dim, heads, value_dim = self.dims()
        momentum = jnp.zeros((batch, heads, key_dim, value_dim), jnp.float32)
        return self.empty_state(batch, momentum=momentum)

    @nn.nowrap
    def recall(self, state):
        return jnp.concatenate([state.memory, state.momentum], axis=-2)

    @nn.nowrap
    def keep(self, memory):
        return dict(zip(("memory", "momentum"), jnp.split(memory, 2, axis=-2), strict=True))

    def gates(self, x):
        step = 1 + jnp.tanh(widen(self.step(x)) / self.features**0.5)
        squared = (step * jnp.exp(self.factor_log)) ** 2
        beta = self.max_beta * nn.sigmoid(widen(self.beta(x))) * squared / (1 + squared)
        self.sow("intermediates", "mean_beta", beta.mean())
        _, log_decay = self.decay_gate(self.decay(x))
        log_decay = self.sow_decay(log_decay - jnp.log1p(squared))
        _, log_momentum = self.momentum_gate(self.momentum(x))
        log_momentum = jnp.maximum(log_momentum, self.min_log_momentum)
        self.sow("intermediates", "mean_momentum", jnp.exp(log_momentum).mean())
        return beta, step, log_momentum, log_decay

    def operate(self, query, key, value, *gates, **options):
        correction = jnp.exp(self.correction_log)[:, None].astype(key.dtype)
        query = l2_normalize(query - correction * key)
        return momentum_delta_rule(query, l2_normalize(key), value, *gates, **options)


def _log_uniform(most: float):
    """An initialiser: logarithms of numbers uniform in [0, most], of at least 1e-4."""

    def init(key, shape):
        return jnp.log(jnp.maximum(jax.random.uniform(key, shape, jnp.float32, 0, most), 1e-4))

    return init

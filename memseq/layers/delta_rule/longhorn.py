"""Longhorn."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.matrix import MatrixLayer, MatrixState
from memseq.layers.common.parts import split_heads, widen
from memseq.pallas_kernels import delta_rule, linear_scan


@state_dataclass
class LonghornState(MatrixState):
    """State of `Longhorn`."""


class Longhorn(MatrixLayer):
    """Each step solves an online regression exactly: stay close to the memory, fit the new pair.

        S_t = argmin |S - S_{t-1}|^2 + beta_t |S^T k_t - v_t|^2
            = S_{t-1} + step_t k_t (v_t - S_{t-1}^T k_t)^T,  step_t = beta_t / (1 + beta_t |k_t|^2),
        out_t = S_t^T q_t / sqrt(key_dim),  beta_t = sigmoid(W x_t)

    Liu et al. 2024, "Longhorn: State Space Models are Amortized Online Learners",
    arXiv:2407.14207, theorem 3.1, with a beta for each head: the exact solution. Keys need no norm:
    the step shrinks what they hold to 1 / (1 + beta |k|^2) of itself, whatever their length.

    The paper's layer has a beta for each value channel and keeps of k k^T only the diagonal, so
    that its recurrence is elementwise. That is `elementwise`: in value channel c

        S_t[:, c] = (1 - step_tc k_t^2) * S_{t-1}[:, c] + step_tc v_tc k_t,
        step_tc = beta_tc / (1 + beta_tc |k_t|^2)

    with heads=1, key_dim=16 and value_dim=2 * features the memory of the authors' code. No two
    channels of a memory then decay alike, so the scan goes over all of them and holds the memory of
    every step: heads * key_dim * value_dim numbers a token.

    Attributes (beside those of every layer and of `MatrixLayer`):
        elementwise: the paper's approximation, a beta for each value channel.
    """

    output_gate: bool = True
    conv_width: int = 4
    elementwise: bool = False

    PAPER: ClassVar[str] = "Liu et al. 2024, arXiv:2407.14207"
    MEMORY: ClassVar[str] = "matrix [heads, key_dim, value_dim]"
    OPERATION: ClassVar[str] = "delta_rule"
    STATE: ClassVar[type] = LonghornState

    def setup(self):
        self.setup_matrix()
        _, _, heads, value_dim = self.dims()
        self.beta = self.dense(heads * value_dim if self.elementwise else heads)

    def gates(self, x):
        beta = nn.sigmoid(widen(self.beta(x)))
        self.sow("intermediates", "mean_beta", beta.mean())
        return (split_heads(beta, self.heads) if self.elementwise else beta,)

    def operate(self, query, key, value, beta, **options):
        squares = jnp.sum(widen(key) ** 2, axis=-1)
        if self.elementwise:
            step = beta / (1 + beta * squares[..., None])
            return self._scan(query, widen(key), widen(value), step, **options)
        return delta_rule(query, key, value, beta / (1 + beta * squares), **options)

    def _scan(self, query, key, value, step, *, initial_state, **options):
        batch, time, heads, key_dim = key.shape
        erased = key[..., None] ** 2 * step[..., None, :]
        # below 1 by its definition, but not when it is rounded
        erased = jnp.minimum(erased, 1 - jnp.finfo(erased.dtype).eps)
        memory, last = linear_scan(
            (key[..., None] * (step * value)[..., None, :]).reshape(batch, time, -1),
            jnp.log1p(-erased).reshape(batch, time, -1),
            initial_state=initial_state.reshape(batch, -1),
            **options,
        )
        memory = memory.reshape(erased.shape)
        highest = jax.lax.Precision.HIGHEST
        out = jnp.einsum("bthk,bthkv->bthv", widen(query), memory, precision=highest)
        out *= key_dim**-0.5
        return out.astype(query.dtype), last.reshape(initial_state.shape)

"""Bilinear recurrent networks: the input multiplies the memory, and adds nothing to it."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import enter, state_dataclass
from memseq.layers.common.parts import widen
from memseq.layers.common.vector import VectorLayer, VectorState
from memseq.layers.recurrent.step import Feedback, StepLayer
from memseq.pallas_kernels import linear_scan
from memseq.pallas_kernels.common.checks import check_choice, check_count
from memseq.pallas_kernels.common.segments import begins, hide_padding


@state_dataclass
class BilinearRNNState(VectorState):
    """State of `BilinearRNN`; `memory` is [batch, planes, 2], points on unit circles."""


class BilinearRNN(VectorLayer):
    """A bilinear recurrence in blocks of 2 x 2: planes that each input turns by an angle.

        h_t = R(theta_t) h_{t-1},  theta_t = W x_t + b,  out = U h_t,  h_0 = (1, 0) in each plane

    Ebrahimi and Memisevic 2025, "Revisiting bi-linear state transitions in recurrent neural
    networks", arXiv:2505.21749, with rotations as blocks. Without an additive term only products of
    transitions matter, whose scale cancels; rotations have none. It follows commutative groups
    exactly: parity is a turn by pi. Angles are summed by the scan as products of turns. Their other
    forms are `FactoredBilinearRNN`.

    Attributes (beside those of every layer):
        planes: number of 2 x 2 blocks; None is features / 2.
    """

    planes: int | None = None

    PAPER: ClassVar[str] = "Ebrahimi and Memisevic 2025, arXiv:2505.21749"
    MEMORY: ClassVar[str] = "rotations [planes]"
    OPERATION: ClassVar[str] = "linear_scan"
    STATE: ClassVar[type] = BilinearRNNState

    def setup(self):
        planes = self.memory_shape()[0]
        self.angle = self.dense(planes, use_bias=True)
        self.output = self.dense(self.features)

    @nn.nowrap
    def memory_shape(self):
        check_count("planes", self.planes, 1, optional=True)
        return (self.features // 2 if self.planes is None else self.planes, 2)

    @nn.nowrap
    def init_state(self, batch, context=None):
        """Every plane at (1, 0); `context` changes nothing."""
        state = self.empty_state(batch)
        return state.replace(memory=state.memory.at[..., 0].set(1))

    def project(self, x):
        return self.angle(x)

    def mix(self, inputs, state, segment_ids):
        state = enter(state, self.init_state(inputs.shape[0]), segment_ids)
        options = self.operation_options(segment_ids)
        out, memory = turned(widen(inputs), state.memory, **options)
        out = jnp.concatenate([out.real, out.imag], axis=-1).astype(inputs.dtype)
        return out, self.leave_with(state, segment_ids, memory=memory, conv=state.conv)

    def finish(self, x, out):
        return self.output(out)


@state_dataclass
class FactoredBilinearRNNState(VectorState):
    """State of `FactoredBilinearRNN`; `memory` is [batch, units], a vector of length 1."""


class FactoredBilinearRNN(StepLayer):
    """A bilinear recurrence whose matrix for each input is diagonal, or a product of factors.

        h_t = unit(M_t h_{t-1}),  out = U h_t,  unit(v) = v / |v|,  h_0 = unit(1, ..., 1),
        M_t = diag(W x_t + b) ("diagonal"),  or  M_t = A diag(W x_t + b) B ("cp")

    Ebrahimi and Memisevic 2025, arXiv:2505.21749: the tensor of h_t = sum_jk T_jk h_j x_k in
    canonical polyadic form, and the diagonal one, which follows parity already when it is not
    trained. Without an additive term the size of h means nothing, so it is taken out after every
    step and can neither overflow nor vanish. b starts at 1 and so M_t near A B, or near 1.

    Attributes (beside those of every layer and of `StepLayer`):
        form: "cp" or "diagonal".
        rank: factors of "cp"; None is as many as units.
    """

    form: str = "cp"
    rank: int | None = None

    PAPER: ClassVar[str] = "Ebrahimi and Memisevic 2025, arXiv:2505.21749"
    MEMORY: ClassVar[str] = "unit vector [hidden_dim]"
    STATE: ClassVar[type] = FactoredBilinearRNNState

    def setup(self):
        check_choice("form", self.form, ("cp", "diagonal"))
        check_count("rank", self.rank, 1, optional=True)
        units = self.units()
        factors = self.rank if self.form == "cp" and self.rank is not None else units
        self.input = self.dense(factors, use_bias=True, bias_init=nn.initializers.ones)
        self.output = self.dense(self.features)
        if self.form == "cp":
            init = nn.initializers.lecun_normal()
            self.into = Feedback((units, factors), init, self.param_dtype)
            self.back = Feedback((factors, units), init, self.param_dtype)

    @nn.nowrap
    def memory_shape(self):
        return (self.units(),)

    @nn.nowrap
    def init_state(self, batch, context=None):
        """Equal numbers of length 1; `context` changes nothing."""
        state = self.empty_state(batch)
        return state.replace(memory=jnp.full_like(state.memory, self.units() ** -0.5))

    def feedback(self):
        return (self.into(), self.back()) if self.form == "cp" else ()

    @nn.nowrap
    def step(self, weights, memory, inputs):
        if weights:
            into, back = weights
            memory = ((memory @ into) * inputs) @ back
        else:
            memory = memory * inputs
        square = jnp.sum(memory * memory, axis=-1, keepdims=True)
        memory = memory * jax.lax.rsqrt(jnp.maximum(square, 1e-30))
        return memory, memory


def turned(
    angle: jax.Array, start: jax.Array, *, segment_ids: jax.Array | None, **options
) -> tuple[jax.Array, jax.Array]:
    """The product of all turns so far, which unlike a sum of angles never grows.

    Args:
        angle: [batch, time, planes], float32 at least, in radians.
        start: [batch, planes, 2], cosine and sine of the angle before the first step.
        segment_ids: as `linear_scan` takes them; each segment but the first starts at angle 0.
        options: of `linear_scan`.

    Returns:
        exp(i angle so far), complex [batch, time, planes], and the last one as `start`.
    """
    write = jnp.zeros(angle.shape, jnp.result_type(angle, jnp.complex64))
    if segment_ids is not None:  # the scan restarts empty: the first turn is written there
        first = jnp.exp(1j * hide_padding(angle, segment_ids >= 0))
        write = jnp.where(begins(segment_ids)[..., None], first, write)
    turns, last = linear_scan(
        write,
        jnp.zeros(angle.shape[-1], angle.dtype),
        phase=angle,
        initial_state=jax.lax.complex(start[..., 0], start[..., 1]),
        segment_ids=segment_ids,
        **options,
    )
    return turns, jnp.stack([last.real, last.imag], axis=-1)

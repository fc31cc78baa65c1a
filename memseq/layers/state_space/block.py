"""What surrounds a time-invariant state space: skip connection and gated linear unit."""

import flax.linen as nn
import jax

from memseq.layers.common.vector import VectorLayer


class StateSpaceLayer(VectorLayer):
    """A linear memory whose read-out gets D x added and passes a gated linear unit.

        out = (W g) * sigmoid(V g),  g = gelu(y + D x)

    Subclasses call `setup_read_out` in `setup`, and write `memory_shape`, `project` and `mix`,
    whose read-out is y [batch, time, features].

    Attributes:
        glu: False leaves y + D x as it is: a linear layer.
    """

    glu: bool = True

    def setup_read_out(self) -> None:
        self.skip = self.param("D", nn.initializers.normal(1.0), (self.features,), self.param_dtype)
        if self.glu:
            self.output = self.dense(self.features, use_bias=True)
            self.gate = self.dense(self.features, use_bias=True)

    def finish(self, x: jax.Array, out: jax.Array) -> jax.Array:
        out = out + (self.skip * x).astype(out.dtype)
        if not self.glu:
            return out
        out = nn.gelu(out)
        return self.output(out) * nn.sigmoid(self.gate(out))

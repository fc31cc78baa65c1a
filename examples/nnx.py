"""A memory layer in Flax NNX, wrapped by `ToNNX`: trained for two steps, then streamed."""

import jax
import jax.numpy as jnp
from flax import nnx

from memseq.layers import GatedDeltaNet


class Model(nnx.Module):
    """A residual memory and a projection."""

    def __init__(self, rngs):
        layer = nnx.bridge.ToNNX(GatedDeltaNet(features=16, heads=2), rngs=rngs)
        self.memory = layer.lazy_init(jnp.zeros((1, 1, 16)))  # any batch and time
        self.output = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x, state=None):
        y, state = self.memory(x, state)
        return self.output(x + y), state


@nnx.jit
def train_step(model, x, target):
    def loss(model):
        return jnp.mean((model(x)[0] - target) ** 2)

    value, gradients = nnx.value_and_grad(loss)(model)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients))
    return value


x, target = jax.random.normal(jax.random.key(0), (2, 2, 12, 16))
model = Model(nnx.Rngs(0))
losses = [float(train_step(model, x, target)) for _ in range(2)]

call = nnx.jit(lambda model, x, state=None: model(x, state))
whole, _ = call(model, x)
first, state = call(model, x[:, :8])
second, _ = call(model, x[:, 8:], state)  # goes on where the first call stopped
streamed = jnp.concatenate([first, second], axis=1)
print("losses:", losses, "streamed is parallel:", bool(jnp.allclose(whole, streamed, atol=1e-5)))

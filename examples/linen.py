"""A memory layer in Flax Linen, inside a module of one's own: trained for two steps, streamed."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers import GatedDeltaNet


class Model(nn.Module):
    """A residual memory and a projection."""

    @nn.compact
    def __call__(self, x, state=None):
        y, state = GatedDeltaNet(features=16, heads=2)(x, state)
        return nn.Dense(16)(x + y), state


model = Model()


@jax.jit
def train_step(params, x, target):
    def loss(params):
        y, _ = model.apply(params, x)
        return jnp.mean((y - target) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value


x, target = jax.random.normal(jax.random.key(0), (2, 2, 12, 16))
params = jax.jit(model.init)(jax.random.key(1), x)
losses = []
for _ in range(2):
    params, loss = train_step(params, x, target)
    losses.append(float(loss))

call = jax.jit(model.apply)
whole, _ = call(params, x)
first, state = call(params, x[:, :8])
second, _ = call(params, x[:, 8:], state)  # goes on where the first call stopped
streamed = jnp.concatenate([first, second], axis=1)
print("losses:", losses, "streamed is parallel:", bool(jnp.allclose(whole, streamed, atol=1e-5)))

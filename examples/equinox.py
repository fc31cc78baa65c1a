"""A memory in Equinox: its own linear layers around the delta rule, trained, then streamed."""

import equinox as eqx
import jax
import jax.numpy as jnp

from memseq.pallas_kernels import delta_rule


class Memory(eqx.Module):
    """Maps x [batch, time, features] to (y like x, state to go on from)."""

    qkv: eqx.nn.Linear
    beta: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, features, key):
        keys = jax.random.split(key, 3)
        self.qkv = eqx.nn.Linear(features, 3 * features, use_bias=False, key=keys[0])
        self.beta = eqx.nn.Linear(features, 1, key=keys[1])
        self.out = eqx.nn.Linear(features, features, key=keys[2])

    @eqx.filter_jit
    def __call__(self, x, state=None):
        qkv, beta = (jax.vmap(jax.vmap(layer))(x) for layer in (self.qkv, self.beta))
        query, key, value = jnp.split(qkv[:, :, None, :], 3, axis=-1)  # one head
        key = key / jnp.sqrt(jnp.sum(key**2, -1, keepdims=True) + 1e-6)
        out, state = delta_rule(query, key, value, jax.nn.sigmoid(beta), initial_state=state)
        return jax.vmap(jax.vmap(self.out))(out[:, :, 0]), state


@eqx.filter_jit
@eqx.filter_value_and_grad
def loss_and_gradients(model, x, target):
    return jnp.mean((model(x)[0] - target) ** 2)


x, target = jax.random.normal(jax.random.key(0), (2, 2, 12, 16))
model, losses = Memory(16, jax.random.key(1)), []
for _ in range(2):
    loss, gradients = loss_and_gradients(model, x, target)
    model = eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, gradients))
    losses.append(float(loss))

whole, _ = model(x)
first, state = model(x[:, :8])
second, _ = model(x[:, 8:], state)  # goes on where the first call stopped
streamed = jnp.concatenate([first, second], axis=1)
print("losses:", losses, "streamed is parallel:", bool(jnp.allclose(whole, streamed, atol=1e-5)))

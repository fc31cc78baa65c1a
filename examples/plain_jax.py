"""A memory in plain JAX: one head of the delta rule, trained for two steps, then streamed."""

import jax
import jax.numpy as jnp

from memseq.pallas_kernels import delta_rule

FEATURES = 16


@jax.jit
def memory(params, x, state=None):
    """x [batch, time, features] -> (y like x, state to go on from)."""
    query, key, value = jnp.split(x @ params["qkv"], 3, axis=-1)
    key = key / jnp.sqrt(jnp.sum(key**2, -1, keepdims=True) + 1e-6)
    query, key, value = (a[:, :, None, :] for a in (query, key, value))  # one head
    beta = jax.nn.sigmoid(x @ params["beta"])
    out, state = delta_rule(query, key, value, beta, initial_state=state)
    return out[:, :, 0] @ params["out"], state


@jax.jit
def train_step(params, x, target):
    def loss(params):
        return jnp.mean((memory(params, x)[0] - target) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value


keys = jax.random.split(jax.random.key(0), 5)
params = {
    name: jax.random.normal(key, (FEATURES, size)) / FEATURES**0.5
    for name, size, key in zip(("qkv", "beta", "out"), (48, 1, 16), keys[:3], strict=True)
}
x, target = jax.random.normal(keys[3], (2, 2, 12, FEATURES))
losses = []
for _ in range(2):
    params, loss = train_step(params, x, target)
    losses.append(float(loss))

whole, _ = memory(params, x)
first, state = memory(params, x[:, :8])
second, _ = memory(params, x[:, 8:], state)  # goes on where the first call stopped
streamed = jnp.concatenate([first, second], axis=1)
print("losses:", losses, "streamed is parallel:", bool(jnp.allclose(whole, streamed, atol=1e-5)))

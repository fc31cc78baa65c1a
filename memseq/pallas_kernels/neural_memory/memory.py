"""The memory: a small network whose weights are what is remembered."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.checks import check_choice
from memseq.pallas_kernels.common.sharded import vary_together

ACTIVATIONS = {
    "gelu": jax.nn.gelu,  # the tanh form
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}
NORMALISATIONS = ("none", "layer", "rms")

# One layer of one head: {"weight": [in, out]} and perhaps "bias": [out]. A memory is a tuple of
# them, and gradients, momentum and states have its structure.
Layer = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Memory:
    """What network the weights are of; how many layers, and how wide, the weights say.

        f(x) = W_n act(... act(W_1 x)),  M(x) = [x +] [norm] f(x)

    Attributes:
        activation: between the layers, one of `ACTIVATIONS`.
        residual: add the input, which then has the size of a value.
        normalisation: of f(x) before the residual: "none", "layer" (mean 0, variance 1) or "rms".
            Its scale and offset are arguments of the operation and are not written to.
        epsilon: added to the variance. A memory that starts at zero has variance 0, and its first
            gradient is epsilon ** -0.5 times too large: start at weights that are not.
    """

    activation: str = "gelu"
    residual: bool = True
    normalisation: str = "layer"
    epsilon: float = 1e-5

    def __post_init__(self):
        check_choice("memory.activation", self.activation, ACTIVATIONS)
        check_choice("memory.normalisation", self.normalisation, NORMALISATIONS)
        if not self.epsilon > 0:
            raise ValueError(f"memory.epsilon: expected a positive number, got {self.epsilon!r}")


def forward(
    memory: Memory,
    layers: int,
    linear: Callable[[int, jax.Array], jax.Array],
    affine: dict[str, jax.Array],
    x: jax.Array,
) -> jax.Array:
    """M(x) for x [..., in]; `linear(i, h)` is what the i-th layer makes of its input h.

    affine: "scale" and "offset" [out] of the normalisation, each or none of them.
    """
    h = x
    for i in range(layers):
        h = linear(i, h)
        if i < layers - 1:
            h = ACTIVATIONS[memory.activation](h)
    h = _normalised(memory, h)
    if "scale" in affine:
        h = h * affine["scale"]
    if "offset" in affine:
        h = h + affine["offset"]
    return x + h if memory.residual else h


def _normalised(memory: Memory, h: jax.Array) -> jax.Array:
    if memory.normalisation == "none":
        return h
    if memory.normalisation == "layer":
        h = h - jnp.mean(h, axis=-1, keepdims=True)
    return h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + memory.epsilon)


def through(weights: tuple[Layer, ...], precision) -> Callable[[int, jax.Array], jax.Array]:
    """`linear` of `forward` for these weights as they are."""

    def linear(i, h):
        z = jnp.matmul(h, weights[i]["weight"], precision=precision)
        return z + weights[i]["bias"] if "bias" in weights[i] else z

    return linear


def local_errors(
    memory: Memory,
    loss_of: Callable[[jax.Array], jax.Array],
    linear: Callable[[int, jax.Array], jax.Array],
    widths: Sequence[int],
    affine: dict[str, jax.Array],
    key: jax.Array,
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Of every layer, its inputs [..., in] and the loss' gradients in its outputs [..., out].

    A token's gradient in a layer's weight is the outer product of the two, in its bias the second:
    nothing of the weights' size is made.

    Args:
        loss_of: out [..., dim] to the losses of the tokens.
        linear: as of `forward`.
        widths: out of every layer.
        affine: as of `forward`.
        key: [..., in].
    """

    def loss(moved):
        inputs = []

        def moving(i, h):
            inputs.append(h)
            return linear(i, h) + moved[i]

        return loss_of(forward(memory, len(widths), moving, affine, key)), inputs

    still = [jnp.zeros((*key.shape[:-1], width), key.dtype) for width in widths]
    # inside shard_map, the gradient in what devices share would be summed over them
    *still, _ = vary_together((*still, key))
    losses, pull, inputs = jax.vjp(loss, still, has_aux=True)
    return inputs, pull(jnp.ones_like(losses))[0]

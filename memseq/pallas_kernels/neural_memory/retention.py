"""What happens to a memory's weights beside decay: maps that keep them bounded.

A memory adds up its gradient steps in weights A. A map acts in one of two ways: it changes A at the
borders of update chunks (`border`), or it says which weights A stands for (`view`).
"""

import dataclasses

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.checks import check_choice
from memseq.pallas_kernels.neural_memory.memory import Layer

BORDER = ("clamp", "elastic", "sphere", "row_norm")
VIEW = ("lq", "softmax")
TINY = 1e-24


@dataclasses.dataclass(frozen=True)
class Retention:
    """A map of every weight matrix A [..., in, out]; biases stay as they are.

    At the borders of update chunks A is replaced:
    "clamp": A min(1, amount / |A|), the Frobenius norm kept below `amount`.
    "elastic": sign(A) max(|A| - amount, 0), what an elastic net keeps.
    "sphere": each column (the inputs of one output) is divided by its norm.
    "row_norm": each column is given the norm that it started with (LaCT).

    A stays, and the network's weights are made from it:
    "lq": A / max(|A|_q, 1)^(q - 2) with q = `amount` (Moneta). Inside a chunk the norm is that of
        the chunk's start, as the paper's parallel form has it. The paper divides by smaller norms
        too; then, for q > 2, weights grow without bound as A is forgotten.
    "softmax": size * softmax(A) over the inputs of each output, with size = `amount` (Memora): A is
        the logarithm of the weights up to a constant, and adding steps to it is mirror descent.
        Every read takes the softmax of its own step's A, so the chunked form makes weights for
        every step of the chunk that it is in.

    Attributes:
        kind: "none" or one of the above.
        amount: as said above.
    """

    kind: str = "none"
    amount: float | None = None

    def __post_init__(self):
        check_choice("retention.kind", self.kind, ("none", *BORDER, *VIEW))
        needs = self.kind in ("clamp", "elastic", *VIEW)
        if needs != (self.amount is not None):
            raise ValueError(
                f"retention.amount: {self.kind!r} expects {'a number' if needs else 'None'}, "
                f"got {self.amount!r}"
            )
        if needs and not self.amount > 0:
            raise ValueError(f"retention.amount: expected a positive number, got {self.amount!r}")

    @property
    def scales(self) -> bool:
        """The weights are A times a number that is fixed within a chunk."""
        return self.kind != "softmax"

    def border(self, layers: tuple[Layer, ...], initial: tuple[Layer, ...]) -> tuple[Layer, ...]:
        """A after a chunk's last step; `initial` are the weights that the memory starts from."""
        return tuple(
            layer | {"weight": self._border(layer["weight"], first["weight"])}
            for layer, first in zip(layers, initial, strict=True)
        )

    def _border(self, a, first):
        if self.kind == "clamp":
            return a * (self.amount * jax.lax.rsqrt(jnp.maximum(_squares(a), self.amount**2)))
        if self.kind == "elastic":
            return jnp.sign(a) * jnp.maximum(jnp.abs(a) - self.amount, 0)
        if self.kind in ("sphere", "row_norm"):
            a = a * jax.lax.rsqrt(_squares(a, -2) + TINY)
            return a if self.kind == "sphere" else a * jnp.sqrt(_squares(first, -2) + TINY)
        return a

    def factor(self, a: jax.Array) -> jax.Array:
        """What A [..., in, out] is multiplied with, in a chunk that starts at `a`, where `scales`.

        [..., 1, 1].
        """
        if self.kind == "lq":
            q = self.amount
            powers = jnp.sum((a * a + TINY) ** (q / 2), axis=(-2, -1), keepdims=True)
            return jnp.maximum(powers, 1) ** (-(q - 2) / q)
        return jnp.ones((1, 1), a.dtype)

    def view(self, layers: tuple[Layer, ...], start: tuple[Layer, ...]) -> tuple[Layer, ...]:
        """The network's weights for A = `layers`, in a chunk that starts at `start`."""
        if self.kind == "softmax":
            return tuple(w | {"weight": self.soft(w["weight"])} for w in layers)
        if self.kind == "lq":
            return tuple(
                w | {"weight": w["weight"] * self.factor(s["weight"])}
                for w, s in zip(layers, start, strict=True)
            )
        return layers

    def soft(self, a: jax.Array) -> jax.Array:
        """size * softmax over the inputs of each output, for A [..., in, out]."""
        return self.amount * jax.nn.softmax(a, axis=-2)


def _squares(a, axis=(-2, -1)):
    return jnp.sum(a * a, axis=axis, keepdims=True)

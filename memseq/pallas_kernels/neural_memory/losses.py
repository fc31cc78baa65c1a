"""What a memory is trained on, token by token: the distance of its answer from the value."""

import dataclasses

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.checks import check_choice

KINDS = ("dot", "l2", "lp", "huber", "huber_each", "robust")
WITH_THRESHOLD = ("huber", "huber_each", "robust")
SMOOTH = 1e-6  # r^2 + SMOOTH in place of r^2 where a root of it is taken


@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss of one token, with r = answer - value.

    "dot": -answer . value. "l2": |r|^2 / 2. "lp": sum |r_i|^power, whose gradient carries the
    factor `power`; |r_i| is (r_i^2 + 1e-6)^(1/2), so that it is smooth at 0. "huber": |r|^2 / 2 up
    to the token's threshold d, d (|r| - d/2) beyond it. "huber_each": the same of every coordinate.
    "robust": |r|^2 / 2 + d |r|.

    Attributes:
        kind: one of the above.
        power: of "lp".
        scale: a factor; 2 makes "l2" the squared distance, as Titans and Miras write it.
    """

    kind: str = "l2"
    power: float = 3.0
    scale: float = 1.0

    def __post_init__(self):
        check_choice("loss.kind", self.kind, KINDS)
        if not self.power >= 1:
            raise ValueError(f"loss.power: expected at least 1, got {self.power!r}")

    def __call__(self, out: jax.Array, value: jax.Array, threshold: jax.Array | None) -> jax.Array:
        """out, value [..., dim] and threshold [..., 1] to [..., 1]."""
        return self.scale * self._plain(out, value, threshold)

    def _plain(self, out, value, threshold):
        if self.kind == "dot":
            return -_sum(out * value)
        r = out - value
        if self.kind == "lp":
            return _sum((r * r + SMOOTH) ** (self.power / 2))
        if self.kind == "huber_each":
            return _sum(_huber(r * r, threshold))
        squares = _sum(r * r)
        if self.kind == "huber":
            return _huber(squares, threshold)
        if self.kind == "robust":
            return squares / 2 + threshold * jnp.sqrt(squares + SMOOTH)
        return squares / 2


def _sum(x):
    return jnp.sum(x, axis=-1, keepdims=True)


def _huber(squares: jax.Array, threshold: jax.Array) -> jax.Array:
    """Of a squared length. The root is not taken of 0, where its derivative is infinite."""
    near = squares <= threshold * threshold
    length = jnp.sqrt(jnp.where(near, 1, squares))
    return jnp.where(near, squares / 2, threshold * (length - threshold / 2))

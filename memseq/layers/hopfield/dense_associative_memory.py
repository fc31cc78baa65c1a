"""Dense associative memories: energies of states and stored patterns, and ways down them."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.parts import hidden
from memseq.pallas_kernels import hopfield_retrieve
from memseq.pallas_kernels.common.checks import check_array, check_choice, check_count

KINDS = ("lse", "lse_euclidean", "lsr", "polynomial", "exponential")
FLOOR = 1e-12  # what an LSR energy has beside the kernels: it ends where no pattern is near


class DenseAssociativeMemory(nn.Module):
    """A memory that is an energy of a state x and patterns xi, and the step that lowers it.

    | kind | energy | step |
    |---|---|---|
    | lse | x.x / 2 - log sum exp(beta xi.x) / beta | sum softmax(beta xi.x) xi |
    | lse_euclidean | -log sum exp(-beta r / 2) / beta, r = squared distance | mean shift |
    | lsr | -log(eps + sum relu(1 - beta r / 2)) / beta | mean of the patterns with r < 2 / beta |
    | polynomial | -sum relu(xi.x)^power, on a sphere | sum relu(xi.x)^(power - 1) xi, normed |
    | exponential | -log sum exp(beta xi.x), on a sphere | sum softmax(beta xi.x) xi, normed |

    Ramsauer et al. 2020, arXiv:2008.02217; Krotov and Hopfield 2016, arXiv:1606.01164; Demircigil
    et al. 2017, arXiv:1702.01929; LSR (log-sum-ReLU, the Epanechnikov kernel) Hoover et al. 2025,
    arXiv:2506.10801. The sphere has the radius sqrt(features), that of patterns of +-1. No step
    raises its energy. A state that sees no LSR pattern stays where it is.

    `layer(x, mask)` of x [batch, n, features] retrieves from learned patterns; `stored` replaces
    them, and then nothing is learned. States of +-1 go down the energies of `binary` instead.

    Attributes:
        features: size of a state and a pattern.
        kind: of the energy, see above.
        patterns: number of learned patterns.
        beta: inverse temperature; None is features ** -0.5 ("lse" and "exponential") or 1.
        power: of "polynomial", at least 2.
        steps: taken by a call.
        implementation, chunk_size, dtype, param_dtype: as in every layer.
    """

    features: int
    kind: str = "lse"
    patterns: int = 64
    beta: float | None = None
    power: int = 3
    steps: int = 1
    implementation: str = "auto"
    chunk_size: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32

    PAPER: ClassVar[str] = "Krotov and Hopfield 2016, arXiv:1606.01164"
    MEMORY: ClassVar[str] = "learned patterns [patterns, features]"
    OPERATION: ClassVar[str] = "hopfield_retrieve"

    @nn.compact
    def _stored(self, stored: jax.Array | None) -> jax.Array:
        """[batch or 1, patterns, features] in float32 at least."""
        if stored is None:
            shape, normal = (self.patterns, self.features), nn.initializers.normal(1.0)
            stored = self.param("stored_patterns", normal, shape, self.param_dtype)
        check_array(
            "stored",
            stored,
            (None,) * (stored.ndim - 1) + (self.features,),
            "[patterns, features] or [batch, patterns, features]",
        )
        stored = stored[None] if stored.ndim == 2 else stored
        return stored.astype(jnp.promote_types(stored.dtype, jnp.float32))

    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, *, stored: jax.Array | None = None
    ) -> jax.Array:
        """`retrieve` of x [batch, n, features]; where mask bool [batch, n] is False, 0."""
        self._check(x)
        x = hidden(x, mask)
        y = self.retrieve(x, stored)
        return hidden(y, mask)

    def retrieve(
        self, x: jax.Array, stored: jax.Array | None = None, steps: int | None = None
    ) -> jax.Array:
        """Where `steps` (None: the layer's own) steps lead from x [batch, n, features]."""
        self._check(x)
        steps = self.steps if steps is None else steps
        check_count("steps", steps, 1)
        stored = self._stored(stored)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        for _ in range(steps):
            wide = self._step(wide, stored)
        return wide.astype(x.dtype if self.dtype is None else self.dtype)

    def energy(self, x: jax.Array, stored: jax.Array | None = None) -> jax.Array:
        """Energies [batch, n] of states x [batch, n, features], in float32 at least."""
        self._check(x)
        stored = self._stored(stored)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        beta = self._beta()
        if self.kind == "lsr":
            near = nn.relu(1 - beta / 2 * _squared_distances(x, stored)).sum(-1)
            return -jnp.log(FLOOR + near) / beta
        if self.kind == "lse_euclidean":
            scores = -beta / 2 * _squared_distances(x, stored)
            return -jax.nn.logsumexp(scores, axis=-1) / beta
        products = _products(x, stored)
        if self.kind == "polynomial":
            return -(nn.relu(products) ** self.power).sum(-1)
        total = jax.nn.logsumexp(beta * products, axis=-1)
        return -total if self.kind == "exponential" else (x * x).sum(-1) / 2 - total / beta

    @nn.nowrap
    def _beta(self):
        if self.beta is not None:
            return self.beta
        return self.features**-0.5 if self.kind in ("lse", "exponential") else 1.0

    @nn.nowrap
    def _check(self, x):
        check_array("x", x, (None, None, self.features), "[batch, n, features]")
        check_choice("kind", self.kind, KINDS)
        check_count("patterns", self.patterns, 1)
        check_count("power", self.power, 2)

    @nn.nowrap
    def _step(self, x, stored):
        """The step of the table, x and stored in float32 at least."""
        if self.kind == "lsr":
            near = _squared_distances(x, stored) < 2 / self._beta()
            count = near.sum(-1, keepdims=True)
            total = jnp.einsum(
                "bnp,bpf->bnf", near.astype(x.dtype), _rows(stored, x), precision=HIGHEST
            )
            return jnp.where(count > 0, total / jnp.maximum(count, 1), x)
        if self.kind == "polynomial":
            slopes = nn.relu(_products(x, stored)) ** (self.power - 1)
            total = jnp.einsum("bnp,bpf->bnf", slopes, _rows(stored, x), precision=HIGHEST)
            return _on_sphere(total, x)
        query, keys = x, stored
        if self.kind == "lse_euclidean":
            # -|x - xi|^2 / 2 is (x, 1) . (xi, -|xi|^2 / 2) and a term of x alone
            query = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
            keys = jnp.concatenate([stored, -(stored * stored).sum(-1, keepdims=True) / 2], -1)
        total = hopfield_retrieve(
            query[:, :, None],
            keys[:, :, None],
            stored[:, :, None],
            beta=self._beta(),
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )[:, :, 0]
        return _on_sphere(total, x) if self.kind == "exponential" else total


HIGHEST = jax.lax.Precision.HIGHEST


def _rows(stored, x):
    return jnp.broadcast_to(stored, (x.shape[0], *stored.shape[1:]))


def _products(x, stored):
    return jnp.einsum("bnf,bpf->bnp", x, _rows(stored, x), precision=HIGHEST)


def _squared_distances(x, stored):
    """[batch, n, patterns], without the cancellation of |x|^2 - 2 x.xi + |xi|^2."""
    return jnp.square(x[:, :, None] - stored[:, None]).sum(-1)


def _on_sphere(total, x):
    """total at the radius sqrt(features); x where it is 0."""
    square = (total * total).sum(-1, keepdims=True)
    scaled = total * jax.lax.rsqrt(jnp.where(square > 0, square, 1) / total.shape[-1])
    return jnp.where(square > 0, scaled, x)

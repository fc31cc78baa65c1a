"""Networks of neurons of +-1: dense associative memories, and the classical Hopfield network."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.checks import check_array, check_choice, check_count

HIGHEST = jax.lax.Precision.HIGHEST
RULES = ("hebb", "storkey", "pseudo_inverse")


class BinaryMemory(nn.Module):
    """A dense associative memory of neurons of +-1 (Krotov and Hopfield 2016, arXiv:1606.01164).

        E(s) = -sum_patterns F(xi . s),
        s_i <- sign sum_patterns [F(xi_i + rest_i) - F(-xi_i + rest_i)],  rest_i = xi . s - xi_i s_i

    F(x) = relu(x)^power, or x^power, or exp(x) (Demircigil et al. 2017, arXiv:1702.01929). Nothing
    is learned. Neurons taken one after another never raise the energy; all at once may.

    Attributes:
        kind: "polynomial" or "exponential".
        power: of the polynomial, at least 2; 2 is the classical network with Hebb's rule.
        rectified: relu(x)^power, else x^power.
    """

    kind: str = "polynomial"
    power: int = 3
    rectified: bool = True

    def energy(self, state: jax.Array, stored: jax.Array) -> jax.Array:
        """[...] of states [..., neurons] and patterns [patterns, neurons].

        Of "exponential" it is -log sum exp(xi . s), which rises and falls with the energy.
        """
        self._check(state, stored)
        overlap = jnp.einsum("...n,pn->...p", state, stored, precision=HIGHEST)
        if self.kind == "exponential":
            return -jax.nn.logsumexp(overlap, axis=-1)
        return -self._grown(overlap).sum(-1)

    def step(self, state: jax.Array, stored: jax.Array) -> jax.Array:
        """All neurons of states [..., neurons] at once."""
        self._check(state, stored)
        overlap = jnp.einsum("...n,pn->...p", state, stored, precision=HIGHEST)
        rest = overlap[..., None] - stored * state[..., None, :]
        return _sign(self._difference(rest, stored), state)

    def sweep(self, state: jax.Array, stored: jax.Array, order: jax.Array) -> jax.Array:
        """One neuron after another, in the order int32 [...] of their indices."""
        self._check(state, stored)

        def turn(carry, i):
            state, overlap = carry
            own, pattern = state[..., i], stored[:, i]
            rest = overlap - pattern * own[..., None]
            new = _sign(self._difference(rest[..., None], pattern[:, None])[..., 0], own)
            return (state.at[..., i].set(new), rest + pattern * new[..., None]), None

        overlap = jnp.einsum("...n,pn->...p", state, stored, precision=HIGHEST)
        (state, _), _ = jax.lax.scan(turn, (state, overlap), order)
        return state

    def _difference(self, rest, pattern):
        """sum_patterns of F(pattern + rest) - F(-pattern + rest), up to a positive factor."""
        if self.kind == "exponential":
            top = jnp.max(rest, axis=-2, keepdims=True)
            return (jnp.exp(rest - top) * 2 * jnp.sinh(pattern)).sum(-2)
        return (self._grown(rest + pattern) - self._grown(rest - pattern)).sum(-2)

    def _grown(self, x):
        return (nn.relu(x) if self.rectified else x) ** self.power

    @nn.nowrap
    def _check(self, state, stored):
        check_choice("kind", self.kind, ("polynomial", "exponential"))
        check_count("power", self.power, 2)
        check_array("stored", stored, (None, None), "[patterns, neurons]")
        if state.shape[-1:] != stored.shape[1:]:
            raise ValueError(
                f"state: expected [..., neurons] = [..., {stored.shape[1]}], "
                f"got {list(state.shape)}"
            )


class ClassicalHopfield(nn.Module):
    """The Hopfield network with one matrix of weights (Hopfield 1982).

        E(s) = -s W s / 2,   s <- sign(W s)

    `store` makes W of patterns of +-1 and `retrieve` walks; nothing is learned by gradients.
    Neurons taken one after another never raise the energy; all at once may go to and fro.

    Attributes:
        rule: "hebb" (sum of outer products / neurons; 0.138 patterns a neuron), "storkey" (Storkey
            1997: local, pattern by pattern, more of them) or "pseudo_inverse" (Personnaz et al.
            1985: exact for as many independent patterns as neurons).
    """

    rule: str = "hebb"

    def store(self, patterns: jax.Array) -> jax.Array:
        """Weights [neurons, neurons] of patterns [patterns, neurons], with a diagonal of 0."""
        check_choice("rule", self.rule, RULES)
        check_array("patterns", patterns, (None, None), "[patterns, neurons]")
        neurons = patterns.shape[1]
        if self.rule == "hebb":
            weights = jnp.matmul(patterns.T, patterns, precision=HIGHEST) / neurons
        elif self.rule == "pseudo_inverse":
            inverse = jnp.linalg.pinv(patterns)
            weights = jnp.matmul(inverse, patterns, precision=HIGHEST)
        else:
            weights, _ = jax.lax.scan(
                _storkey, jnp.zeros((neurons, neurons), patterns.dtype), patterns
            )
        return weights - jnp.diag(jnp.diag(weights))

    def energy(self, state: jax.Array, weights: jax.Array) -> jax.Array:
        """[...] of states [..., neurons]."""
        return -jnp.einsum("...i,ij,...j->...", state, weights, state, precision=HIGHEST) / 2

    def step(self, state: jax.Array, weights: jax.Array) -> jax.Array:
        """All neurons of states [..., neurons] at once."""
        return _sign(jnp.matmul(state, weights, precision=HIGHEST), state)

    def sweep(self, state: jax.Array, weights: jax.Array, order: jax.Array) -> jax.Array:
        """One neuron after another, in the order int32 [...] of their indices."""

        def turn(state, i):
            field = jnp.matmul(state, weights[:, i], precision=HIGHEST)
            return state.at[..., i].set(_sign(field, state[..., i])), None

        return jax.lax.scan(turn, state, order)[0]

    def retrieve(self, state: jax.Array, weights: jax.Array, steps: int = 20) -> jax.Array:
        """`steps` steps of all neurons at once."""
        check_count("steps", steps, 1)
        return jax.lax.scan(lambda s, _: (self.step(s, weights), None), state, length=steps)[0]


def _storkey(weights, pattern):
    """W_ij += (x_i x_j - x_i h_ji - h_ij x_j) / n, h_ij = sum_{k != i, j} W_ik x_k."""
    n = pattern.shape[0]
    field = jnp.matmul(weights, pattern, precision=HIGHEST)
    # column i holds what neuron i and neuron j themselves gave
    local = field[:, None] - (jnp.diag(weights) * pattern)[:, None] - weights * pattern[None, :]
    own = jnp.outer(pattern, pattern)
    new = own - pattern[:, None] * local.T - local * pattern[None, :]
    return weights + new / n, None


def _sign(x, otherwise):
    """The sign of x; `otherwise` where it is 0."""
    return jnp.where(x == 0, otherwise, jnp.sign(x).astype(otherwise.dtype))

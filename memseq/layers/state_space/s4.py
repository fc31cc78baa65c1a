"""State spaces with dense transitions: S4 (diagonal plus low rank), and LSSL before it."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.parts import widen
from memseq.layers.common.vector import VectorState
from memseq.layers.state_space import hippo
from memseq.layers.state_space.invariant import Dense, join, split
from memseq.layers.state_space.s4d import InvariantLayer
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class S4State(VectorState):
    """State of `S4`; `memory` is [batch, features, state_dim]: real parts, then imaginary ones."""


class S4(InvariantLayer):
    """A structured state space for every channel: HiPPO-LegS as diagonal plus low rank.

        h_t = A' h_{t-1} + B' x_t,  y_t = 2 Re(C . h_t) + D x_t,
        A = diag(-exp(decay) + i phase) - P P^*, discretised by the bilinear rule with dt

    Gu et al. 2022, "Efficiently modeling long sequences with structured state spaces",
    arXiv:2111.00396, section 3. The modes are state_dim / 2 of a real system in conjugate pairs, so
    what P^* reads is 2 Re(P^* h). `kernel` is the paper's convolution kernel, from its generating
    function; over time the layer runs as all time-invariant ones, with A' formed from the diagonal
    and the rank-1 correction (Woodbury), never by a dense inverse.

    Attributes (beside those of every layer, of `StateSpaceLayer` and of `InvariantLayer`): none.
    """

    PAPER: ClassVar[str] = "Gu et al. 2022, arXiv:2111.00396"
    MEMORY: ClassVar[str] = "vectors [features, state_dim]"
    OPERATION: ClassVar[None] = None
    FORMS: ClassVar[tuple[str, ...]] = ("reference", "chunked")
    STATE: ClassVar[type] = S4State

    def setup(self):
        self.check_invariant()
        channels, size = self.memory_shape()
        values, vectors = hippo.diagonalize("legs", size)
        upper = slice(size // 2, None)  # eigenvalues come by imaginary part
        back = vectors.conj().T[upper]
        turns = jnp.asarray(values.imag[upper], jnp.float32)
        modes = (channels, size // 2)

        def same(vector):
            parts = split(jnp.asarray(back @ vector, jnp.complex64))
            return lambda key: jnp.broadcast_to(parts, (channels, size))

        self.dt_log = self.param("dt_log", self.dt_log_init, (channels, 1))
        self.decay = self.param("decay", nn.initializers.constant(jnp.log(0.5)), modes)
        self.phase = self.param("phase", lambda key: jnp.broadcast_to(turns, modes))
        self.low_rank = self.param("P", same(hippo.low_rank("legs", size)[0]))
        self.write = self.param("B", same(hippo.transition("legs", size)[1]))
        self.read = self.param("C", nn.initializers.normal(0.5**0.5), (channels, size))
        self.setup_read_out()

    def modes(self) -> jax.Array:
        """Eigenvalues of the diagonal part, complex [features, state_dim / 2]."""
        return jax.lax.complex(-jnp.exp(self.decay), self.phase)

    def system(self):
        change, write = self.change()
        return Dense(change + jnp.eye(change.shape[-1])), write, self.both_halves(self.read)

    def change(self) -> tuple[jax.Array, jax.Array]:
        """A' - 1 [features, state_dim, state_dim] and B' [features, state_dim].

        The 1 is never added: where dt is small it would leave A' with fewer digits.
        """
        dt, p = jnp.exp(self.dt_log), self.low_rank
        # (1 - dt A / 2)^-1 = E - dt (E p) (E^T p)^T / (1 + dt p . E p), E = 1 / (1 - dt diag / 2)
        inverse = 1 / (1 - dt * self.modes() / 2)
        of_p = split(inverse * join(p, self.phase))
        from_p = split(inverse.conj() * join(p, self.phase))
        share = dt / (1 + dt * jnp.sum(p * of_p, axis=-1, keepdims=True))

        def solve(v):
            return split(inverse * join(v, self.phase)) - share * of_p * jnp.sum(
                from_p * v, axis=-1, keepdims=True
            )

        less_1 = dt * self.modes() / 2 * inverse
        real, imag = (jax.vmap(jnp.diag)(a) for a in (less_1.real, less_1.imag))
        dense = jnp.concatenate(
            [jnp.concatenate([real, -imag], 2), jnp.concatenate([imag, real], 2)], 1
        )
        dense -= share[..., None] * of_p[:, :, None] * from_p[:, None, :]
        return 2 * dense, dt * solve(self.write)

    def both_halves(self, read: jax.Array) -> jax.Array:
        """The real vector that reads 2 Re(C . h)."""
        real, imag = jnp.split(read, 2, axis=-1)
        return jnp.concatenate([2 * real, -2 * imag], axis=-1)

    def kernel(self, length: int) -> jax.Array:
        """The taps C A'^l B' for l < length, [features, length], by the generating function.

        K(w) = c (1 - w A')^-1 B' at the roots of unity w, with c = C (1 - A'^length), and
        K's inverse Fourier transform. Written with r = 1 / (2 (1 - w) / dt - (1 + w) diag), it has
        no pole at w = -1, where the paper's form takes a limit (dt / 2 c . B).
        """
        check_count("length", length, 2)
        change, read = self.change()[0], self.both_halves(self.read)
        row, left = jnp.zeros_like(read), length
        while left:  # read . (A'^length - 1) by the binary digits of length, from A'^(2^k) - 1
            if left & 1:
                row = row + jnp.einsum("dn,dnm->dm", read + row, change)
            change, left = 2 * change + change @ change, left >> 1
        # as complex numbers: the real vector [a, b] reads Re((a - i b) . h)
        c = join(-row, self.phase).conj() / 2
        p, b = join(self.low_rank, self.phase), join(self.write, self.phase)
        root = np.exp(-2j * np.pi * np.arange(length // 2 + 1) / length)
        root_less_1, root_and_1 = (jnp.asarray(a, c.dtype) for a in (1 - root, 1 + root))
        dt = jnp.exp(self.dt_log)[..., None]
        r, r_of_pair = (
            1 / (2 * root_less_1 / dt - root_and_1 * modes[..., None])
            for modes in (self.modes(), self.modes().conj())
        )

        def between(u, v):  # over the modes and their conjugates
            both = u * v
            return jnp.sum(r * both[..., None] + r_of_pair * both.conj()[..., None], axis=1)

        correction = root_and_1 / (1 + root_and_1 * between(p.conj(), p))
        transform = 2 * (between(c, b) - between(c, p) * correction * between(p.conj(), b))
        return jnp.fft.irfft(transform, length)


@state_dataclass
class LSSLState(VectorState):
    """State of `LSSL`; `memory` is [batch, features, state_dim]."""


class LSSL(InvariantLayer):
    """The linear state-space layer: HiPPO-LegS as it is, dense, with learned steps and read-outs.

        h_t = (1 - alpha dt A)^-1 ((1 + (1 - alpha) dt A) h_{t-1} + dt B x_t),
        y_t = C . h_t + D x_t

    Gu et al. 2021, "Combining recurrent, convolutional, and continuous-time models with linear
    state-space layers", arXiv:2110.13985, section 3 and its generalised bilinear rule. A and B are
    constants (the paper's LSSL-fixed, but with learned dt). Of historical interest: S4 does the
    same with less.

    Attributes (beside those of every layer, of `StateSpaceLayer` and of `InvariantLayer`):
        alpha: 1/2 is the bilinear rule, 1 backward Euler; in [1/2, 1], where all dt are stable.
    """

    alpha: float = 0.5

    PAPER: ClassVar[str] = "Gu et al. 2021, arXiv:2110.13985"
    MEMORY: ClassVar[str] = "vectors [features, state_dim]"
    OPERATION: ClassVar[None] = None
    FORMS: ClassVar[tuple[str, ...]] = ("reference", "chunked")
    STATE: ClassVar[type] = LSSLState

    def setup(self):
        self.check_invariant()
        if not 0.5 <= self.alpha <= 1:
            raise ValueError(f"alpha: expected 1/2 <= alpha <= 1, got {self.alpha}")
        channels, size = self.memory_shape()
        self.dt_log = self.param("dt_log", self.dt_log_init, (channels, 1))
        self.read = self.param("C", nn.initializers.normal(size**-0.5), (channels, size))
        self.setup_read_out()

    def system(self):
        dt = jnp.exp(widen(self.dt_log))[..., None]
        a, b = (jnp.asarray(x, dt.dtype) for x in hippo.transition("legs", self.state_dim))
        eye = jnp.eye(self.state_dim, dtype=dt.dtype)
        right = jnp.concatenate([eye + (1 - self.alpha) * dt * a, dt * b[:, None]], axis=2)
        # A is lower triangular
        both = jax.scipy.linalg.solve_triangular(eye - self.alpha * dt * a, right, lower=True)
        return Dense(both[..., :-1]), both[..., -1], self.read

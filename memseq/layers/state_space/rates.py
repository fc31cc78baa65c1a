"""How a parameter becomes the rate at which a mode fades, and how a rate and a step decay it."""

import jax
import jax.numpy as jnp

from memseq.layers.common.parts import softplus_inverse
from memseq.layers.state_space.invariant import Diagonal, split

LEAST_RATE = 1e-4

# name -> (rate of the parameter, the parameter of a rate). Wang and Li 2024, "StableSSM",
# arXiv:2311.14495: training is stable where |slope| / rate^2 stays within a multiple of the
# parameter as the rate goes to 0. That of "exp" and "softplus" has no bound, that of "inv_square"
# is 2 |w|. A "direct" rate is at least LEAST_RATE.
RATES = {
    "exp": (jnp.exp, jnp.log),
    "softplus": (jax.nn.softplus, softplus_inverse),
    "inv_square": (
        lambda w: 1 / (w**2 + 0.5),
        lambda rate: jnp.sqrt(jnp.maximum(1 / rate - 0.5, 1e-6)),
    ),
    "direct": (lambda w: jnp.maximum(w, LEAST_RATE), lambda rate: rate),
}


def discretized(
    rate: jax.Array, turn: jax.Array | None, dt: jax.Array, method: str
) -> tuple[Diagonal, jax.Array]:
    """One step of dt of modes x' = (-rate + i turn) x + u: (A, B), B as `invariant.split` gives it.

    Args:
        rate: not negative, [channels, modes].
        turn: radians per unit of time, or None for real modes.
        dt: broadcasts against rate.
        method: "zoh", exact for inputs that are held, or for complex modes "bilinear".
    """
    real, imag = -rate * dt, None if turn is None else turn * dt
    point = real if imag is None else jax.lax.complex(*jnp.broadcast_arrays(real, imag))
    if method == "zoh":
        zero = point == 0
        ratio = jnp.where(zero, 1, jnp.expm1(point) / jnp.where(zero, 1, point))
        return Diagonal(real, imag), split(dt * ratio)
    real, imag = real / 2, imag / 2
    # |1 + p|^2 / |1 - p|^2 = 1 + 4 Re p / |1 - p|^2
    log_decay = 0.5 * jnp.log1p(4 * real / ((1 - real) ** 2 + imag**2))
    phase = jnp.arctan2(imag, 1 + real) + jnp.arctan2(imag, 1 - real)
    return Diagonal(log_decay, phase), split(dt / (1 - point / 2))

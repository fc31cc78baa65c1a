"""entmax and sparsemax: weights that are exactly 0 for logits far below the largest.

The threshold comes from Newton's iteration, without a sort. Written around the largest logit,

    p_i = exp_alpha(x_i - max x - c),   exp_alpha(y) = (1 + (alpha - 1) y)_+^(1 / (alpha - 1)),

the sum of p is convex and falls in c for alpha <= 2, and c >= 0: Newton from c = 0 climbs to the
solution without ever passing it. exp_alpha is taken as exp(log1p((alpha - 1) y) / (alpha - 1)),
which goes over into exp at alpha = 1 without losing digits.
"""

import numbers

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.entmax.rows import enter, row_parameter, top

ITERATIONS = 64  # a bound: alpha in [1.5, 2] needs 8, alpha = 1 about log(n) + 4


def entmax(x: jax.Array, alpha=1.5, *, where: jax.Array | None = None) -> jax.Array:
    """The alpha-entmax of the last axis (Peters et al. 2019, arXiv:1905.05702, equation 9).

        p = argmax_p p . x - Omega(p)   over p >= 0 with sum 1,
        Omega(p) = sum_i (p_i^alpha - p_i) / (alpha (alpha - 1))

    alpha = 1 is softmax and alpha = 2 sparsemax. p is exactly one-hot where the largest logit leads
    by 1 / (alpha - 1) or more. Differentiable in x and alpha, also at alpha = 1, in both modes.

    Args:
        x: [..., n], floating. Logits of minus infinity take no part.
        alpha: in [1, 2]; a number, or an array that broadcasts to [...]. The values of an array
            are not checked.
        where: bool, broadcasts to x; False takes no part.

    Returns:
        p [..., n] in x's dtype, computed in float32 at least. A row of which nothing takes part
        is 0, and so is its gradient.

    Raises:
        ValueError: for an alpha outside [1, 2], shapes or dtypes that do not fit.
    """
    wide, part = enter(x, where)
    p = _entmax(wide, row_parameter("alpha", _checked(alpha), wide), part)
    return p.astype(jnp.result_type(x))


def sparsemax(x: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """The point of the simplex nearest to x (Martins and Astudillo 2016, arXiv:1602.02068).

    `entmax` with alpha = 2: p_i = (x_i - threshold)_+. Arguments, result and errors as there.
    """
    return entmax(x, 2.0, where=where)


def entmax_conjugate(x: jax.Array, alpha=1.5, *, where: jax.Array | None = None) -> jax.Array:
    """max_p p . x - Omega(p), whose gradient in x is `entmax`: [...], log-sum-exp at alpha = 1.

    Arguments and errors as `entmax`. 0 for a row of which nothing takes part.
    """
    wide, part = enter(x, where)
    return _conjugate(wide, row_parameter("alpha", _checked(alpha), wide), part)[..., 0]


def _checked(alpha):
    if isinstance(alpha, numbers.Real) and not 1 <= alpha <= 2:
        raise ValueError(f"alpha: expected a number in [1, 2], got {alpha!r}")
    return alpha


def _log_weights(x, alpha, part, c):
    """(log p, support) at the shift c; x below its largest."""
    a = alpha - 1
    grown = a * (x - c)
    support = part & (grown > -1)
    grown = jnp.where(support, grown, 0)
    # log1p(a y) / a goes to y with a; below the square of rounding they are the same number
    tiny = a < jnp.finfo(x.dtype).eps ** 2
    logs = jnp.where(tiny, x - c, jnp.log1p(grown) / jnp.where(tiny, 1, a))
    return jnp.where(support, logs, 0), support


def _solve(x, alpha, part):
    """(log p, p, support), p with sum 1 unless its row is empty."""
    x = jnp.where(part, x - top(x, part), 0)
    tolerance = 4 * jnp.finfo(x.dtype).eps

    def improve(carry):
        c, active, count = carry
        logs, support = _log_weights(x, alpha, part, c)
        p = jnp.where(support, jnp.exp(logs), 0)
        slope = jnp.where(support, jnp.exp((2 - alpha) * logs), 0).sum(-1, keepdims=True)
        step = (p.sum(-1, keepdims=True) - 1) / jnp.where(slope > 0, slope, 1)
        # a row that has arrived stays: what it is must not depend on its neighbours
        active &= step > tolerance * (1 + c)
        return jnp.where(active, c + step, c), active, count + 1

    def unfinished(carry):
        return jnp.any(carry[1]) & (carry[2] < ITERATIONS)

    c = jnp.zeros_like(x[..., :1]) + 0 * alpha
    c, _, _ = jax.lax.while_loop(
        unfinished, improve, (c, part.any(-1, keepdims=True) & (c == 0), 0)
    )
    logs, support = _log_weights(x, alpha, part, c)
    p = jnp.where(support, jnp.exp(logs), 0)
    total = p.sum(-1, keepdims=True)
    return logs, p / jnp.where(total > 0, total, 1), support


@jax.custom_jvp
def _entmax(x, alpha, part):
    return _solve(x, alpha, part)[1]


@_entmax.defjvp
def _entmax_jvp(primals, tangents):
    """dp = s (dx - mean_s dx) + (g - s sum g / sum s) dalpha with s = p^(2 - alpha).

    g = -p (log p)^2 phi(t), t = (alpha - 1) log p, phi(t) = (exp(-t) - 1 + t) / t^2: what is left
    of the two terms in 1 / (alpha - 1) and 1 / (alpha - 1)^2 once they have cancelled.
    """
    x, alpha, part = primals
    dx, dalpha, _ = tangents
    p = _entmax(x, alpha, part)
    support = p > 0
    logs = jnp.log(jnp.where(support, p, 1))
    s = jnp.where(support, jnp.exp((2 - alpha) * logs), 0)
    total = s.sum(-1, keepdims=True)
    total = jnp.where(total > 0, total, 1)
    # p phi(t) = (p^(2 - alpha) - p + p t) / t^2 stays finite where exp(-t) would not
    t = (alpha - 1) * logs
    near = jnp.abs(t) < 0.1
    safe = jnp.where(near, 1, t)
    series = 1 / 2 - t / 6 + t**2 / 24 - t**3 / 120 + t**4 / 720 - t**5 / 5040 + t**6 / 40320
    phi = jnp.where(near, p * jnp.where(near, series, 0), (s - p + p * t) / safe**2)
    g = jnp.where(support, -(logs**2) * phi, 0)
    by_alpha = g - s * g.sum(-1, keepdims=True) / total
    dp = s * (dx - (s * dx).sum(-1, keepdims=True) / total) + by_alpha * dalpha
    return p, dp


@jax.custom_jvp
def _conjugate(x, alpha, part):
    p = _entmax(x, alpha, part)
    return ((p * x).sum(-1, keepdims=True) - _omega(p, alpha)).astype(jnp.result_type(x))


@_conjugate.defjvp
def _conjugate_jvp(primals, tangents):
    x, alpha, part = primals
    dx, dalpha, _ = tangents
    p = _entmax(x, alpha, part)
    # at its maximum the value does not depend on p: only x and alpha themselves count
    _, domega = jax.jvp(lambda alpha: _omega(jax.lax.stop_gradient(p), alpha), (alpha,), (dalpha,))
    return _conjugate(x, alpha, part), (p * dx).sum(-1, keepdims=True) - domega


def _omega(p, alpha):
    """sum (p^alpha - p) / (alpha (alpha - 1)), as sum p (p^(alpha - 1) - 1) / (alpha - 1)."""
    support = p > 0
    logs = jnp.log(jnp.where(support, p, 1))
    a = alpha - 1
    t = a * logs
    near = jnp.abs(t) < 1e-2
    series = logs * (1 + t / 2 + t**2 / 6 + t**3 / 24 + t**4 / 120)
    quotient = jnp.where(near, series, jnp.expm1(jnp.where(near, 1, t)) / jnp.where(a == 0, 1, a))
    return (jnp.where(support, p * quotient, 0)).sum(-1, keepdims=True) / alpha

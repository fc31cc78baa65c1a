"""What theory says of a Hopfield network with these patterns, and statistics of what it retrieved.

Bounds of Ramsauer et al. 2020, arXiv:2008.02217 (theorems 3 to 5 of its appendix), for the network
of `hopfield_retrieve` with softmax. Everything is NumPy in float64; stored patterns are
[patterns, dim], M is their largest norm, N their number and Delta their separation.
"""

import math

import numpy as np


def separation(stored: np.ndarray) -> np.ndarray:
    """Delta_i = y_i . y_i - max_{j != i} y_i . y_j, [patterns]; infinite for a single pattern."""
    stored = _patterns(stored)
    products = stored @ stored.T
    own = np.diag(products).copy()
    np.fill_diagonal(products, -np.inf)
    return own - products.max(axis=1)


def largest_norm(stored: np.ndarray) -> float:
    """M, the largest Euclidean norm of a pattern."""
    return float(np.linalg.norm(_patterns(stored), axis=1).max())


def energy(state: np.ndarray, stored: np.ndarray, beta: float) -> np.ndarray:
    """The energy with its constants (equation 2), [...] of states [..., dim].

    -log-sum-exp(beta Y state) / beta + |state|^2 / 2 + log(N) / beta + M^2 / 2: on the convex hull
    of the patterns it lies between 0 and 2 M^2.
    """
    stored = _patterns(stored)
    scores = beta * np.asarray(state, np.float64) @ stored.T
    top = scores.max(axis=-1)
    total = top + np.log(np.exp(scores - top[..., None]).sum(axis=-1))
    constant = math.log(len(stored)) / beta + largest_norm(stored) ** 2 / 2
    return (np.square(state).sum(axis=-1)) / 2 - total / beta + constant


def step(state: np.ndarray, stored: np.ndarray, beta: float) -> np.ndarray:
    """One update of states [..., dim]: Y^T softmax(beta Y state)."""
    return weights(state, stored, beta) @ _patterns(stored)


def weights(state: np.ndarray, stored: np.ndarray, beta: float) -> np.ndarray:
    """softmax(beta Y state), [..., patterns]."""
    scores = beta * np.asarray(state, np.float64) @ _patterns(stored).T
    raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def fixed_points(
    stored: np.ndarray, beta: float, steps: int = 1000, apart: float = 1e-3
) -> np.ndarray:
    """The distinct fixed points [points, dim] that the patterns themselves lead to.

    Two ends are one point where they differ by less than `apart` x M.
    """
    stored = _patterns(stored)
    ends = stored
    for _ in range(steps):
        new = step(ends, stored, beta)
        if np.abs(new - ends).max() < 1e-12 * max(largest_norm(stored), 1e-300):
            break
        ends = new
    found: list[np.ndarray] = []
    for end in ends:
        if all(np.linalg.norm(end - p) >= apart * largest_norm(stored) for p in found):
            found.append(end)
    return np.array(found)


def one_step_error_bound(stored: np.ndarray, beta: float, delta: np.ndarray | float) -> np.ndarray:
    """Theorem 4: how far from y_i one step can end, [patterns].

    2 (N - 1) M exp(-beta (Delta_i - 2 delta M)), from a state that is within `delta` of y_i and
    whose fixed point is too.
    """
    m = largest_norm(stored)
    gap = separation(stored) - 2 * np.asarray(delta) * m
    return 2 * (len(stored) - 1) * m * np.exp(-beta * gap)


def fixed_point_error_bound(stored: np.ndarray, beta: float) -> np.ndarray:
    """Theorem 5: how far the fixed point of a well separated pattern is from it, [patterns].

    2 e (N - 1) M exp(-beta Delta_i).
    """
    m = largest_norm(stored)
    return 2 * math.e * (len(stored) - 1) * m * np.exp(-beta * separation(stored))


def well_separated(stored: np.ndarray, beta: float) -> np.ndarray:
    """Whether Delta_i >= 2 / (beta N) + log(2 (N - 1) N beta M^2) / beta, bool [patterns]."""
    n, m = len(stored), largest_norm(stored)
    if n == 1:
        return np.ones(1, bool)
    least = 2 / (beta * n) + math.log(2 * (n - 1) * n * beta * m**2) / beta
    return separation(stored) >= least


def contraction_radius(stored: np.ndarray, beta: float) -> float:
    """1 / (beta N M): around a well separated pattern the step contracts within it (theorem 3)."""
    return 1 / (beta * len(stored) * largest_norm(stored))


def jacobian(state: np.ndarray, stored: np.ndarray, beta: float) -> np.ndarray:
    """d step / d state = beta Y^T (diag p - p p^T) Y at a state [dim]: [dim, dim]."""
    stored = _patterns(stored)
    p = weights(state, stored, beta)
    mean = p @ stored
    return beta * ((stored.T * p) @ stored - np.outer(mean, mean))


def jacobian_bound(stored: np.ndarray, beta: float, delta: np.ndarray | float) -> np.ndarray:
    """Largest singular value of `jacobian` within `delta` of y_i, at most, [patterns].

    2 beta N M^2 (N - 1) exp(-beta (Delta_i - 2 delta M)) (the paper's lemma A4).
    """
    return beta * len(stored) * largest_norm(stored) * one_step_error_bound(stored, beta, delta)


def capacity_base(dim: int, beta: float, radius: float, failure: float = 1e-3) -> float:
    """c of theorem 3: c^((dim - 1) / 4) random patterns can be stored, up to sqrt(failure).

    c = b / W0(exp(a + log b)), a = 2 (1 + log(2 beta radius^2 failure (dim - 1))) / (dim - 1),
    b = 2 radius^2 beta / 5; W0 is Lambert's function.

    Args:
        dim: of the patterns, at least 2.
        beta: inverse temperature.
        radius: K; the patterns lie on the sphere of radius K sqrt(dim - 1).
        failure: p, the probability that the patterns are not separated.

    Raises:
        ValueError: for dim < 2, or a factor that is not positive.
    """
    if dim < 2:
        raise ValueError(f"dim: expected at least 2, got {dim}")
    for name, value in (("beta", beta), ("radius", radius), ("failure", failure)):
        if not value > 0:
            raise ValueError(f"{name}: expected a number > 0, got {value}")
    a = 2 / (dim - 1) * (1 + math.log(2 * beta * radius**2 * failure * (dim - 1)))
    b = 2 * radius**2 * beta / 5
    return b / _lambert_of_exp(a + math.log(b))


def capacity_lower_bound(dim: int, beta: float, radius: float, failure: float = 1e-3) -> float:
    """sqrt(failure) c^((dim - 1) / 4): so many random patterns can be stored (theorem 3)."""
    return math.sqrt(failure) * capacity_base(dim, beta, radius, failure) ** ((dim - 1) / 4)


def _lambert_of_exp(t: float) -> float:
    """w > 0 with w + log w = t, by Newton's iteration; it never leaves w > 0."""
    w = math.exp(t) if t < 0 else max(t, 0.5)
    for _ in range(100):
        # Newton on w + log w - t in log w, whose slope is w + 1
        change = (t - w - math.log(w)) / (w + 1)
        w *= math.exp(change)
        if abs(change) < 1e-15:
            break
    return w


def k90(weights: np.ndarray, share: float = 0.9) -> np.ndarray:
    """How many of the largest weights [..., patterns] hold `share` of their sum: int [...].

    1 is retrieval of a single pattern, nearly all the global average, in between are metastable
    states (the paper's figure 2, states of classes I to IV). 0 where all weights are 0.
    """
    ordered = np.sort(np.asarray(weights, np.float64), axis=-1)[..., ::-1]
    held = np.cumsum(ordered, axis=-1)
    total = held[..., -1:]
    return np.where(total[..., 0] > 0, (held < share * total).sum(axis=-1) + 1, 0)


def kurtosis(x: np.ndarray, axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    """Fourth standardised moment: 3 for a normal distribution, large where few values stand out.

    The measure of outliers of Hu et al. 2024, arXiv:2404.03828, section 4.1.
    """
    x = np.asarray(x, np.float64)
    centred = x - x.mean(axis=axis, keepdims=True)
    return (centred**4).mean(axis=axis) / np.square((centred**2).mean(axis=axis))


def retrieval_snr(retrieved: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Power of the target in what was retrieved, over the power of all else: [...] of [..., dim].

    Both are powers of the parts along and across the target; infinite without anything else.
    """
    retrieved, target = (np.asarray(x, np.float64) for x in (retrieved, target))
    along = (retrieved * target).sum(-1, keepdims=True) / np.square(target).sum(-1, keepdims=True)
    signal = np.square(along * target).sum(-1)
    noise = np.square(retrieved - along * target).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(noise > 0, signal / noise, np.where(signal > 0, np.inf, 0.0))


def _patterns(stored):
    stored = np.asarray(stored, np.float64)
    if stored.ndim != 2 or not len(stored):
        raise ValueError(
            f"stored: expected [patterns, dim] with patterns, got shape {list(stored.shape)}"
        )
    return stored

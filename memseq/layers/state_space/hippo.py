"""HiPPO: memories that hold the coefficients of the past in a basis. NumPy, in float64.

A memory x' = A x + B u (for "legs" x' = (A x + B u) / t) holds, at each time, the coefficients of
the past input in orthogonal polynomials or waves. Gu et al. 2020, "HiPPO", arXiv:2008.07669, and
Gu et al. 2022, "How to train your HiPPO", arXiv:2206.12037.

| measure | what of the past it holds | basis at a point |
|---|---|---|
| "legs" | all of it, stretched to [0, 1] | sqrt(2n + 1) P_n(2s - 1), s from the start on |
| "legt" | a window of length 1 | sqrt(2n + 1) P_n(1 - 2r), r back from now |
| "lmu" | the same, scaled otherwise (Voelker et al. 2019) | P_n(2r - 1) |
| "lagt" | all of it, fading | exp(-r / 2) L_n(r) |
| "fout" | a window of length 1 | 1, then sqrt(2) sin and cos of 2 pi k r |

Time of the window measures is in units of their window: with steps of dt the window has 1 / dt
steps. (The S4 code halves A and B of "legt" and "fout", which doubles the window.)
"""

import numpy as np

from memseq.pallas_kernels.common.checks import check_choice, check_count

MEASURES = ("legs", "legt", "lmu", "lagt", "fout")
METHODS = ("forward", "backward", "bilinear", "zoh")


def transition(measure: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A [size, size] and B [size] of a measure; float64.

    Raises:
        ValueError: for an unknown measure or a size below 1.
    """
    check_choice("measure", measure, MEASURES)
    check_count("size", size, 1)
    n = np.arange(size)
    root = np.sqrt(2 * n + 1.0)
    below = n[:, None] > n
    if measure == "legs":
        return -np.outer(root, root) * below - np.diag(n + 1.0), root
    if measure == "legt":
        sign = np.where(below | (n[:, None] == n), 1.0, (-1.0) ** (n[:, None] - n))
        return -np.outer(root, root) * sign, root
    if measure == "lmu":
        sign = np.where(below | (n[:, None] == n), (-1.0) ** (n[:, None] - n + 1), -1.0)
        return (2 * n[:, None] + 1) * sign, (-1.0) ** n * (2 * n + 1)
    if measure == "lagt":
        return 0.5 * np.eye(size) - np.tril(np.ones((size, size))), np.ones(size)
    wave = _fourier_write(size)
    turn = np.zeros((size, size))
    for k in range(1, (size - 1) // 2 + 1):  # of an even size the last sine stays alone, and 0
        turn[2 * k - 1, 2 * k], turn[2 * k, 2 * k - 1] = 2 * np.pi * k, -2 * np.pi * k
    return turn - 2 * np.outer(wave, wave), 2 * wave


def _fourier_write(size: int) -> np.ndarray:
    """The value of the basis now: 1 for the constant, sqrt(2) for cosines, 0 for sines."""
    wave = np.zeros(size)
    wave[::2] = np.sqrt(2.0)
    wave[0] = 1
    return wave


def low_rank(measure: str, size: int) -> np.ndarray:
    """P [rank, size] for which A + P^T P is normal: skew-symmetric, for "legs" less I / 2.

    "lmu" has none in this basis: use "legt".
    """
    check_choice("measure", measure, [m for m in MEASURES if m != "lmu"])
    n = np.arange(size)
    if measure == "legs":
        return np.sqrt(n + 0.5)[None]
    if measure == "legt":
        return np.sqrt(2 * n + 1.0) * np.stack([n % 2 == 0, n % 2 == 1])
    if measure == "lagt":
        return np.full((1, size), np.sqrt(0.5))
    return np.sqrt(2) * _fourier_write(size)[None]


def diagonalize(measure: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [size], by imaginary part, and eigenvectors [size, size] of A + P^T P.

    The matrix is normal, so V^H V = I: A = V (diag(eigenvalues) - (P V)^H (P V)) V^H. A itself
    cannot be diagonalised in any precision at hand: its eigenvectors are all but parallel.
    """
    a, _ = transition(measure, size)
    p = low_rank(measure, size)
    normal = a + p.T @ p
    real = -0.5 if measure == "legs" else 0.0
    skew = normal - real * np.eye(size)
    imaginary, vectors = np.linalg.eigh(-1j * (skew - skew.T) / 2)
    return real + 1j * imaginary, vectors


def discretize(
    a: np.ndarray, b: np.ndarray, dt: float | np.ndarray, method: str = "bilinear"
) -> tuple[np.ndarray, np.ndarray]:
    """x_t = A' x_{t-1} + B' u_t for x' = a x + b u, and steps of dt.

    Args:
        a, b: [..., size, size] and [..., size].
        dt: of any shape [...] that broadcasts in front.
        method: "forward", "backward" (Euler), "bilinear" (Tustin) or "zoh" (exact for an input that
            is held during the step).
    """
    check_choice("method", method, METHODS)
    dt = np.asarray(dt, np.float64)[..., None, None]
    eye = np.eye(a.shape[-1])
    column = b[..., None]
    if method == "zoh":
        size = a.shape[-1]
        both = np.zeros((*np.broadcast_shapes(a.shape[:-2], dt.shape[:-2]), size + 1, size + 1))
        both[..., :size, :size], both[..., :size, size:] = a * dt, column * dt
        both = expm(both)
        return both[..., :size, :size], both[..., :size, size]
    implicit = {"forward": 0.0, "backward": 1.0, "bilinear": 0.5}[method]
    left = eye - implicit * dt * a
    right = eye + (1 - implicit) * dt * a
    return np.linalg.solve(left, right), np.linalg.solve(left, dt * column)[..., 0]


def expm(a: np.ndarray) -> np.ndarray:
    """Matrix exponentials of [..., size, size]: a Taylor series of a / 2^k, squared k times."""
    norm = np.abs(a).sum(-1).max(initial=0)
    halvings = max(int(np.ceil(np.log2(max(norm, 1e-300)))) + 2, 0)
    a = a / 2.0**halvings
    result = term = np.broadcast_to(np.eye(a.shape[-1]), a.shape)
    for n in range(1, 16):
        term = term @ a / n
        result = result + term
    for _ in range(halvings):
        result = result @ result
    return result


def legs_steps(size: int, first: int, last: int, method: str) -> tuple[np.ndarray, np.ndarray]:
    """A' [steps, size, size] and B' [steps, size] of "legs" for the steps first, ..., last >= 1.

    At step t the memory covers t inputs. "zoh" is exact for an input that is held during a step:
    it takes A over log(t / (t - 1)), and the first step, before which nothing is, is -A^-1 B.
    Forward Euler blows up until the step is size / 2, by 1e18 for a size of 32; at step n it wipes
    coefficient n clean, so from step size on all is well, unless a number overflowed before.
    """
    a, b = transition("legs", size)
    step = np.arange(first, last + 1, dtype=np.float64)
    if method != "zoh":
        return discretize(a, b, 1 / step, method)
    span = np.log(step / np.maximum(step - 1, 0.5))
    kept, write = discretize(a, b, span, "zoh")
    if first == 1:
        kept[0], write[0] = 0, -np.linalg.solve(a, b)
    return kept, write


def remember(signal: np.ndarray, measure: str, size: int, method: str, dt: float) -> np.ndarray:
    """The coefficients [..., size] of signals [..., time] after their last step.

    dt: time of a step, in windows; "legs" takes none, all its past is one.
    """
    time = signal.shape[-1]
    if measure == "legs":
        kept, write = legs_steps(size, 1, time, method)
    else:
        kept, write = discretize(*transition(measure, size), dt, method)
        kept, write = (np.broadcast_to(x, (time, *x.shape)) for x in (kept, write))
    state = np.zeros((*signal.shape[:-1], size))
    for t in range(time):
        state = state @ kept[t].T + signal[..., t, None] * write[t]
    return state


def basis(measure: str, size: int, points: np.ndarray) -> np.ndarray:
    """[points, size]: what each coefficient adds at each point; see the table above."""
    check_choice("measure", measure, MEASURES)
    n = np.arange(size)
    if measure == "lagt":
        values = [np.ones_like(points), 1 - points]
        for k in range(1, size - 1):
            values.append(((2 * k + 1 - points) * values[k] - k * values[k - 1]) / (k + 1))
        return np.exp(-points / 2)[:, None] * np.stack(values[:size], axis=1)
    if measure == "fout":
        angle = 2 * np.pi * points[:, None] * ((n + 1) // 2)
        return np.where(n == 0, 1.0, np.sqrt(2) * np.where(n % 2, np.sin(angle), np.cos(angle)))
    x = 1 - 2 * points if measure == "legt" else 2 * points - 1
    values = np.polynomial.legendre.legvander(x, size - 1)
    return values if measure == "lmu" else np.sqrt(2 * n + 1.0) * values


def reconstruct(state: np.ndarray, measure: str, points: np.ndarray) -> np.ndarray:
    """The past signal [..., points] that the coefficients [..., size] describe."""
    return state @ basis(measure, state.shape[-1], np.asarray(points, np.float64)).T

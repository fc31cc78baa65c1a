"""HiPPO matrices, discretisations and reconstruction against theory; the memory layer."""

import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import HiPPOMemory
from memseq.layers.state_space import hippo
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    random_params,
    run64,
)


def smooth(s):
    return np.sin(9 * s) + 0.5 * s * np.cos(17 * s + 1)


def middles(n):
    return (np.arange(n) + 0.5) / n


def relative(got, want):
    assert np.isfinite(got).all()
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def stretched_error(time, size, method):
    signal = smooth(middles(time))
    state = hippo.remember(signal, "legs", size, method, 1.0)
    return relative(hippo.reconstruct(state, "legs", middles(time)), signal)


def test_legs_spectrum():
    """Eigenvalues of A are -1 to -N; its normal part turns by up to N^2 / pi, and at least 0.26."""
    a, _ = hippo.transition("legs", 64)
    np.testing.assert_array_equal(np.diag(a), -np.arange(1, 65.0))
    assert (np.triu(a, 1) == 0).all()  # so the diagonal holds the eigenvalues
    values, _ = hippo.diagonalize("legs", 64)
    np.testing.assert_array_equal(values.real, -0.5)
    np.testing.assert_allclose(values.imag.max(), 64**2 / np.pi, rtol=1e-3)
    np.testing.assert_allclose(np.abs(values.imag).min(), 0.26, atol=1e-2)


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt", "fout"])
def test_normal_part(measure):
    """A + P^T P is skew (for legs less a half), and equals V diag V^H with unitary V."""
    a, _ = hippo.transition(measure, 64)
    p = hippo.low_rank(measure, 64)
    normal = a + p.T @ p
    skew = normal + 0.5 * np.eye(64) * (measure == "legs")
    np.testing.assert_allclose(skew, -skew.T, rtol=0, atol=1e-12)
    values, vectors = hippo.diagonalize(measure, 64)
    np.testing.assert_allclose(vectors.conj().T @ vectors, np.eye(64), rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        vectors * values @ vectors.conj().T, normal, rtol=0, atol=1e-11 * np.abs(normal).max()
    )


def test_lagt_kernel_is_laguerre():
    a, b = hippo.transition("lagt", 9)
    for point in (0.0, 0.3, 2.0, 11.0):
        want = hippo.basis("lagt", 9, np.array([point]))[0]
        np.testing.assert_allclose(hippo.expm(a * point) @ b, want, rtol=0, atol=1e-12)


def test_expm():
    """Against a rotation, a nilpotent matrix, and the inverse."""
    turn = hippo.expm(np.array([[0.0, -20.0], [20.0, 0.0]]))
    want = [[np.cos(20), -np.sin(20)], [np.sin(20), np.cos(20)]]
    np.testing.assert_allclose(turn, want, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(hippo.expm(np.diag([3.0], 1)), [[1, 3], [0, 1]])
    a = np.random.default_rng(0).normal(size=(3, 5, 5))
    eye = hippo.expm(a) @ hippo.expm(-a)
    np.testing.assert_allclose(eye, np.tile(np.eye(5), (3, 1, 1)), rtol=0, atol=1e-11)


def test_legs_reconstruction():
    """The whole past comes back; the error falls as 1/T, and for zoh as 1/T^2."""
    assert stretched_error(256, 16, "zoh") < 1e-3
    assert stretched_error(1024, 32, "zoh") < 1e-4
    for method, least in (("backward", 3.0), ("bilinear", 3.0), ("zoh", 10.0)):
        errors = [stretched_error(time, 32, method) for time in (256, 1024)]
        assert errors[0] / errors[1] > least, (method, errors)


def test_forward_euler_is_unstable():
    """Coefficient n grows while t < n / 2: past 1e18 for N = 32; implicit rules never do.

    At t = n its factor 1 - n / t is exactly 0, and all below it have had theirs, so from t = N on
    the state is what it should be again, in any precision that has not overflowed before. Float32
    has for N = 64, and then stays so.
    """

    def largest(method, size, dtype=np.float64):
        kept, write = (a.astype(dtype) for a in hippo.legs_steps(size, 1, size, method))
        state, most = np.zeros(size, dtype), 0.0
        for t, value in enumerate(smooth(middles(size)).astype(dtype)):
            state = kept[t] @ state + value * write[t]
            most = max(most, np.abs(state).max())
        return most, state

    assert largest("forward", 32)[0] > 1e18
    assert max(largest(method, 32)[0] for method in ("backward", "bilinear", "zoh")) < 2
    assert stretched_error(1024, 32, "forward") < 2e-2
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.isnan(largest("forward", 64, np.float32)[1]).any()
    assert np.isfinite(largest("bilinear", 64, np.float32)[1]).all()


def test_legs_knows_no_time_scale():
    """A signal whose samples are each held four steps has the same coefficients (zoh)."""
    signal = smooth(middles(100))
    once = hippo.remember(signal, "legs", 16, "zoh", 1.0)
    held = hippo.remember(np.repeat(signal, 4), "legs", 16, "zoh", 1.0)
    np.testing.assert_allclose(held, once, rtol=0, atol=1e-12)


def test_legs_gradient_falls_as_one_over_time():
    """T |d c_T / d u_t| is the same for all T at the same t / T: nothing fades exponentially."""
    for share in (1 / 8, 1 / 2):
        found = []
        for time in (256, 1024):
            signal = np.zeros(time)
            signal[int(share * time)] = 1
            state = hippo.remember(signal, "legs", 16, "zoh", 1.0)
            found.append(time * np.linalg.norm(state))
        np.testing.assert_allclose(found[0], found[1], rtol=0.01)


@pytest.mark.parametrize("measure", ["legt", "lmu"])
@pytest.mark.parametrize("size", [16, 32])
def test_window(measure, size):
    """The last 1 / dt steps come back, the oldest among them included."""
    steps = 512
    past = smooth(np.arange(2 * steps) / (2 * steps))
    state = hippo.remember(past, measure, size, "zoh", 1 / steps)
    points = middles(steps)
    got = hippo.reconstruct(state, measure, points)
    want = past[::-1][:steps]
    assert relative(got, want) < 2e-4
    assert abs(got[-1] - want[-1]) < 1.5e-4 * np.abs(want).max()


def test_half_of_legt_has_twice_the_window():
    steps = 256
    past = smooth(np.arange(4 * steps) / (2 * steps))
    a, b = hippo.transition("legt", 24)
    kept, write = hippo.discretize(a / 2, b / 2, 1 / steps, "zoh")
    state = np.zeros(24)
    for value in past:
        state = kept @ state + write * value
    got = hippo.reconstruct(state, "legt", middles(2 * steps))
    assert relative(got, past[::-1][: 2 * steps]) < 1e-3


def test_fourier_window():
    """Away from the window's jump from its end to its start the waves give the past back."""
    steps = 512
    past = smooth(np.arange(2 * steps) / (2 * steps))
    state = hippo.remember(past, "fout", 65, "zoh", 1 / steps)
    got = hippo.reconstruct(state, "fout", middles(steps))[100:-100]
    assert relative(got, past[::-1][:steps][100:-100]) < 0.03


def test_order_of_discretisation():
    """Error against the exact solution, input held at the step's end: halves with the step.

    With the input averaged over the step the bilinear rule's error falls by four.
    """
    a, b = hippo.transition("legt", 4)
    b = b[:, None] * [1.0, 0.0]  # x' = A x + B u, u' a turn: the exact solution is one exponential
    both = np.block([[a, b], [np.zeros((2, 4)), np.array([[0.0, 3.0], [-3.0, 0.0]])]])
    start = np.concatenate([np.zeros(4), [0.0, 1.0]])  # u = sin(3 t)
    exact = (hippo.expm(both) @ start)[:4]

    def error(method, averaged, steps):
        kept, write = hippo.discretize(a, b[:, 0], 1 / steps, method)
        time = np.arange(steps + 1) / steps
        u = np.sin(3 * time)
        u = (u[1:] + u[:-1]) / 2 if averaged else u[1:]
        state = np.zeros(4)
        for value in u:
            state = kept @ state + write * value
        return np.linalg.norm(state - exact)

    for method, averaged, order in (
        ("forward", False, 1),
        ("backward", False, 1),
        ("bilinear", False, 1),
        ("zoh", False, 1),
        ("bilinear", True, 2),
        ("zoh", True, 2),
    ):
        slope = np.log2(error(method, averaged, 1024) / error(method, averaged, 2048))
        np.testing.assert_allclose(slope, order, atol=0.05, err_msg=f"{method} {averaged}")


def test_small_steps():
    """As dt falls A' is 1 + dt A and B' is dt B, and zoh is bilinear up to dt^3."""
    a, b = hippo.transition("legs", 5)
    for method in hippo.METHODS:
        kept, write = hippo.discretize(a, b, 1e-5, method)
        np.testing.assert_allclose(kept, np.eye(5) + 1e-5 * a, rtol=0, atol=1e-7)
        np.testing.assert_allclose(write, 1e-5 * b, rtol=0, atol=1e-7)
    gaps = [
        np.abs(hippo.discretize(a, b, dt, "zoh")[0] - hippo.discretize(a, b, dt)[0]).max()
        for dt in (2e-3, 1e-3)
    ]
    np.testing.assert_allclose(np.log2(gaps[0] / gaps[1]), 3, atol=0.1)


def hippo_memory(layer, params, x):
    """c = A' c + B' u for each signal, one step after another."""
    signal, order = x @ params["input"]["kernel"], layer.order
    a, b = hippo.transition(layer.measure, order)
    state, y = np.zeros((layer.heads, order)), []
    for t, u in enumerate(signal, start=1):
        dt = 1 / t if layer.measure == "legs" else 1 / layer.window
        kept, write = hippo.discretize(a, b, dt, layer.method)
        state = state @ kept.T + u[:, None] * write
        y.append(state.reshape(-1) @ params["output"]["kernel"])
    return np.array(y), state, {}


CASES = {
    "legs": {},
    "legs, backward": {"method": "backward", "order": 5, "heads": 2},
    "lmu": {"measure": "lmu", "order": 6, "window": 7, "method": "zoh"},
    "fout": {"measure": "fout", "order": 8, "window": 30},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_memory_layer(options, ids):
    check_transcription(HiPPOMemory(FEATURES, **options), hippo_memory, ids)


def test_memory_layer_holds_the_whole_past():
    """The state describes the signals: 200 steps of them come back from 32 numbers."""
    layer = HiPPOMemory(FEATURES, order=32, heads=2)
    params, rng = random_params(layer), np.random.default_rng(0)
    x = smooth(middles(200)[None, :, None] * rng.uniform(0.3, 1, size=(1, 1, FEATURES)))
    _, state, _ = run64(layer, params, x)
    got = hippo.reconstruct(np.asarray(state.memory[0]), "legs", middles(200))
    assert relative(got, (x[0] @ params["input"]["kernel"]).T) < 0.03
    assert state.position[0] == 200


def test_defaults():
    layer = HiPPOMemory(32)
    assert layer.init_state(3).memory.shape == (3, 4, 64)
    assert count(layer, 32) == 32 * 4 + 4 * 64 * 32


def test_dtypes():
    assert check_dtypes(HiPPOMemory(32)).memory.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "legend"}, "measure: .* got 'legend'"),
        ({"method": "zoh"}, "method: .* got 'zoh'"),
        ({"order": 0}, "order: .* got 0"),
        ({"window": 0}, "window: .* got 0"),
        ({"heads": 0}, "heads: .* got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        count(HiPPOMemory(FEATURES, **options))


def test_bad_arguments():
    with pytest.raises(ValueError, match="size: .* got 0"):
        hippo.transition("legs", 0)
    with pytest.raises(ValueError, match="measure: .* got 'lmu'"):
        hippo.low_rank("lmu", 4)
    with pytest.raises(ValueError, match="method: .* got 'euler'"):
        hippo.discretize(*hippo.transition("legs", 4), 0.1, "euler")

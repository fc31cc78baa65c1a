"""Diagonal time-invariant state spaces against their equations, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import DSS, S4D, SMR
from memseq.layers.state_space.rates import RATES, discretized
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    gated_linear_unit,
    init,
    inputs,
    random_params,
    short_conv,
    softplus,
)

OF_PARAMETER = {
    "exp": np.exp,
    "softplus": softplus,
    "inv_square": lambda w: 1 / (w**2 + 0.5),
    "direct": lambda w: np.maximum(w, 1e-4),
}


def modes(layer, params):
    """Eigenvalues, and C as complex numbers that count twice; or real ones."""
    a = -OF_PARAMETER[layer.rate](params["decay"]) + 0j
    if "phase" not in params:
        return a, params["C"]
    real, imag = np.split(params["C"], 2, axis=1)
    return a + 1j * params["phase"], 2 * (real + 1j * imag)


def step_of(layer, params, a):
    """(A', B') of a step."""
    dt = np.exp(params["dt_log"])
    kept = np.exp(dt * a)
    if isinstance(layer, DSS):
        total = sum(kept**power for power in range(layer.length))
        # the reciprocal of the total is regularised through exp(dt A L) - 1
        edge = np.exp(layer.length * dt * a) - 1
        write = (kept - 1) * edge.conj() / (abs(edge) ** 2 + 1e-7) / a
        assert abs(total * write * a - 1).max() < 1e-4
        return kept, write
    if layer.discretization == "zoh":
        return kept, (kept - 1) / a
    return (1 + dt * a / 2) / (1 - dt * a / 2), dt / (1 - dt * a / 2)


def diagonal(layer, params, x):
    a, read = modes(layer, params)
    kept, write = step_of(layer, params, a)
    u = x
    if isinstance(layer, SMR):
        u = x * short_conv(x, params["conv"]["kernel"], activation=None)
    state, y = np.zeros(kept.shape, complex), []
    for t in range(len(x)):
        state = kept * state + write * u[t][:, None]
        y.append(np.sum(read * state, axis=1).real + params["D"] * x[t])
    parts = [state.real] if "phase" not in params else [state.real, state.imag]
    memory = np.concatenate(parts, axis=1)
    return gated_linear_unit(params, np.array(y)), memory, {"mean_decay": abs(kept)}


LAYERS = {
    "legs": S4D(FEATURES, state_dim=8),
    "lin, bilinear": S4D(FEATURES, state_dim=4, spectrum="lin", discretization="bilinear"),
    "inv, softplus": S4D(FEATURES, state_dim=6, spectrum="inv", rate="softplus", glu=False),
    "real": S4D(FEATURES, state_dim=4, spectrum="real", rate="inv_square"),
    "direct": S4D(FEATURES, state_dim=4, rate="direct"),
    "DSS": DSS(FEATURES, state_dim=6, length=10),
    "SMR": SMR(FEATURES, state_dim=4),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_transcription(name, ids):
    layer = LAYERS[name].clone(chunk_size=8 if name in ("legs", "real", "SMR") else None)
    check_transcription(layer, diagonal, ids)


@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
def test_reference_form(ids):
    check_transcription(S4D(FEATURES, state_dim=4, implementation="reference"), diagonal, ids)


def impulse_kernel(layer, params, length):
    """The impulse response by its closed form, in float64."""
    a, read = modes(layer, params)
    kept, write = step_of(layer, params, a)
    powers = np.exp(np.log(kept)[..., None] * np.arange(length))
    return np.einsum("dn,dnl->dl", read * write, powers).real


@pytest.mark.parametrize("spectrum", ["lin", "inv", "legs", "real"])
@pytest.mark.parametrize("dt", [1e-3, 1e-1])
def test_chunks_equal_the_fft_convolution(spectrum, dt):
    """Start values, N = 64, 2048 steps, float32 against a float64 convolution by FFT."""
    options = {"state_dim": 64, "spectrum": spectrum, "dt_min": dt, "dt_max": dt, "glu": False}
    layer = S4D(4, implementation="chunked", **options)
    params, x = init(layer), inputs(time=2048, features=4, batch=1)
    y, _ = jax.jit(layer.apply)({"params": params}, jnp.asarray(x, jnp.float32))
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    kernel = impulse_kernel(layer, params, 2048).T
    wide = [np.fft.rfft(a, 4096, axis=0) for a in (kernel, x[0])]
    want = np.fft.irfft(wide[0] * wide[1], axis=0)[:2048] + params["D"] * x[0]
    assert np.isfinite(np.asarray(y)).all()
    assert np.linalg.norm(y[0] - want) < 5e-5 * np.linalg.norm(want)


def test_forms_agree_backward():
    """Chunked and reference gradients, packed, in float64; also through the state."""
    ids = jnp.asarray(IDS)
    x, found = inputs(), []
    for implementation in ("chunked", "reference"):
        layer = S4D(FEATURES, state_dim=6, implementation=implementation, chunk_size=8)

        def loss(params, x, memory, layer=layer):
            state = layer.init_state(2).replace(memory=memory)
            y, state = layer.apply({"params": params}, x, state, ids)
            return jnp.sum(jnp.where(ids[..., None] >= 0, jnp.sin(y), 0)) + jnp.sum(
                jnp.cos(state.memory)
            )

        with jax.enable_x64(True):
            params = random_params(layer)
            memory = np.random.default_rng(7).normal(size=(2, FEATURES, 6))
            found.append(jax.jit(jax.grad(loss, (0, 1, 2)))(params, x, memory))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_discretization_limits():
    """B' is dt at A = 0, 1 + dt A and dt for small steps, and zoh is bilinear up to dt^3."""
    rate, turn = jnp.array([[0.0, 0.5, 1.0]]), jnp.array([[0.0, 3.0, 0.0]])
    for method in ("zoh", "bilinear"):
        system, write = discretized(rate, turn, jnp.float32(1e-4), method)
        np.testing.assert_allclose(write, [[1e-4] * 3 + [0] * 3], rtol=0, atol=1e-7)
        np.testing.assert_allclose(system.log_decay, -1e-4 * rate, rtol=1e-5)
        np.testing.assert_allclose(system.phase, 1e-4 * turn, rtol=1e-5)
    with jax.enable_x64(True):
        gaps = []
        for dt in (2e-2, 1e-2):
            found = [discretized(rate, turn, dt, method)[0] for method in ("zoh", "bilinear")]
            a, b = (np.exp(np.asarray(f.log_decay) + 1j * np.asarray(f.phase)) for f in found)
            gaps.append(abs(a - b).max())
    np.testing.assert_allclose(np.log2(gaps[0] / gaps[1]), 3, atol=0.05)


def test_rates():
    """Each parametrisation starts where it should; slope / rate^2 as StableSSM says."""
    rate = jnp.array([0.01, 0.1, 0.5, 1.9])
    for forward, inverse in RATES.values():
        np.testing.assert_allclose(forward(inverse(rate)), rate, rtol=1e-3)
    w = jnp.float32(-6.0)
    ratio = {
        name: abs(jax.grad(forward)(w)) / forward(w) ** 2
        for name, (forward, _) in RATES.items()
        if name != "direct"
    }
    np.testing.assert_allclose(ratio["exp"], np.exp(6), rtol=1e-4)
    np.testing.assert_allclose(ratio["softplus"], 403, rtol=5e-3)
    np.testing.assert_allclose(ratio["inv_square"], 12, rtol=1e-5)
    np.testing.assert_allclose(
        abs(jax.vmap(jax.grad(RATES["inv_square"][0]))(jnp.array([-50.0, 9.0])))
        / RATES["inv_square"][0](jnp.array([-50.0, 9.0])) ** 2,
        [100, 18],
        rtol=1e-4,
    )


def test_starts():
    """Eigenvalues as the paper's; dt log-uniform in its range."""
    layer = S4D(256, state_dim=16, spectrum="inv")
    params = init(layer)
    n = np.arange(8)
    np.testing.assert_allclose(np.exp(params["decay"][3]), 0.5, rtol=1e-6)
    np.testing.assert_allclose(params["phase"][5], 16 / np.pi * (16 / (2 * n + 1) - 1), rtol=1e-5)
    dt = np.exp(np.asarray(params["dt_log"]))
    assert 0.00099 < dt.min() < 0.0015 and 0.07 < dt.max() < 0.1001
    np.testing.assert_allclose(np.median(np.log(dt)), np.log(0.01), atol=0.4)
    legs = init(S4D(4, state_dim=64))["phase"][0]
    np.testing.assert_allclose(legs.max(), 64**2 / np.pi, rtol=1e-3)
    np.testing.assert_allclose(init(S4D(4, spectrum="lin"))["phase"][0, 5], 5 * np.pi, rtol=1e-6)
    np.testing.assert_allclose(
        np.exp(init(S4D(4, spectrum="real", state_dim=4))["decay"][0]), [1, 2, 3, 4], rtol=1e-5
    )


def test_defaults():
    layer = S4D(32)
    assert layer.init_state(3).memory.shape == (3, 32, 64)
    assert count(layer, 32) == 32 * (1 + 64 + 64 + 1) + 2 * (32 * 32 + 32)
    assert SMR(32).init_state(3).conv.shape == (3, 3, 32 * 1)


def test_dtypes():
    assert check_dtypes(S4D(32)).memory.dtype == jnp.float32


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (S4D(16, state_dim=5), "state_dim: expected an even number, got 5"),
        (S4D(16, state_dim=0), "state_dim: .* got 0"),
        (S4D(16, spectrum="leg"), "spectrum: .* got 'leg'"),
        (S4D(16, rate="relu"), "rate: .* got 'relu'"),
        (S4D(16, discretization="euler"), "discretization: .* got 'euler'"),
        (S4D(16, discretization="bilinear", spectrum="real"), "discretization: .* 'bilinear'"),
        (S4D(16, dt_min=0.0), "dt_min: .* got 0.0 and 0.1"),
        (DSS(16, length=0), "length: .* got 0"),
        (DSS(16, spectrum="real"), "spectrum: .* got 'real'"),
    ],
)
def test_bad_options(layer, message):
    with pytest.raises(ValueError, match=message):
        count(layer)

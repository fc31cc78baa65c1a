"""Mamba-3 against its equations, step by step, with a complex state."""

import jax.numpy as jnp
import numpy as np
import pytest

from memseq.layers import Mamba3
from memseq.layers.recurrent.bilinear import turned
from tests.layers.harness import (
    FEATURES,
    IDS,
    check_dtypes,
    check_transcription,
    count,
    init,
    inputs,
    random_params,
    rms_norm,
    run64,
    sigmoid,
    silu,
    softplus,
)


def gates(params, x):
    """dt, decay, and the share of this step's pair."""
    dt = softplus(x @ params["step_size"]["kernel"] + params["dt_bias"])
    raw = x @ params["rate"]["kernel"]
    rate = np.maximum(np.where(raw >= 0, 1 + raw, 1 / (1 - np.minimum(raw, 0))), 1e-4)
    return dt, np.exp(-rate * dt), sigmoid(x @ params["mix_gate"]["kernel"])


def vectors(layer, params, x, name, heads):
    """[time, heads, rank, state_dim]."""
    flat = (x @ params[name]["kernel"]).reshape(len(x), layer.groups, layer.mimo_rank, -1)
    scale, bias = params[f"{name}_norm"]["scale"], params[f"{name}_bias"]
    bias = bias.reshape(heads, layer.mimo_rank, -1)
    found = np.empty((len(x), *bias.shape))
    for t, h, r in np.ndindex(*found.shape[:3]):
        group = h * layer.groups // heads
        found[t, h, r] = rms_norm(flat[t, group, r], scale) + bias[h, r]
    return found


def mamba3(layer, params, x):
    """The state of turning pairs is complex and turns itself; key and query stay as they are."""
    heads, ranks = len(params["D"]), range(layer.mimo_rank)
    dt, decay, now = gates(params, x)
    key, query = (vectors(layer, params, x, name, heads) for name in ("key", "query"))
    value, gate = (
        (x @ params[name]["kernel"]).reshape(len(x), heads, 1, -1) for name in ("value", "gate")
    )
    ones = np.ones((heads, 1, value.shape[-1]))
    value = value * params.get("value_scale", ones)
    gate = silu(gate * params.get("gate_scale", ones)) * params.get("out_scale", ones)
    angle = np.pi * dt[..., None] * np.tanh(x @ params["angle"]["kernel"])[:, None]
    planes = 2 * angle.shape[-1]
    memory, total, y = None, np.zeros(angle.shape[1:]), []
    plain = np.zeros((heads, key.shape[-1] - planes, value.shape[-1]))
    complex_ = np.zeros((heads, planes // 2, value.shape[-1]), complex)
    for t in range(len(x)):
        read = []
        total = total + angle[t]
        for h in range(heads):
            a = decay[t, h]
            turn = np.exp(-1j * angle[t, h])[:, None]

            def pair(s, h=h):
                both = key[s, h, :, :planes].reshape(len(ranks), -1, 2)
                turning = both[..., 0] + 1j * both[..., 1]
                return (
                    sum(np.outer(turning[r], value[s, h, r]) for r in ranks),
                    sum(np.outer(key[s, h, r, planes:], value[s, h, r]) for r in ranks),
                )

            late, early = now[t, h] * dt[t, h], (1 - now[t, h]) * dt[t, h] * a
            turning, fixed = pair(t)
            before = pair(t - 1) if t else (0, 0)
            complex_[h] = turn * (a * complex_[h] + early * before[0]) + late * turning
            plain[h] = a * plain[h] + early * before[1] + late * fixed
            out = 0
            for r in ranks:
                both = query[t, h, r, :planes].reshape(-1, 2)
                one = ((both[:, 0] - 1j * both[:, 1]) @ complex_[h]).real
                one = one + query[t, h, r, planes:] @ plain[h] + params["D"][h] * value[t, h, r]
                out = out + one * gate[t, h, r]
            read.append(out)
        y.append(np.concatenate(read))
    # the layer holds the state turned forward by all angles so far
    forward = complex_ * np.exp(1j * total)[..., None]
    pairs = np.stack([forward.real, forward.imag], axis=2).reshape(heads, planes, -1)
    memory = np.concatenate([pairs, plain], axis=1)
    return np.array(y) @ params["output"]["kernel"], memory, {"mean_decay": decay}


CASES = {
    "default": {"state_dim": 8},
    "groups, all turns": {"groups": 2, "heads": 4, "state_dim": 6, "turning": 1.0},
    "MIMO": {"mimo_rank": 3, "groups": 2, "heads": 4, "state_dim": 6, "chunk_size": 4},
}


@pytest.mark.parametrize("ids", [None, IDS], ids=["one segment", "packed"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_mamba3(options, ids):
    check_transcription(Mamba3(FEATURES, **options), mamba3, ids)


def test_this_step_alone_and_no_turn_is_a_decayed_sum():
    """m = 1 and angle 0: S = a S + dt k v^T, Mamba-2's memory."""
    layer = Mamba3(FEATURES, state_dim=4)
    params, x = random_params(layer), inputs()
    params["mix_gate"]["kernel"] *= 0
    params["angle"]["kernel"] *= 0
    heads = len(params["D"])
    half = run64(layer, params, x)[1].memory
    big = dict(params, mix_gate={"kernel": 1e3 * np.ones_like(params["mix_gate"]["kernel"])})
    x = np.abs(x)
    _, state, _ = run64(layer, big, x)
    for row, u in enumerate(x):
        dt, decay, _ = gates(params, u)
        key = vectors(layer, params, u, "key", heads)[:, :, 0]
        value = (u @ params["value"]["kernel"]).reshape(len(u), heads, -1)
        left = np.append(np.cumprod(decay[::-1], axis=0)[::-1][1:], np.ones((1, heads)), axis=0)
        want = np.einsum("th,thk,thv->hkv", left * dt, key, value)
        np.testing.assert_allclose(state.memory[row], want, rtol=0, atol=1e-9)
    assert np.isfinite(half).all()


def test_a_rank_that_neither_writes_nor_reads_changes_nothing():
    """MIMO of rank 2 whose second rank is switched off is Mamba-3 of rank 1; streaming too."""
    layer, one = (Mamba3(FEATURES, state_dim=4, mimo_rank=rank) for rank in (2, 1))
    params, x = random_params(layer), inputs()
    for name in ("value_scale", "out_scale", "gate_scale"):
        params[name][:] = [[1.0], [0.0]]
    alone = {name: value for name, value in params.items() if not name.endswith("_scale")}
    for name in ("key", "query"):
        alone[name] = {"kernel": params[name]["kernel"][:, :4]}
        alone[f"{name}_bias"] = params[f"{name}_bias"][:, :4]
    want, state, _ = run64(one, alone, x)
    first, half, _ = run64(layer, params, x[:, :8])
    rest, last, _ = run64(layer, params, x[:, 8:], half)
    np.testing.assert_allclose(np.concatenate([first, rest], 1), want, rtol=0, atol=1e-12)
    np.testing.assert_allclose(last.memory, state.memory, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("share", "order"), [(0.5, 2), (1.0, 1)])
def test_order_of_the_rule(share, order):
    """A smooth input in halved steps: the trapezoid's error falls by four, Euler's by two."""
    errors = []
    for steps in (64, 128, 256, 2048):
        layer = Mamba3(FEATURES, state_dim=4, heads=1, implementation="reference")
        params = random_params(layer)
        for name in ("step_size", "rate", "mix_gate", "angle", "key", "query"):
            params[name]["kernel"] = np.zeros_like(params[name]["kernel"])
        params["dt_bias"] = np.full(1, np.log(np.expm1(1 / steps)))
        if share == 1.0:
            params["mix_gate"]["kernel"][0] = 1e4
        time = (np.arange(steps) + 1) / steps
        x = np.zeros((1, steps, FEATURES))
        x[0, :, 0] = 1.0
        x[0, :, 1] = np.sin(3 * time) ** 2  # starts flat: nothing came before
        params["value"]["kernel"][0] = 0
        _, state, _ = run64(layer, params, x)
        errors.append(np.asarray(state.memory))
    gaps = [np.abs(e - errors[-1]).max() for e in errors[:2]]
    found = np.log2(gaps[0] / gaps[1])
    np.testing.assert_allclose(found, order, atol=0.12)


def test_the_angle_does_not_drift():
    """30,000 steps of one angle in float32: the carried turn stays on the circle, and in phase."""
    angle = np.full((1, 30000, 1), 6.2 / 3, np.float32)
    start = jnp.array([[[1.0, 0.0]]])
    _, last = turned(jnp.asarray(angle), start, segment_ids=None, implementation="chunked")
    want = 30000 * float(angle[0, 0, 0])
    np.testing.assert_allclose(last[0, 0], [np.cos(want), np.sin(want)], atol=5e-3)


def test_starts():
    params = init(Mamba3(64, state_dim=8))
    step = softplus(np.asarray(params["dt_bias"], np.float64))
    assert (step > 0.0009).all() and (step < 0.101).all()
    for name in ("key_bias", "query_bias", "D"):
        np.testing.assert_array_equal(params[name], 1)


def test_defaults():
    layer = Mamba3(32)
    state = layer.init_state(3)
    assert state.memory.shape == (3, 1, 128, 64) and state.turn.shape == (3, 32, 2)
    assert state.conv.shape == (3, 1, 128 + 64)
    projections = 32 * (64 + 64 + 128 + 128 + 3 + 32) + 64 * 32
    assert count(layer, 32) == projections + 2 * 128 + 2 * 128 + 1 + 1
    mimo = layer.clone(mimo_rank=4)
    assert mimo.init_state(3).memory.shape == (3, 1, 128, 64)
    assert mimo.init_state(3).conv.shape == (3, 1, 4 * 128 + 64)
    assert count(mimo, 32) == count(layer, 32) + 2 * 3 * 128 * (32 + 1) + 3 * 4 * 64
    own = init(Mamba3(16, state_dim=4, mimo_rank=4))
    for name, start in (("value_scale", 0.25), ("gate_scale", 1.0), ("out_scale", 0.25)):
        np.testing.assert_array_equal(own[name], start)


def test_dtypes():
    assert check_dtypes(Mamba3(32, state_dim=8)).memory.dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turning": 0.0}, "turning: .* got 0.0"),
        ({"turning": 0.5, "state_dim": 2}, "turning: .* got 0.5"),
        ({"heads": 3}, "heads: .* got 3"),
        ({"mimo_rank": 0}, "mimo_rank: .* got 0"),
        ({"groups": 3}, "groups: .* got groups 3"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        count(Mamba3(FEATURES, **options))

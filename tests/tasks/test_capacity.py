"""The closed-form probe: numbers known in advance, laws, and the library's own memory rules."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq import pallas_kernels
from memseq.tasks import capacity

# Load -> accuracy of each rule, with 32 dimensions, 256 candidates and 8 seeds: found once by an
# independent calculation.
UNIQUE = {
    0.5: {"hebb": 1.0, "decay": 0.984, "delta": 0.961, "least_squares": 1.0, "softmax": 1.0},
    1: {"hebb": 0.969, "decay": 0.73, "delta": 0.77, "least_squares": 1.0, "softmax": 1.0},
    2: {"hebb": 0.746, "decay": 0.377, "delta": 0.398, "least_squares": 0.959, "softmax": 1.0},
    4: {"hebb": 0.381, "decay": 0.183, "delta": 0.209, "least_squares": 0.524, "softmax": 1.0},
}
HEBB_SNR = {0.5: 18.4, 1: 15.5, 2: 12.5, 4: 9.7}
# Pairs -> (accuracy, stale) of each rule, four writes of each key, from the same calculation.
REWRITTEN = {
    16: {
        "hebb": (0.242, 0.617),
        "decay": (0.867, 0.008),
        "delta": (0.938, 0.008),
        "least_squares": (0.242, 0.727),
        "softmax": (0.242, 0.727),
    },
    32: {
        "hebb": (0.121, None),
        "decay": (0.441, None),
        "delta": (0.676, None),
        "least_squares": (0.223, None),
        "softmax": (0.223, None),
    },
}


def by(rows, *names):
    return {tuple(row[name] for name in names): row for row in rows}


def test_unique_keys():
    rows = by(capacity.unique_keys(), "load", "rule")
    assert len(rows) == 20
    for load, rules in UNIQUE.items():
        for rule, expected in rules.items():
            # 8 seeds leave 128 to 1024 reads: a standard error of at most 0.04.
            np.testing.assert_allclose(rows[load, rule]["accuracy"], expected, atol=0.05)
        np.testing.assert_allclose(rows[load, "hebb"]["snr_db"], HEBB_SNR[load], atol=0.4)
        assert rows[load, "hebb"]["pairs"] == load * 32


def test_rewritten_keys():
    # The numbers to compare with come from 128 and 256 reads: 0.04 of standard error, most of it
    # theirs, as here there are eight times as many.
    rows = by(capacity.rewritten_keys(seeds=64), "pairs", "rule")
    for pairs, rules in REWRITTEN.items():
        for rule, (accuracy, stale) in rules.items():
            np.testing.assert_allclose(rows[pairs, rule]["accuracy"], accuracy, atol=0.08)
            if stale is not None:
                np.testing.assert_allclose(rows[pairs, rule]["stale"], stale, atol=0.08)


def test_capacity_and_rewriting_rank_the_rules_in_opposite_order():
    unique = by(capacity.unique_keys((1,)), "rule")
    rewritten = by(capacity.rewritten_keys((16,)), "rule")
    accuracy = {rule: unique[rule,]["accuracy"] for rule in capacity.RULES}
    latest = {rule: rewritten[rule,]["accuracy"] for rule in capacity.RULES}
    assert accuracy["hebb"] > accuracy["delta"] + 0.1
    assert accuracy["least_squares"] > accuracy["delta"] + 0.1
    assert latest["delta"] > latest["hebb"] + 0.4
    assert latest["delta"] > latest["least_squares"] + 0.4


def test_forgetting():
    rows = capacity.forgetting(seeds=64)
    curve = {
        rule: [row["accuracy"] for row in rows if row["rule"] == rule] for rule in capacity.RULES
    }
    assert [row["octile"] for row in rows if row["rule"] == "hebb"] == list(range(1, 9))
    np.testing.assert_allclose(curve["hebb"], 0.75, atol=0.08)  # flat
    np.testing.assert_allclose(curve["least_squares"], 0.95, atol=0.05)
    np.testing.assert_allclose(curve["softmax"], 1.0)
    for rule, oldest in (("decay", 0.01), ("delta", 0.03)):
        np.testing.assert_allclose([curve[rule][0], curve[rule][-1]], [oldest, 1.0], atol=0.03)
        assert (np.diff(curve[rule]) > 0).all(), rule


def test_signal_to_noise_falls_by_three_decibel_a_doubling():
    for dim in (16, 64):
        rows = capacity.unique_keys((0.5, 1, 2, 4), dim=dim, rules=("hebb",), seeds=16)
        snr = np.array([row["snr_db"] for row in rows])
        pairs = np.array([row["pairs"] for row in rows])
        # Each of the other pairs adds 1/dim to an output's power, 1/dim of it along the true value.
        signal = 1 + (pairs - 1) / dim**2
        noise = (pairs - 1) / dim * (1 - 1 / dim) / dim
        np.testing.assert_allclose(snr, 10 * np.log10(signal / noise), atol=0.4)
    np.testing.assert_allclose(np.diff(snr), -3.0, atol=0.3)


def test_least_squares_is_exact_up_to_the_dimension():
    rows = by(capacity.unique_keys((0.5, 1, 1.25), rules=("least_squares",)), "load")
    for load in (0.5, 1):
        assert rows[load,]["accuracy"] == 1.0 and rows[load,]["snr_db"] == capacity.EXACT_DB
    assert rows[1.25,]["snr_db"] < 40


@pytest.mark.parametrize(("pairs", "writes"), [(6, 1), (6, 3), (8, 1), (20, 1)])
def test_least_squares_is_the_smallest_best_fit(pairs, writes):
    rng = np.random.default_rng(0)
    keys = np.tile(rng.standard_normal((3, pairs, 8)), (1, writes, 1))
    values = rng.standard_normal((3, pairs * writes, 5))
    got = capacity.memory_matrix("least_squares", keys, values, 1.0)
    for draw in range(3):
        expected = np.linalg.lstsq(keys[draw], values[draw], rcond=1e-10)[0]
        np.testing.assert_allclose(got[draw], expected, atol=1e-8)


def test_orthogonal_keys_make_hebb_delta_and_least_squares_one():
    rng = np.random.default_rng(0)
    keys = np.linalg.qr(rng.standard_normal((3, 8, 8)))[0]
    values = rng.standard_normal((3, 8, 5))
    expected = capacity.memory_matrix("hebb", keys, values, 1.0)
    for rule in ("decay", "delta", "least_squares"):
        got = capacity.memory_matrix(rule, keys, values, 1.0)
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_correlated_keys():
    drawn = capacity._draw(0, 4000, 1, capacity.Setting(dim=64, correlation=0.5))[0]
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1.0)
    gram = drawn @ drawn.T
    mean = (gram.sum() - 4000) / (4000 * 3999)
    np.testing.assert_allclose(mean, 0.5, atol=0.01)
    rows = by(capacity.unique_keys((0.5,), correlation=0.5), "rule")
    plain = by(capacity.unique_keys((0.5,)), "rule")
    assert rows["hebb",]["accuracy"] < plain["hebb",]["accuracy"] - 0.3
    # The error correction of the delta rule is what helps when keys are alike.
    assert rows["delta",]["accuracy"] > rows["hebb",]["accuracy"] + 0.05
    assert rows["least_squares",]["accuracy"] == 1.0


@pytest.mark.parametrize("writes", [1, 3])
def test_rules_of_the_library(writes):
    """The same memories by the reference forms of `memseq.pallas_kernels`, in float64."""
    keys, table, numbers = capacity._draw(0, 20, writes, capacity.Setting(dim=16))
    written, values = np.tile(keys, (writes, 1)), table[numbers.T.reshape(-1)]
    with jax.enable_x64(True):
        key, value = (jnp.asarray(array)[None, :, None] for array in (written, values))
        options = {"scale": 1.0, "implementation": "reference"}
        ours = {}
        for rule, log_decay in (("hebb", None), ("decay", jnp.full((1,), jnp.log(0.9)))):
            ours[rule] = pallas_kernels.linear_attention(key, key, value, log_decay, **options)
        ours["delta"] = pallas_kernels.delta_rule(
            key, key, value, jnp.ones(key.shape[:3]), **options
        )
        for rule, (out, state) in ours.items():
            expected = capacity.memory_matrix(rule, written, values, 0.9)
            np.testing.assert_allclose(state[0, 0], expected, atol=1e-12, err_msg=rule)
            # The last output reads the finished memory with the last key.
            last = capacity.recall(rule, written, values, written[-1:], 0.9, 8.0)
            np.testing.assert_allclose(out[0, -1], last, atol=1e-12, err_msg=rule)


def test_softmax_of_the_library():
    keys, table, numbers = capacity._draw(0, 20, 1, capacity.Setting(dim=16))
    values = table[numbers[:, 0]]
    query, key, value = (
        jnp.asarray(array, jnp.float32)[None, :, None] for array in (keys, keys, values)
    )
    out = pallas_kernels.attention(query, key, value, scale=8.0, causal=False)
    expected = capacity.recall("softmax", keys, values, keys, 1.0, 8.0)
    np.testing.assert_allclose(out[0, :, 0], expected, atol=2e-6)


def test_table():
    started = time.process_time()
    rows = capacity.table()
    assert time.process_time() - started < 3.0
    tables = [row["table"] for row in rows]
    assert {name: tables.count(name) for name in tables} == {
        "unique": 20,
        "rewrite": 10,
        "forgetting": 40,
    }
    assert rows == capacity.table()  # the same in every call
    for row in rows:
        assert 0 <= row["accuracy"] <= 1 and row["rule"] in capacity.RULES
        assert all(type(value) in (str, int, float) for value in row.values())
    assert {row["dim"] for row in capacity.table(dim=16)} == {16}


def test_state_bytes():
    rows = by(capacity.unique_keys((1, 4)), "load", "rule")
    for load in (1, 4):
        found = {rule: rows[load, rule]["state_bytes"] for rule in capacity.RULES}
        matrix = 4 * 32 * 32
        assert found["hebb"] == found["decay"] == found["delta"] == matrix
        assert found["least_squares"] == 2 * matrix and found["softmax"] == 2 * load * matrix
    assert capacity.rewritten_keys((16,), rules=("softmax",))[0]["state_bytes"] == 4 * 2 * 64 * 32


def test_pairs_at():
    made = [
        {"table": "unique", "rule": rule, "dim": 32, "correlation": 0.0, "pairs": n, "accuracy": a}
        for rule, curve in {
            "falls": {64: 0.5, 16: 1.0, 32: 0.95},
            "holds": {16: 1.0, 64: 0.9},
            "fails": {16: 0.2, 32: 0.1},
        }.items()
        for n, a in curve.items()
    ]
    found = capacity.pairs_at([*made, {"table": "rewrite"}])
    assert found["holds", 32, 0.0] == float("inf") and found["fails", 32, 0.0] == 0
    np.testing.assert_allclose(found["falls", 32, 0.0], 32 * 2 ** (0.05 / 0.45))
    rows = capacity.pairs_at(capacity.unique_keys())
    assert 32 < rows["hebb", 32, 0.0] < 64 and 16 < rows["delta", 32, 0.0] < 32


def test_outputs_without_a_fixed_seed_differ():
    few = capacity.unique_keys((1,), seeds=1, rules=("delta",))[0]["accuracy"]
    many = capacity.unique_keys((1,), seeds=32, rules=("delta",))[0]["accuracy"]
    assert few != many


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: capacity.unique_keys(rules=("hebbian",)), "rules: .*mean 'hebb'"),
        (lambda: capacity.unique_keys(decays=0.5), "option: .*mean 'decay'"),
        (lambda: capacity.unique_keys((0,)), "loads: "),
        (lambda: capacity.unique_keys(decay=1.5), "decay: "),
        (lambda: capacity.unique_keys(correlation=1.0), "correlation: "),
        (lambda: capacity.unique_keys(beta=0), "beta: "),
        (lambda: capacity.unique_keys(seeds=0), "seeds: "),
        (lambda: capacity.rewritten_keys((0,)), "pairs: "),
        (lambda: capacity.rewritten_keys(writes=9, candidates=8), "writes: 9 different values"),
        (lambda: capacity.forgetting(60), "pairs: expected a multiple of octiles, 8, got 60"),
        (lambda: capacity.table("tinny"), "variant: .*mean 'tiny'"),
        (lambda: capacity.memory_matrix("softmax", None, None, 1.0), "rule: "),
        (lambda: capacity.state_bytes("hebbian", 1, 1), "rule: .*mean 'hebb'"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()

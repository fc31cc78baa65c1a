"""States on disk and in several copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memseq.models.state as module
from memseq.models.state import fork, restore_state, save_state
from tests.models.harness import layout, small

RNG = np.random.default_rng(0)


def filled(state):
    """The state with random values of every leaf's dtype."""

    def values(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(RNG.normal(size=leaf.shape), leaf.dtype)
        return jnp.asarray(RNG.integers(-1, 9, leaf.shape), leaf.dtype)

    return jax.tree.map(values, state)


MODELS = {
    "two mixers": small(repeats=2),
    "bfloat16": small(dtype=jnp.bfloat16),
    "no convolution": small(("linear_attention",)),
    "window": small(("softmax_attention",), mixers={"softmax_attention": {"window": 3}}),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_round_trip(model, tmp_path):
    """What is restored is what was saved, to the bit, with its dtypes and classes."""
    state = filled(model.init_state(2, context=5))
    save_state(tmp_path / "state", state)
    restored = restore_state(tmp_path / "state", model.init_state(2, context=5))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert layout(restored) == layout(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_makes_folders_and_replaces(tmp_path):
    model = MODELS["no convolution"]
    path = tmp_path / "a" / "b" / "state"
    for _ in range(2):
        state = filled(model.init_state(1))
        save_state(str(path), state)
        restored = restore_state(str(path), model.init_state(1))
        jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_damage(tmp_path):
    """Every byte counts: cut, changed, added or empty files are told apart from whole ones."""
    model = MODELS["no convolution"]
    like = model.init_state(1)
    path = tmp_path / "state"
    save_state(path, filled(like))
    whole = path.read_bytes()
    changed = [b"", whole[:10], whole[:-1], whole + b"x", whole[len(whole) // 2 :]]
    for place in (0, 20, 40, len(whole) // 2, len(whole) - 1):
        changed.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    for content in changed:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="state is not a whole saved state"):
            restore_state(path, like)
    path.write_bytes(whole)
    restore_state(path, like)
    with pytest.raises(FileNotFoundError):
        restore_state(tmp_path / "none", like)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (small(repeats=3).init_state(2, context=5), "another state: .*expected float32"),
        (small(repeats=2).init_state(1, context=5), "another state"),
        (small(repeats=2).init_state(2, context=6), "another state"),
        (small(repeats=2, dtype=jnp.bfloat16).init_state(2, context=5), "expected bfloat16"),
        (small(("gated_delta_net",), repeats=2).init_state(2), "another model"),
        (small(("gated_delta_net",) * 2, repeats=2).init_state(2), "another model"),
        (
            small(("softmax_attention", "gated_delta_net"), repeats=2).init_state(2, context=5),
            "another model",
        ),
        (small(repeats=2).init_state(2), "another"),
    ],
)
def test_another_model(other, message, tmp_path):
    save_state(tmp_path / "state", small(repeats=2).init_state(2, context=5))
    with pytest.raises(ValueError, match=message):
        restore_state(tmp_path / "state", other)


def test_another_layer_of_equal_shapes(tmp_path):
    """A memory means nothing to a layer that did not write it."""
    plain = {"normalize": False, "conv_width": 4, "feature_map": "relu"}
    one = small(("linear_attention",), mixers={"linear_attention": plain}).init_state(2)
    other = small(("delta_net",)).init_state(2)
    assert jax.tree.leaves(layout(one)) == jax.tree.leaves(layout(other))
    save_state(tmp_path / "state", one)
    with pytest.raises(ValueError, match="another model"):
        restore_state(tmp_path / "state", other)


def test_a_failed_write_loses_nothing(tmp_path, monkeypatch):
    """The file that was there stays, and nothing else does."""
    model = MODELS["no convolution"]
    before, after = (filled(model.init_state(1)) for _ in range(2))
    save_state(tmp_path / "state", before)

    def full(*arguments):
        raise OSError("No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(module.os, name, full)
            with pytest.raises(OSError, match="No space left"):
                save_state(tmp_path / "state", after)
        assert [path.name for path in tmp_path.iterdir()] == ["state"]
        restored = restore_state(tmp_path / "state", model.init_state(1))
        jax.tree.map(np.testing.assert_array_equal, restored, before)


def test_fork():
    """Copies of a row lie side by side, in every leaf of every layer."""
    state = filled(small(repeats=2).init_state(2, context=5))
    forked = fork(state, 3)
    for one, many in zip(jax.tree.leaves(state), jax.tree.leaves(forked), strict=True):
        assert many.shape == (2, 6, *one.shape[2:])
        for copy in range(6):
            np.testing.assert_array_equal(many[:, copy], one[:, copy // 3])
    with pytest.raises(ValueError, match="copies: expected an integer of at least 1, got 0"):
        fork(state, 0)

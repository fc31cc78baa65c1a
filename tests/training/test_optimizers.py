"""Schedules point by point, Muon against its definition layer by layer, decay and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memseq.training.optimizers import make_optimizer, make_schedule
from tests.training.stand_in import options


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("constant", {0: 0.25, 3: 1.0, 50: 1.0, 100: 1.0}),
        ("cosine", {0: 0.25, 3: 1.0, 4: 1.0, 52: 0.55, 100: 0.1, 200: 0.1}),
        ("wsd", {0: 0.25, 3: 1.0, 80: 1.0, 90: 0.55, 100: 0.1, 200: 0.1}),
    ],
)
def test_schedules(kind, expected):
    chosen = options(schedule=kind, warmup_steps=4, learning_rate=3.0)
    schedule = make_schedule(chosen, steps=100)
    for count, value in expected.items():
        np.testing.assert_allclose(schedule(count), 3.0 * value, rtol=1e-6, err_msg=f"at {count}")


def test_a_schedule_without_warmup_starts_at_the_peak():
    np.testing.assert_allclose(make_schedule(options(), 10)(0), 1e-2, rtol=1e-6)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "adam"}, "optimizer.name: got 'adam', expected one of adamw, muon"),
        ({"schedule": "linear"}, "optimizer.schedule: got 'linear'.*cosine"),
        ({"learning_rate": 0.0}, "optimizer.learning_rate"),
        ({"warmup_steps": 10}, r"optimizer.warmup_steps: got 10, expected in \[0, 10\)"),
        ({"final_fraction": 2.0}, "optimizer.final_fraction"),
        ({"decay_fraction": 0.0}, "optimizer.decay_fraction"),
        ({"b1": 1.0}, "optimizer.b1"),
        ({"momentum": -0.1}, "optimizer.momentum"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay"),
        ({"clip_norm": -1.0}, "optimizer.clip_norm"),
    ],
)
def test_wrong_options_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        make_optimizer(options(**changes), steps=10)


def parameters(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    return {
        "params": {
            "embed": {"embedding": jax.random.normal(keys[0], (11, 6))},
            "layers": {
                "up": {"kernel": jax.random.normal(keys[1], (3, 6, 10))},
                "conv": {"kernel": jax.random.normal(keys[2], (3, 4, 10))},
                "norm": {"scale": jax.random.normal(keys[3], (3, 6))},
            },
        }
    }


def update(name, gradients, params, **changes):
    changes = {"clip_norm": 0.0, "weight_decay": 0.0} | changes
    optimizer, _ = make_optimizer(options(name=name, **changes), steps=10)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    return updates["params"]


def test_muon_orthogonalises_each_layer_of_a_stack_by_itself():
    params, gradients = parameters(), parameters(1)
    got = update("muon", gradients, params)["layers"]["up"]["kernel"]
    for layer in range(3):
        gradient = np.asarray(gradients["params"]["layers"]["up"]["kernel"][layer])
        alone = {"up": {"kernel": jnp.asarray(gradient)}}
        single, _ = make_optimizer(options(name="muon", clip_norm=0.0, weight_decay=0.0), 10)
        want, _ = single.update(alone, single.init(alone), alone)
        np.testing.assert_allclose(got[layer], want["up"]["kernel"], rtol=1e-4, atol=1e-6)
        # Steepest descent in the spectral norm is U V^T; five Newton-Schulz steps come near it.
        u, _, v = np.linalg.svd(gradient, full_matrices=False)
        scale = -1e-2 * 0.2 * 10**0.5
        values = np.linalg.svd(np.asarray(got[layer]) / scale, compute_uv=False)
        assert np.all((values > 0.6) & (values < 1.3))
        cosine = np.sum(got[layer] / scale * (u @ v)) / (
            6**0.5 * np.linalg.norm(got[layer] / scale)
        )
        assert cosine > 0.95


def test_muon_leaves_all_but_matrices_to_adam():
    params, gradients = parameters(), parameters(1)
    muon, adam = (update(name, gradients, params) for name in ("muon", "adamw"))
    for names in (
        ("embed", "embedding"),
        ("layers", "conv", "kernel"),
        ("layers", "norm", "scale"),
    ):
        a, b = muon, adam
        for name in names:
            a, b = a[name], b[name]
        np.testing.assert_array_equal(a, b)
    a, b = (u["layers"]["up"]["kernel"] for u in (muon, adam))
    assert not np.allclose(a, b)
    # One learning rate serves both: the root mean squares of their first updates are alike.
    np.testing.assert_allclose(np.sqrt(np.mean(a**2)), 0.2 * np.sqrt(np.mean(b**2)), rtol=0.35)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_is_by_name(name):
    params, gradients = parameters(), jax.tree.map(jnp.zeros_like, parameters())
    updates = update(name, gradients, params, weight_decay=0.5)
    kernel = params["params"]["layers"]["up"]["kernel"]
    np.testing.assert_allclose(updates["layers"]["up"]["kernel"], -0.005 * kernel, rtol=1e-5)
    for other in (
        updates["embed"]["embedding"],
        updates["layers"]["conv"]["kernel"],
        updates["layers"]["norm"]["scale"],
    ):
        np.testing.assert_array_equal(other, 0)


def test_clipping_is_by_the_global_norm():
    params, gradients = parameters(), parameters(1)
    norm = float(optax.tree.norm(gradients))
    clipped, _ = make_optimizer(options(clip_norm=norm / 7), 10)
    _, state = clipped.update(gradients, clipped.init(params), params)
    free, _ = make_optimizer(options(clip_norm=0.0), 10)
    _, expected = free.update(jax.tree.map(lambda g: g / 7, gradients), free.init(params), params)
    moments = state[1][0].mu["params"]["layers"]["up"]["kernel"]
    np.testing.assert_allclose(
        moments, expected[0].mu["params"]["layers"]["up"]["kernel"], rtol=1e-5
    )

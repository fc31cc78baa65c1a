"""A sweep is many trainings in one program, and none of them knows of the others."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq import tasks
from memseq.training import sweep
from memseq.training.copies import Settings, Trainer, schedule

SETTINGS = Settings(
    learning_rates=(1e-3, 1e-2),
    steps=6,
    batch=8,
    warmup=2,
    validation_examples=16,
    test_examples=16,
    steps_per_dispatch=4,
)


class Sums(nn.Module):
    """The smallest model that can get anywhere: a running mean of embeddings."""

    vocab_size: int = 4
    features: int = 8

    @nn.compact
    def __call__(self, tokens):
        x = jnp.cumsum(nn.Embed(self.vocab_size, self.features)(tokens), axis=1)
        return nn.Dense(self.vocab_size)(nn.tanh(x)), None


@pytest.fixture(scope="module")
def task():
    return tasks.get("parity", length=8, test={"length": 16}, bands=(8, 16))


@pytest.fixture(scope="module")
def result(task):
    return sweep.run(Sums(), task, SETTINGS, [0, 3])


def flat(found: sweep.SeedResult) -> np.ndarray:
    """Everything a seed measured, as one vector."""
    numbers = [found.validation, found.learning_rate, *found.scores.values(), *found.by_position]
    for copy in found.copies:
        numbers += [copy["validation"], *copy["scores"].values()]
    return np.array(numbers + [loss for _, loss in found.curve], float)


def test_seed_alone_equals_seed_in_sweep(task, result):
    alone = sweep.run(Sums(), task, SETTINGS, [3])
    assert [found.seed for found in result.seeds] == [0, 3]
    np.testing.assert_allclose(flat(alone.seeds[0]), flat(result.seeds[1]), atol=1e-5)
    # and the two seeds are not the same training twice
    assert not np.allclose(flat(result.seeds[0]), flat(result.seeds[1]), atol=1e-5)


def test_together_equals_one_after_the_other(task, result):
    looped = dataclasses.replace(SETTINGS, copies_together=False)
    together = dataclasses.replace(SETTINGS, copies_together=True, steps_per_dispatch=6)
    for settings in (looped, together):
        other = sweep.run(Sums(), task, settings, [0, 3])
        for mine, theirs in zip(result.seeds, other.seeds, strict=True):
            np.testing.assert_allclose(flat(mine), flat(theirs), atol=1e-5)


def test_reports_what_the_task_counts(task, result):
    found = result.seeds[0]
    assert set(found.scores) >= {"accuracy", "sequence_accuracy", "1-8", "9-16"}
    assert len(found.by_position) == 16  # tested as its eval_variant
    np.testing.assert_allclose(np.mean(found.by_position), found.scores["accuracy"], atol=1e-6)
    hits, count = found.counts["9-16"]
    assert count == 16 * 8
    np.testing.assert_allclose(hits / count, found.scores["9-16"], atol=1e-6)
    assert [step for step, _ in found.curve] == [1, 2, 3, 4, 5, 6]
    assert result.parameters == 4 * 8 + 8 * 4 + 4
    assert result.copies == 4
    assert result.cpu_seconds > 0 and result.wall_seconds > result.compile_seconds > 0


def test_chooses_the_rate_on_validation(result):
    for found in result.seeds:
        best = max(copy["validation"] for copy in found.copies)
        chosen = [c for c in found.copies if c["learning_rate"] == found.learning_rate]
        assert found.validation == best == chosen[0]["validation"]
        assert found.scores == chosen[0]["scores"]


def test_learns(task):
    settings = dataclasses.replace(SETTINGS, learning_rates=(5e-2,), steps=60, batch=32)
    easy = tasks.get("parity", length=1, test={}, bands=(1,))
    found = sweep.run(Sums(), easy, settings, [0]).seeds[0]
    assert found.scores["accuracy"] == 1.0
    assert found.curve[-1][1] < 0.3 < found.curve[0][1]


def test_diverged_copy_is_isolated(task, result):
    """A rate that overflows fails alone: the other copies end as they do without it."""
    wild = dataclasses.replace(SETTINGS, learning_rates=(1e-3, 1e-2, 1e38))
    found = sweep.run(Sums(), task, wild, [0, 3])
    for mine, theirs in zip(result.seeds, found.seeds, strict=True):
        assert theirs.error is None
        *sound, broken = theirs.copies
        assert broken["failed_at"] is not None and broken["failed_at"] <= SETTINGS.steps
        assert broken["validation"] is None and broken["scores"] == {}
        assert [copy["failed_at"] for copy in sound] == [None, None]
        trimmed = dataclasses.replace(theirs, copies=sound)
        np.testing.assert_allclose(flat(mine), flat(trimmed), atol=1e-5)


def test_seed_without_a_sound_copy_says_so(task):
    wild = dataclasses.replace(SETTINGS, learning_rates=(1e38,))
    found = sweep.run(Sums(), task, wild, [0]).seeds[0]
    assert "not finite" in found.error and "1e+38" in found.error
    assert found.scores == {} and found.learning_rate is None
    assert all(np.isfinite(loss) for _, loss in found.curve)


def test_failed_copy_stands_still(task):
    """What has failed keeps its parameters, and what fails is marked with the step."""
    trainer = Trainer(Sums(), task, dataclasses.replace(SETTINGS, learning_rates=(1e-3,)))
    seeds = jnp.arange(3)
    copies = trainer.start(seeds)
    spoil = lambda leaf: leaf.at[1].set(jnp.nan)  # noqa: E731
    copies = copies.replace(
        params=jax.tree.map(spoil, copies.params),
        failed_at=copies.failed_at.at[2].set(0),
    )
    after = trainer.train(copies, seeds, 1, 4)
    np.testing.assert_array_equal(after.failed_at, [[-1], [1], [0]])
    assert np.isfinite(after.losses[0, 0, 1:4]).all() and np.isnan(after.losses[1:, 0, 1:4]).all()
    leaves = zip(jax.tree.leaves(copies.params), jax.tree.leaves(after.params), strict=True)
    for before, now in leaves:
        assert np.isfinite(now[0]).all() and not np.array_equal(before[0], now[0])
        np.testing.assert_array_equal(before[2], now[2])


def test_seeds_see_other_examples(task):
    """From the same parameters, two seeds go different ways; two equal seeds the same way."""
    trainer = Trainer(Sums(), task, dataclasses.replace(SETTINGS, learning_rates=(1e-2,)))
    start = trainer.start(jnp.zeros(2, jnp.int32))
    for seeds, same in (([0, 0], True), ([0, 1], False)):
        losses = trainer.train(start, jnp.array(seeds), 0, 3).losses[:, 0, :3]
        assert np.array_equal(losses[0], losses[1]) == same


class Drawn(Sums):
    """A parameter that only a sown loss asks anything of: it is drawn to 1."""

    @nn.compact
    def __call__(self, tokens):
        place = self.param("place", nn.initializers.zeros, ())
        if not self.is_initializing():
            self.sow("losses", "distance", 100 * (place - 1) ** 2)
        return Sums(name="sums")(tokens)


def test_sown_losses_are_trained_and_not_reported(task):
    trainer = Trainer(Drawn(), task, dataclasses.replace(SETTINGS, learning_rates=(1e-2,)))
    seeds = jnp.arange(1)
    copies = trainer.train(trainer.start(seeds), seeds, 0, 3)
    assert copies.params["params"]["place"][0, 0] > 1e-3
    assert 0 < copies.losses[0, 0, 0] < 50  # the distance is 100


def test_extra_tests_are_named(task):
    longer = dataclasses.replace(task.eval_variant(), length=4)
    found = sweep.run(Sums(), task, SETTINGS, [0], also={"short": longer}).seeds[0]
    assert found.counts["short: accuracy"][1] == 16 * 4
    assert found.counts["accuracy"][1] == 16 * 16


def test_decay_mask(task):
    """Decay moves exactly what the mask names; without it and at the same step nothing differs."""

    def trained(weight_decay, mask):
        settings = dataclasses.replace(
            SETTINGS, learning_rates=(1e-2,), weight_decay=weight_decay, warmup=0
        )
        trainer = Trainer(Sums(), task, settings, mask)
        seeds = jnp.arange(1)
        return trainer.train(trainer.start(seeds), seeds, 0, 1).params["params"]

    only_dense = lambda p: jax.tree.map_with_path(lambda path, _: "Dense_0" in str(path), p)  # noqa: E731
    plain, decayed = trained(0.0, only_dense), trained(0.5, only_dense)
    np.testing.assert_array_equal(plain["Embed_0"]["embedding"], decayed["Embed_0"]["embedding"])
    assert np.abs(plain["Dense_0"]["kernel"] - decayed["Dense_0"]["kernel"]).max() > 1e-4


def test_schedule():
    share = [
        float(schedule(jnp.int32(step), Settings(steps=100, warmup=10))) for step in range(100)
    ]
    np.testing.assert_allclose(share[0], 0.1)
    np.testing.assert_allclose(share[10], 1.0)
    np.testing.assert_allclose(share[99], 0.02, atol=2e-3)
    assert np.all(np.diff(share[10:]) < 0)


@pytest.mark.parametrize("seeds", [[], [1, 1], [-1]])
def test_bad_seeds(task, seeds):
    with pytest.raises(ValueError, match="seeds"):
        sweep.run(Sums(), task, SETTINGS, seeds)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rates", ()),
        ("learning_rates", (0.0,)),
        ("learning_rates", (float("nan"),)),
        ("steps", 0),
        ("batch", 0),
        ("warmup", -1),
        ("clip", 0.0),
        ("test_examples", 0),
    ],
)
def test_bad_settings(name, value):
    with pytest.raises(ValueError, match=name):
        Settings(**{name: value})

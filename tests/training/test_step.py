"""The training step: worth the same however the batch is cut, unharmed by numbers gone bad."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memseq import partitioning
from memseq.training.optimizers import make_optimizer
from memseq.training.state import initial_state, sharded_initial_state
from memseq.training.step import make_eval_step, make_train_step
from tests.training.stand_in import Tiny, assert_trees, batch, options


def make(microbatches=1, noise=0.0, **changes):
    model = Tiny(noise=noise)
    optimizer, schedule = make_optimizer(options(**changes), steps=100)
    step = make_train_step(model, optimizer, schedule, microbatches=microbatches, loss_chunk=4)
    return model, optimizer, step


def start(model, optimizer, seed=0):
    return initial_state(model, optimizer, seed, length=6)


def test_the_loss_is_the_weighted_mean_and_falls():
    model, optimizer, step = make()
    state = start(model, optimizer)
    data = batch()
    logits, _ = model.apply(state.params, data["tokens"], segment_ids=data["segment_ids"])
    log_probabilities = jax.nn.log_softmax(logits)
    picked = np.take_along_axis(np.asarray(log_probabilities), data["targets"][..., None], 2)[
        ..., 0
    ]
    want = -np.sum(picked * data["weights"]) / np.sum(data["weights"])
    nll, weight = make_eval_step(model, loss_chunk=4)(state.params, data)
    np.testing.assert_allclose(nll / weight, want, rtol=1e-5)
    losses = []
    for _ in range(60):
        state, metrics = step(state, data)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[0], want, rtol=1e-5)
    assert np.all(np.isfinite(losses)) and losses[-1] < 0.5 * losses[0]
    assert (int(state.step), int(state.skipped)) == (60, 0)
    assert float(metrics["weight"]) == data["weights"].sum()


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_gradient_is_that_of_the_mean(microbatches):
    model, optimizer, step = make(microbatches)
    state, data = start(model, optimizer), batch()

    def mean(params):
        logits, _ = model.apply(params, data["tokens"], segment_ids=data["segment_ids"])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, data["targets"])
        return jnp.sum(nll * data["weights"]) / jnp.sum(data["weights"])

    want = optax.tree.norm(jax.grad(mean)(state.params))
    _, metrics = step(state, data)
    np.testing.assert_allclose(metrics["grad_norm"], want, rtol=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_are_worth_one_big_batch(name, microbatches):
    data = batch(rows=4)
    data["weights"][:2] = 0  # very uneven: a mean of means would differ
    data["weights"][0, 0] = 1
    states = []
    for parts in (1, microbatches):
        model, optimizer, step = make(parts, name=name)
        state = start(model, optimizer)
        for _ in range(3):
            state, metrics = step(state, data)
        states.append((state.params, metrics))
    assert_trees(np.testing.assert_allclose, *states, rtol=2e-4, atol=2e-6)


class WithLoss(Tiny):
    """Sows a loss that pulls one matrix to 1."""

    def hidden(self, tokens, state=None, segment_ids=None):
        hidden, state = super().hidden(tokens, state, segment_ids)
        pull = 10 * jnp.mean((self.up.variables["params"]["kernel"] - 1) ** 2)
        if not self.is_initializing():
            self.sow("losses", "pull", jnp.stack([pull, pull]))  # as from two scanned layers
        return hidden, state


@pytest.mark.parametrize("microbatches", [1, 2])
def test_sown_losses_are_minimised_and_reported_apart(microbatches):
    optimizer, schedule = make_optimizer(options(), steps=100)
    model, data = WithLoss(), batch()
    step = make_train_step(model, optimizer, schedule, microbatches=microbatches, loss_chunk=4)
    state = start(model, optimizer)
    nll, weight = make_eval_step(model, loss_chunk=4)(state.params, data)
    kernel = state.params["params"]["up"]["kernel"]
    want = 20 * np.mean((np.asarray(kernel) - 1) ** 2)
    for _ in range(60):
        state, metrics = step(state, data)
        if state.step == 1:
            np.testing.assert_allclose(metrics["loss"], nll / weight, rtol=1e-5)
            np.testing.assert_allclose(metrics["auxiliary_loss"], want, rtol=1e-5)
    assert metrics["auxiliary_loss"] < 0.5 * want


def test_microbatches_must_divide_the_batch():
    model, optimizer, step = make(microbatches=3)
    with pytest.raises(ValueError, match="microbatches: got 3, .* batch of 4"):
        step(start(model, optimizer), batch(rows=4))


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(microbatches, bad):
    model, optimizer, step = make(microbatches, name="muon")
    state, _ = step(start(model, optimizer), batch())
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    poisoned = batch()
    poisoned["weights"][0, 0] = bad
    for count in (1, 2):
        state, metrics = step(state, poisoned)
        assert not np.isfinite(metrics["loss"])
        assert (int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (count, count)
    assert_trees(np.testing.assert_array_equal, before, (state.params, state.opt_state))
    assert int(state.step) == 3
    state, metrics = step(state, batch())
    assert (int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (2, 0)
    assert np.isfinite(metrics["loss"])
    with pytest.raises(AssertionError):
        assert_trees(np.testing.assert_array_equal, before[0], state.params)


def test_a_gradient_that_is_not_finite_is_enough_to_skip():
    model, optimizer, step = make()
    state = start(model, optimizer)
    # tanh saturates, so the loss stays finite while the head's gradient overflows
    state.params["params"]["head"]["kernel"] = jnp.full((8, 11), 1e38).at[:, 0].set(-1e38)
    kernel = np.asarray(state.params["params"]["head"]["kernel"])
    state, metrics = step(state, batch())
    assert int(metrics["skipped"]) == 1
    np.testing.assert_array_equal(state.params["params"]["head"]["kernel"], kernel)


def test_the_schedule_counts_updates_not_skipped_steps():
    model, optimizer, step = make(warmup_steps=4)
    state = start(model, optimizer)
    poisoned = batch()
    poisoned["weights"][0, 0] = np.nan
    rates = []
    for data in (batch(), poisoned, batch()):
        state, metrics = step(state, data)
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, [0.0025, 0.005, 0.005], rtol=1e-5)


def test_randomness_is_a_function_of_seed_and_step():
    model, optimizer, step = make(noise=0.5)

    def losses(state, count):
        found = []
        for _ in range(count):
            state, metrics = step(state, batch())
            found.append(float(metrics["loss"]))
        return found, state

    whole, _ = losses(start(model, optimizer), 4)
    first, middle = losses(start(model, optimizer), 2)
    second, _ = losses(middle, 2)
    assert whole == first + second
    frozen = start(model, optimizer)
    again = frozen.replace(step=jnp.int32(1))
    assert losses(jax.tree.map(jnp.copy, frozen), 1)[0] != losses(again, 1)[0]


def test_the_states_buffers_are_taken_over():
    model, optimizer, step = make()
    state = start(model, optimizer)
    step(state, batch())
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))


def test_a_mesh_gives_the_numbers_of_one_device():
    model = Tiny(features=16)
    optimizer, schedule = make_optimizer(options(name="muon"), steps=100)
    found = []
    for shape, devices in (("data=1", jax.devices()[:1]), ("data=2,fsdp=2,tensor=2", None)):
        mesh = partitioning.make_mesh(shape, devices)
        with jax.set_mesh(mesh):
            state, shardings = sharded_initial_state(model, optimizer, 0, 6, mesh)
            step = make_train_step(
                model, optimizer, schedule, microbatches=2, loss_chunk=4, out_shardings=shardings
            )
            for seed in range(3):
                data = jax.device_put(batch(rows=8, seed=seed), partitioning.batch_sharding(mesh))
                state, metrics = step(state, data)
            kernel = state.params["params"]["up"]["kernel"]
            found.append((jax.tree.map(np.asarray, state.params), float(metrics["loss"])))
    assert kernel.addressable_shards[0].data.shape == (8, 8)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)
    assert_trees(np.testing.assert_allclose, found[0][0], found[1][0], rtol=2e-3, atol=2e-5)

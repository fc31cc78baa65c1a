"""The programs of a sweep: make, train and score many copies of one model.

The copies are stacked along two leading axes ``[seeds, rates]`` and share nothing but the program.
On an accelerator they are trained together (`jax.vmap`); on a CPU one after the other inside the
same program, which keeps one copy's arrays in cache and is a third faster.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from memseq.models.loss import auxiliary_loss
from memseq.pallas_kernels.common.checks import check_count


@dataclasses.dataclass(frozen=True)
class Settings:
    """How each copy is trained: AdamW, linear warm-up, cosine decay, clipping by the global norm.

    Attributes:
      learning_rates: peak rates; each is a copy of its own.
      steps, batch: updates, and examples in each.
      warmup: steps of linear warm-up.
      final_fraction: share of the peak rate that the cosine ends at.
      weight_decay, clip, beta1, beta2: of AdamW and of the clipping by the global norm.
      validation_examples, test_examples: rounded up to whole batches.
      steps_per_dispatch: steps between two progress reports; never changes results.
      data_seed: names the streams of examples and of initialisations.
      copies_together: True trains copies by `jax.vmap`, False in a loop, None by the platform.
    """

    learning_rates: tuple[float, ...] = (3e-3,)
    steps: int = 450
    batch: int = 64
    warmup: int = 50
    final_fraction: float = 0.02
    weight_decay: float = 0.01
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    validation_examples: int = 256
    test_examples: int = 512
    steps_per_dispatch: int = 25
    data_seed: int = 0
    copies_together: bool | None = None

    def __post_init__(self):
        rates = tuple(float(rate) for rate in self.learning_rates)
        object.__setattr__(self, "learning_rates", rates)
        if not rates or not all(0 < rate < float("inf") for rate in rates):
            raise ValueError(
                f"learning_rates: expected one or more positive numbers, got {list(rates)}"
            )
        examples = ("validation_examples", "test_examples")
        for name in ("steps", "batch", "steps_per_dispatch", *examples):
            check_count(name, getattr(self, name), 1)
        check_count("warmup", self.warmup, 0)
        if not self.clip > 0:
            raise ValueError(f"clip: expected a positive number, got {self.clip}")


@flax.struct.dataclass
class Copies:
    """What training carries; leaves lead with ``[seeds, rates]``.

    ``failed_at`` is int32, the step whose loss or gradient was not finite, or -1; ``losses`` is
    float32 ``[seeds, rates, steps]``.
    """

    params: Any
    optimizer: Any
    failed_at: jax.Array
    losses: jax.Array


def schedule(step: jax.Array, settings: Settings) -> jax.Array:
    """Share of the peak learning rate at ``step``: a linear warm-up, then a cosine."""
    warmup = min(settings.warmup, settings.steps)
    rise = (step + 1) / max(warmup, 1)
    done = jnp.clip((step - warmup) / max(settings.steps - warmup, 1), 0.0, 1.0)
    floor = settings.final_fraction
    fall = floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    return jnp.where(step < warmup, rise, fall)


def scored_loss(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats over the scored positions of a batch; arrays ``[batch, time]``."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.sum(jnp.where(mask, losses, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def over_copies(settings: Settings):
    """`jax.vmap`, or a loop with the same meaning."""
    together = settings.copies_together
    if together is None:
        together = jax.default_backend() != "cpu"
    return jax.vmap if together else one_at_a_time


def one_at_a_time(function):
    """`jax.vmap` over the leading axis of every argument, as a loop."""
    return lambda *xs: jax.lax.map(lambda x: function(*x), xs)


class Trainer:
    """Makes and trains the copies of ``model`` on ``task``; both methods are pure and jittable."""

    def __init__(self, model, task, settings: Settings, decay_mask=None):
        self.model, self.task, self.settings = model, task, settings
        self.over = over_copies(settings)
        self.rates = jnp.asarray(settings.learning_rates, jnp.float32)
        self.data_key, self.init_key = jax.random.split(jax.random.key(settings.data_seed))
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(settings.clip),
            optax.scale_by_adam(settings.beta1, settings.beta2),
            optax.add_decayed_weights(settings.weight_decay, decay_mask),
        )

    def start(self, seeds: jax.Array) -> Copies:
        """Fresh copies for int32 seeds ``[S]``.

        A seed has one initialisation, the same at every rate.
        """
        tokens = jnp.zeros((1, self.task.length), jnp.int32)
        rates = self.rates.shape[0]

        def seed_copies(seed):
            params = self.model.init(jax.random.fold_in(self.init_key, seed), tokens)
            copy = Copies(
                params=params,
                optimizer=self.optimizer.init(params),
                failed_at=jnp.full((), -1, jnp.int32),
                losses=jnp.zeros((self.settings.steps,), jnp.float32),
            )
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (rates, *leaf.shape)), copy)

        return one_at_a_time(seed_copies)(seeds)

    def train(self, copies: Copies, seeds: jax.Array, start: jax.Array, stop: jax.Array) -> Copies:
        """Steps ``start .. stop``; the bounds are traced, so one program serves any stretch."""

        def step(index, copies):
            def one_seed(copies, seed):
                key = jax.random.fold_in(self.data_key, seed)
                batch = self.task.batch(key, "train", index, self.settings.batch)
                return self.over(lambda copy, rate: self._update(copy, rate, batch, index))(
                    copies, self.rates
                )

            return self.over(one_seed)(copies, seeds)

        return jax.lax.fori_loop(start, stop, step, copies)

    def _update(self, copy: Copies, rate: jax.Array, batch, index: jax.Array) -> Copies:
        """One step of one copy. A copy that fails keeps its last parameters and stands still."""

        def loss_of(params):
            (logits, _), sown = self.model.apply(params, batch["inputs"], mutable="losses")
            loss = scored_loss(logits, batch["targets"], batch["mask"])
            return loss + auxiliary_loss(sown), loss

        (_, loss), grads = jax.value_and_grad(loss_of, has_aux=True)(copy.params)
        updates, optimizer = self.optimizer.update(grads, copy.optimizer, copy.params)
        scale = -rate * schedule(index, self.settings)
        params = jax.tree.map(lambda p, u: (p + scale * u).astype(p.dtype), copy.params, updates)

        going = copy.failed_at < 0
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        new, old = (params, optimizer), (copy.params, copy.optimizer)
        params, optimizer = jax.tree.map(lambda n, o: jnp.where(going & finite, n, o), new, old)
        return Copies(
            params=params,
            optimizer=optimizer,
            failed_at=jnp.where(going & ~finite, index, copy.failed_at),
            losses=copy.losses.at[index].set(jnp.where(going, loss, jnp.nan)),
        )


def scorer(model, task, over):
    """A function ``(params, batches) -> sums`` over all copies.

    ``params`` lead with ``[seeds, rates]`` and so do the sums; ``batches`` with a batch count. Sums
    are ``scores`` (name -> (sum, count)), ``position`` ((hits, count), each ``[..., time]``) and
    ``loss``.
    """

    def one_batch(params, batch):
        logits, _ = model.apply(params, batch["inputs"])
        predictions = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        hits = (predictions == batch["targets"]) & batch["mask"]
        return {
            "scores": task.scores(predictions, batch),
            "position": (jnp.sum(hits, 0), jnp.sum(batch["mask"], 0)),
            "loss": scored_loss(logits, batch["targets"], batch["mask"]),
        }

    def one_copy(params, batches):
        sums = jax.lax.map(lambda batch: one_batch(params, batch), batches)
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), sums)

    return lambda params, batches: over(over(lambda copy: one_copy(copy, batches)))(params)


def batches_of(task, key: jax.Array, split: str, examples: int, size: int):
    """``ceil(examples / size)`` batches of one split, stacked along a leading axis."""
    return jax.lax.map(lambda i: task.batch(key, split, i, size), jnp.arange(-(-examples // size)))

"""The training step and the evaluation step of a language model.

A batch has int32 `tokens`, `targets`, `segment_ids` and float32 `weights`, all [batch, time].
The loss is the mean negative log-likelihood in nats over the batch's weights: a sum over all
microbatches divided by the weight of all, so that splitting a batch never changes what it is worth.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from memseq.models import loss as losses
from memseq.training.optimizers import Schedule
from memseq.training.state import TrainState

Batch = Mapping[str, jax.Array]


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    microbatches: int = 1,
    loss_chunk: int = 256,
    out_shardings: Any = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted `(state, batch) -> (state, metrics)` that takes over the state's buffers.

    A step whose loss, gradient or update is not finite leaves parameters and optimiser as they were
    and is counted; the data moves on. What layers sow in `losses` is added to what is minimised.
    Metrics are float32 or int32 scalars: `loss` (nats, without that), `auxiliary_loss` (that),
    `grad_norm` (before clipping), `learning_rate`, `weight` (how many targets counted), `skipped`
    and `skipped_in_row`.

    Args:
      model: see `memseq.models.language_model`.
      optimizer, schedule: from `make_optimizer`.
      microbatches: the batch is taken in this many parts, one after another, and updated once.
      loss_chunk: positions whose logits are held at once.
      out_shardings: shardings of the state, or None to leave them to the compiler.

    Raises:
      ValueError: where the step is called, for a batch that `microbatches` does not divide.
    """

    def loss_of(params, batch, key):
        options = {"rngs": {"dropout": key}, "mutable": "losses"}
        nll, weight, sown = _nll(model, params, batch, loss_chunk, **options)
        auxiliary = weight * losses.auxiliary_loss(sown)
        return nll + auxiliary, (nll, auxiliary, weight)

    def step(state: TrainState, batch: Batch):
        key = jax.random.fold_in(state.key, state.step)
        sums, grads = _accumulate(loss_of, state.params, batch, key, microbatches)
        nll, auxiliary, weight = sums
        loss = nll / weight
        grads = jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), grads, state.params)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(nll + auxiliary) & jnp.isfinite(grad_norm)
        finite &= jnp.isfinite(optax.tree.norm(updates))
        new = (optax.apply_updates(state.params, updates), opt_state)
        old = (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
        metrics = {
            "loss": loss,
            "auxiliary_loss": auxiliary / weight,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step - state.skipped),
            "weight": weight,
            "skipped": state.skipped + skipped,
            "skipped_in_row": (state.skipped_in_row + 1) * skipped,
        }
        state = state.replace(
            step=state.step + 1,
            skipped=metrics["skipped"],
            skipped_in_row=metrics["skipped_in_row"],
            params=params,
            opt_state=opt_state,
        )
        return state, metrics

    if out_shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(out_shardings, None))


def make_eval_step(
    model: nn.Module, *, loss_chunk: int = 256
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """A jitted `(params, batch) -> (sum of nats, sum of weights)`; add both up before dividing."""
    return jax.jit(lambda params, batch: _nll(model, params, batch, loss_chunk)[:2])


def _nll(model, params, batch: Batch, loss_chunk: int, mutable=(), **options):
    """Sum of nats, sum of weights, and the variables of the `mutable` collections."""
    (hidden, _), sown = model.apply(
        params,
        batch["tokens"],
        segment_ids=batch["segment_ids"],
        method="hidden",
        mutable=mutable,
        **options,
    )
    nll, weight = losses.token_cross_entropy(
        model, params, hidden, batch["targets"], batch["weights"], loss_chunk
    )
    return nll, weight, sown


def _accumulate(loss_of, params, batch: Batch, key: jax.Array, microbatches: int):
    """The sums that `loss_of` gives beside its value, and that value's float32 gradient."""
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if microbatches == 1:
        (_, sums), grads = value_and_grad(params, batch, jax.random.fold_in(key, 0))
        return sums, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    rows = batch["tokens"].shape[0]
    if rows % microbatches:
        raise ValueError(
            f"microbatches: got {microbatches}, which does not divide the batch of {rows}"
        )

    def split(x):
        # Part i takes rows i, i + k, ...: rows that share a device stay there.
        return x.reshape(rows // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1)

    def add(total, part):
        index, batch = part
        (_, sums), grads = value_and_grad(params, batch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, (sums, grads)), None

    zero = jnp.zeros((), jnp.float32)
    start = ((zero,) * 3, jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    parts = (jnp.arange(microbatches), jax.tree.map(split, dict(batch)))
    return jax.lax.scan(add, start, parts)[0]

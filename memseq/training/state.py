"""Everything that a training step carries to the next one."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from memseq import partitioning


@flax.struct.dataclass
class TrainState:
    """What changes from step to step; a checkpoint holds all of it.

    Attributes:
      step: int32, batches consumed, skipped ones included.
      skipped: int32, steps skipped so far because the loss or a gradient was not finite.
      skipped_in_row: int32, how many of the latest steps were skipped without one in between.
      key: typed PRNG key of the run; the randomness of a step is `fold_in(key, step)`.
      params: the model's variables, {"params": ...}.
      opt_state: the optimiser's state. It counts updates, which is `step - skipped`.
    """

    step: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    key: jax.Array
    params: Any
    opt_state: Any


def initial_state(
    model: nn.Module, optimizer: optax.GradientTransformation, seed: int, length: int
) -> TrainState:
    """The state before the first step: a pure function of the seed.

    Args:
      model: takes tokens int32 [batch, time].
      optimizer: an optax transformation.
      seed: seeds the parameters and, independently, the steps' randomness.
      length: time of the tokens that the model is initialised with.
    """
    init_key, step_key = jax.random.split(jax.random.key(seed))
    params = model.init(init_key, jnp.zeros((1, length), jnp.int32))
    return TrainState(
        step=jnp.zeros((), jnp.int32),  # an array each: a step takes over every buffer by itself
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
        key=step_key,
        params=params,
        opt_state=optimizer.init(params),
    )


def sharded_initial_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    length: int,
    mesh: jax.sharding.Mesh,
) -> tuple[TrainState, TrainState]:
    """(state, shardings): `initial_state`, made directly in the places where the rules want it."""

    def make():
        return initial_state(model, optimizer, seed, length)

    shardings = partitioning.tree_shardings(jax.eval_shape(make), mesh)
    return jax.jit(make, out_shardings=shardings)(), shardings

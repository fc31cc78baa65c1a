"""AdamW and Muon with schedules, clipping and a weight-decay mask, from a config section.

Sources: Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW); Jordan et al. 2024 (Muon); Liu et al.
2025, arXiv:2502.16982 (the factor 0.2 sqrt(max(inputs, outputs)) that lets both share a learning
rate); Hu et al. 2024, arXiv:2404.06395 (warmup-stable-decay).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from memseq import partitioning

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("constant", "cosine", "wsd")


def make_optimizer(
    options: Mapping[str, Any], steps: int
) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimiser and its learning-rate schedule.

    Args:
      options: the config section. `name` "adamw" or "muon"; `learning_rate` the peak; `schedule`,
        `warmup_steps`, `decay_fraction`, `final_fraction` (see `make_schedule`); `b1`, `b2`, `eps`
        of Adam; `momentum` of Muon; `weight_decay`, multiplied by the learning rate; `clip_norm`,
        the largest global gradient norm, 0 for no clipping.
      steps: length of the run in updates.

    Returns:
      (transformation, schedule); the schedule takes the number of updates made so far.

    Raises:
      ValueError: an unknown name or a number out of range.
    """
    _require(options["learning_rate"] > 0, "learning_rate", options["learning_rate"], "> 0")
    _require(options["weight_decay"] >= 0, "weight_decay", options["weight_decay"], ">= 0")
    _require(options["clip_norm"] >= 0, "clip_norm", options["clip_norm"], ">= 0 (0 is off)")
    for name in ("b1", "b2", "momentum"):
        _require(0 <= options[name] < 1, name, options[name], "in [0, 1)")
    schedule = make_schedule(options, steps)
    adamw = optax.adamw(
        schedule,
        b1=options["b1"],
        b2=options["b2"],
        eps=options["eps"],
        weight_decay=options["weight_decay"],
        mask=decay_mask,
    )
    if options["name"] == "adamw":
        core = adamw
    elif options["name"] == "muon":
        core = optax.partition(
            {"matrix": _muon(options, schedule), "other": adamw},
            lambda params: partitioning.map_named(
                lambda name, _: "matrix" if partitioning.is_matrix(name) else "other", params
            ),
        )
    else:
        raise ValueError(
            f"optimizer.name: got {options['name']!r}, expected one of {', '.join(OPTIMIZERS)}"
        )
    if options["clip_norm"] == 0:
        return core, schedule
    return optax.chain(optax.clip_by_global_norm(options["clip_norm"]), core), schedule


def make_schedule(options: Mapping[str, Any], steps: int) -> Schedule:
    """The learning rate after `count` updates.

    All schedules rise linearly over `warmup_steps` (the first update is larger than 0 already).
    Then "constant" stays, "cosine" falls along half a cosine to `final_fraction` of the peak at the
    end, and "wsd" stays until the last `decay_fraction` of the run, then falls linearly to
    `final_fraction`.
    """
    kind, warmup = options["schedule"], options["warmup_steps"]
    peak, final = options["learning_rate"], options["final_fraction"]
    if kind not in SCHEDULES:
        raise ValueError(
            f"optimizer.schedule: got {kind!r}, expected one of {', '.join(SCHEDULES)}"
        )
    _require(
        0 <= warmup < max(steps, 1), "warmup_steps", warmup, f"in [0, {steps}), the run's steps"
    )
    _require(0 <= final <= 1, "final_fraction", final, "in [0, 1]")
    _require(
        0 < options["decay_fraction"] <= 1, "decay_fraction", options["decay_fraction"], "in (0, 1]"
    )
    falling = {
        "constant": 0,
        "cosine": steps - warmup,
        "wsd": min(round(steps * options["decay_fraction"]), steps - warmup),
    }[kind]

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        rate = peak * jnp.minimum(1.0, (count + 1) / max(warmup, 1))
        progress = jnp.clip((count - (steps - falling)) / max(falling, 1), 0.0, 1.0)
        if kind == "cosine":
            rate *= final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        if kind == "wsd":
            rate *= 1 - (1 - final) * progress
        return rate

    return schedule


def decay_mask(params: Any) -> Any:
    """True for every parameter that weight decay applies to, by name."""
    return partitioning.map_named(lambda name, _: partitioning.decays(name), params)


def _muon(options: Mapping[str, Any], schedule: Schedule) -> optax.GradientTransformation:
    """Muon for matrices [..., inputs, outputs]; leading axes (stacked layers) are many matrices."""
    dims = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)

    def match_adam(updates, params):
        del params
        return jax.tree.map(lambda u: u * (0.2 * max(u.shape[-2:]) ** 0.5), updates)

    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=options["momentum"],
            weight_dimension_numbers=lambda updates: jax.tree.map(lambda _: dims, updates),
        ),
        optax.stateless(match_adam),
        optax.add_decayed_weights(options["weight_decay"], mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def _require(holds: bool, name: str, value: Any, expected: str) -> None:
    if not holds:
        raise ValueError(f"optimizer.{name}: got {value}, expected {expected}")

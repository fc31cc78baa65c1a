"""Train one model on one task with every seed and every learning rate, in one program.

A sweep of ``S`` seeds and ``R`` learning rates is ``S * R`` independent trainings. Their examples
are drawn on the device from folded keys and many steps run in one dispatch. A copy whose loss stops
being finite is frozen and reported as failed while the others go on, and seed ``s`` of a sweep has
the initial parameters and the examples that it has alone.

Each seed chooses its learning rate on validation examples and is reported on test examples, so
seeds are independent replicates of the whole procedure, selection included.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memseq.training.copies import Settings, Trainer, batches_of, scorer

Progress = Callable[[int, int, float], None]


@dataclasses.dataclass(frozen=True)
class SeedResult:
    """One seed of a sweep.

    Attributes:
      error: None, or the sentence that says why the seed failed; then the rest is empty or None.
      learning_rate: chosen by `validation`, the micro accuracy on the validation split.
      scores: test scores by the names that the task gives them; None where nothing was counted.
      counts: the (sum, count) that each score is the quotient of.
      by_position: test accuracy at each position; None where nothing is scored.
      curve: (step, mean training loss in nats since the point before).
      copies: one dict a learning rate: learning_rate, validation, scores, failed_at (a step, or
        None).
    """

    seed: int
    error: str | None
    learning_rate: float | None
    validation: float | None
    scores: dict[str, float | None]
    counts: dict[str, tuple[float, float]]
    by_position: list[float | None]
    curve: list[tuple[int, float]]
    copies: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """All seeds, and what they cost together: seconds include tracing and compilation.

    ``parameters`` counts one copy; ``cpu_seconds`` is the time of this process on all its threads.
    """

    seeds: list[SeedResult]
    parameters: int
    copies: int
    wall_seconds: float
    cpu_seconds: float
    compile_seconds: float


def run(
    model,
    task,
    settings: Settings,
    seeds: Sequence[int],
    *,
    also: Mapping[str, Any] = MappingProxyType({}),
    decay_mask: Callable[[Any], Any] | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Train ``model`` on ``task`` for every seed and learning rate, and score every copy.

    Args:
      model: has ``init(key, tokens) -> params`` and ``apply(params, tokens) -> (logits, state)``,
        tokens int32 ``[batch, time]``, logits ``[batch, time, vocabulary]``: a
        `memseq.models.LanguageModel` or your own.
      task: a `memseq.tasks` task; trained and validated as given, tested as its ``eval_variant()``.
      settings: learning rates, steps and optimiser.
      seeds: distinct non-negative integers; each names an initialisation and a stream of training
        examples.
      also: more tests of the trained copies, by name: tasks with the same vocabulary. Their scores
        are reported as "name: score".
      decay_mask: parameters -> tree of booleans, True where weight decay applies; None decays
        everything.
      progress: called as ``progress(steps done, steps, recent mean loss)`` after each dispatch.

    Returns:
      A `SweepResult`. A diverged copy costs at most its own seed.

    Raises:
      ValueError: seeds are missing, repeated or negative.
    """
    seeds = [int(seed) for seed in seeds]
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds: expected distinct integers of at least 0, got {seeds}")
    wall, cpu = time.perf_counter(), time.process_time()
    trainer = Trainer(model, task, settings, decay_mask)
    seed_ids, zero = jnp.asarray(seeds, jnp.int32), jnp.int32(0)

    copies = jax.jit(trainer.start)(seed_ids)
    train = jax.jit(trainer.train, donate_argnums=0).lower(copies, seed_ids, zero, zero).compile()
    compile_seconds = time.perf_counter() - wall
    for start in range(0, settings.steps, settings.steps_per_dispatch):
        stop = min(start + settings.steps_per_dispatch, settings.steps)
        copies = train(copies, seed_ids, jnp.int32(start), jnp.int32(stop))
        if progress is not None:
            progress(stop, settings.steps, _mean_finite(copies.losses[:, :, start:stop]))

    score_with = functools.cache(lambda scored: jax.jit(scorer(model, scored, trainer.over)))
    make = jax.jit(batches_of, static_argnums=(0, 2, 3, 4))

    def score(scored, split: str, examples: int):
        batches = make(scored, trainer.data_key, split, examples, settings.batch)
        return jax.device_get(score_with(scored)(copies.params, batches))

    validation = score(task, "validation", settings.validation_examples)
    test = score(task.eval_variant(), "test", settings.test_examples)
    for name, other in also.items():
        more = score(other, "test", settings.test_examples)["scores"]
        test["scores"] |= {f"{name}: {score_name}": pair for score_name, pair in more.items()}

    failed_at, losses = jax.device_get((copies.failed_at, copies.losses))
    results = []
    for index, seed in enumerate(seeds):
        own = jax.tree.map(lambda leaf: leaf[index], (validation, test, failed_at, losses))  # noqa: B023
        results.append(_seed_result(seed, settings, *own))
    return SweepResult(
        seeds=results,
        parameters=sum(leaf[0, 0].size for leaf in jax.tree.leaves(copies.params)),
        copies=len(seeds) * len(settings.learning_rates),
        wall_seconds=time.perf_counter() - wall,
        cpu_seconds=time.process_time() - cpu,
        compile_seconds=compile_seconds,
    )


def _seed_result(seed, settings, validation, test, failed_at, losses) -> SeedResult:
    """Choose one seed's learning rate on validation. Arrays lead with ``[rates]``."""
    copies = []
    for i, rate in enumerate(settings.learning_rates):
        copy = {"learning_rate": rate, "failed_at": None, "validation": None, "scores": {}}
        if failed_at[i] >= 0:
            copy["failed_at"] = int(failed_at[i])
        elif not (np.isfinite(validation["loss"][i]) and np.isfinite(test["loss"][i])):
            copy["failed_at"] = settings.steps
        else:
            copy["validation"] = _share(validation["scores"]["accuracy"], i)
            copy["scores"] = {name: _share(pair, i) for name, pair in test["scores"].items()}
        copies.append(copy)
    alive = [i for i, copy in enumerate(copies) if copy["failed_at"] is None]
    if not alive:
        steps = ", ".join(f"step {c['failed_at']} at rate {c['learning_rate']:g}" for c in copies)
        error = f"diverged: the loss or its gradient was not finite ({steps})"
        return SeedResult(seed, error, None, None, {}, {}, [], _curve(losses[0]), copies)
    best = max(alive, key=lambda i: (copies[i]["validation"], -validation["loss"][i]))
    hits, counts = (part[best] for part in test["position"])
    return SeedResult(
        seed=seed,
        error=None,
        learning_rate=copies[best]["learning_rate"],
        validation=copies[best]["validation"],
        scores=copies[best]["scores"],
        counts={n: tuple(float(p[best]) for p in pair) for n, pair in test["scores"].items()},
        by_position=[float(h / c) if c else None for h, c in zip(hits, counts, strict=True)],
        curve=_curve(losses[best]),
        copies=copies,
    )


def _share(pair, index: int) -> float | None:
    total, count = (float(part[index]) for part in pair)
    return total / count if count else None


def _curve(losses: np.ndarray, points: int = 60) -> list[tuple[int, float]]:
    """Means over at most ``points`` equal stretches, up to where the copy failed."""
    edges = np.unique(np.linspace(0, len(losses), min(points, len(losses)) + 1).astype(int))
    means = [(int(b), float(np.mean(losses[a:b]))) for a, b in itertools.pairwise(edges)]
    return [(step, loss) for step, loss in means if np.isfinite(loss)]


def _mean_finite(losses: jax.Array) -> float:
    values = np.asarray(losses)
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")

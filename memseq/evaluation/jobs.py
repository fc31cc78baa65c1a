"""What the recall job consists of: one training program for each memory on each task.

A job trains one memory on one task with all its seeds and yields one row a seed. A row is a flat
JSON object, the only thing that reports are made of; `memseq.evaluation.results` says what it
holds.
"""

import dataclasses
import datetime
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from memseq import tasks
from memseq.config import nearest, provenance
from memseq.layers import REGISTRY
from memseq.models.build import language_model
from memseq.pallas_kernels.common.checks import check_count
from memseq.training import sweep
from memseq.training.copies import Settings
from memseq.training.optimizers import decay_mask

Row = dict[str, Any]
WORDS = ("title", "question", "headline")  # keys of a config that change no number


@dataclasses.dataclass(frozen=True)
class Job:
    """One memory on one task. `seeds` are those still to do."""

    memory: str
    task: str
    seeds: tuple[int, ...]


def plan(config: ConfigDict, seeds: int, rows: Iterable[Mapping[str, Any]] = ()) -> list[Job]:
    """The jobs of a run, tasks in the order of `config.on`, memories in that of `config.compare`.

    `rows` are finished already: a seed with a row whose settings are the same is left out.

    Raises:
      ValueError: a label that has no section, or a row made with other settings.
    """
    check_count("seeds", seeds, 1)
    _check_labels("compare", config.compare, config.memories)
    _check_labels("on", config.on, config.tasks)
    done: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        if row["kind"] == "trained":
            done.setdefault((row["task"], row["memory"]), set()).add(row["seed"])
            known = row["memory"] in config.compare and row["task"] in config.on
            if known and row["config_hash"] != config_hash(config, row["memory"], row["task"]):
                raise ValueError(
                    f"the results of {row['memory']} on {row['task']} that are there were made "
                    "with other settings; give another --out"
                )
    jobs = []
    for task in config.on:
        for memory in config.compare:
            left = sorted(set(range(seeds)) - done.get((task, memory), set()))
            if left:
                jobs.append(Job(memory, task, tuple(left)))
    return jobs


def _check_labels(key: str, labels: Sequence[str], sections: Mapping[str, Any]) -> None:
    if len(set(labels)) != len(labels):
        raise ValueError(f"config key {key!r} names something twice: {', '.join(labels)}")
    for label in labels:
        if label not in sections:
            raise ValueError(
                f"config key {key!r} names {label!r}; did you mean {nearest(label, sections)!r}?"
            )


def build(config: ConfigDict, memory: str, task: str):
    """The model, the task, its extra tests by name, and the training settings of one job.

    Raises:
      ValueError: whatever the task, the layer or the settings do not accept.
    """
    own, on = config.memories[memory], config.tasks[task]
    made = tasks.get(on.name, variant=on.variant, **on.options.to_dict())
    model = config.model.to_dict()
    model["pattern"] = (*model.pop("before"), own.layer)
    model["mixers"] = {own.layer: own.options.to_dict()}
    model["vocab_size"] = made.vocab_size
    settings = Settings(**{**config.training.to_dict(), **on.training.to_dict()})
    also = {name: tasks.get(on.name, variant=name, **on.options.to_dict()) for name in on.also}
    return language_model(ConfigDict(model)), made, also, settings


def score_names(task) -> list[str]:
    """The names of the scores that the test of a task counts."""
    tested = task.eval_variant()

    def scores(key):
        batch = tested.batch(key, "test", 0, 1)
        return tested.scores(batch["targets"], batch)

    return sorted(jax.eval_shape(scores, jax.random.key(0)))


def settings_of(config: ConfigDict, memory: str, task: str) -> dict[str, Any]:
    """Everything that the numbers of one job depend on, seeds aside."""
    return {
        "model": config.model.to_dict(),
        "memory": {k: v for k, v in config.memories[memory].to_dict().items() if k not in WORDS},
        "task": {k: v for k, v in config.tasks[task].to_dict().items() if k not in WORDS},
        "training": config.training.to_dict(),
    }


def config_hash(config: ConfigDict, memory: str, task: str) -> str:
    """Twelve hexadecimal digits that name `settings_of`."""
    text = json.dumps(settings_of(config, memory, task), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def state_bytes(model, context: int) -> int:
    """Bytes of one sequence's state after `context` tokens, counted from the state's own arrays."""
    state = jax.eval_shape(lambda: model.init_state(1, context=context))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def run(config: ConfigDict, job: Job, progress: sweep.Progress | None = None) -> list[Row]:
    """Train one job and return a row for each of its seeds; an exception makes them rows that say
    so.
    """
    common = _common(config, job)
    try:
        model, task, also, settings = build(config, job.memory, job.task)
        common |= _about(model, task, settings)
        found = sweep.run(
            model, task, settings, job.seeds, also=also, decay_mask=decay_mask, progress=progress
        )
    except Exception as error:  # one memory's defect must not cost the others their results
        return failed(config, job, f"{type(error).__name__}: {error}", common)
    common |= {
        "finished": _now(),
        "parameters": found.parameters,
        "program_copies": found.copies,
        "program_wall_seconds": round(found.wall_seconds, 3),
        "program_cpu_seconds": round(found.cpu_seconds, 3),
        "program_compile_seconds": round(found.compile_seconds, 3),
        # a seed's share of its program, so that the rows of a run add up to its cost
        "wall_seconds": round(found.wall_seconds / len(job.seeds), 3),
        "cpu_seconds": round(found.cpu_seconds / len(job.seeds), 3),
    }
    return [
        {
            **common,
            "seed": result.seed,
            "status": "ok" if result.error is None else "failed",
            "error": result.error,
            "accuracy": result.scores.get("accuracy"),
            "scores": result.scores,
            "counts": result.counts,
            "validation_accuracy": result.validation,
            "learning_rate": result.learning_rate,
            "by_position": result.by_position,
            "curve": result.curve,
            "sweep": result.copies,
        }
        for result in found.seeds
    ]


def failed(config: ConfigDict, job: Job, error: str, common: Row | None = None) -> list[Row]:
    """The rows of a job that could not be run to its end."""
    common = common or _common(config, job)
    empty = {
        "accuracy": None,
        "scores": {},
        "counts": {},
        "by_position": [],
        "curve": [],
        "sweep": [],
    }
    return [
        {
            **common,
            **empty,
            "finished": _now(),
            "seed": seed,
            "status": "failed",
            "error": " ".join(error.split()),
        }
        for seed in job.seeds
    ]


def _common(config: ConfigDict, job: Job) -> Row:
    own = config.memories[job.memory]
    return {
        "kind": "trained",
        "memory": job.memory,
        "title": own.title,
        "layer": own.layer,
        "shape": getattr(REGISTRY.get(own.layer), "MEMORY", ""),
        "paper": getattr(REGISTRY.get(own.layer), "PAPER", ""),
        "task": job.task,
        "config_hash": config_hash(config, job.memory, job.task),
        **machine(),
    }


def _about(model, task, settings: Settings) -> Row:
    tested = task.eval_variant()
    return {
        "task_description": task.describe(),
        "train_length": task.length,
        "test_length": tested.length,
        "chance": tested.chance,
        "ceiling": tested.ceiling,
        "state_bytes": state_bytes(model, tested.length),
        "steps": settings.steps,
        "batch": settings.batch,
        "test_examples": settings.test_examples,
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def machine() -> Row:
    """Code revision, versions and device, for every row."""
    about = provenance()
    return {
        "revision": about["revision"],
        "versions": {"python": about["python"], **about["versions"]},
        "device": f"{about['platform']}: {about['device']}",
        "host": f"{platform.system()} {platform.machine()}",
    }

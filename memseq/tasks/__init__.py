"""Synthetic memory tasks: pure functions of a PRNG key, each with its chance level and its ceiling.

    task = memseq.tasks.get("rewrite", variant="tiny")
    batch = task.batch(jax.random.key(0), "train", index=0, batch_size=64)
    scores = task.scores(model_logits, batch)      # name -> (sum, count)

To add a task, write one file with a `Task` in it (`base.py` says what it has, `parity.py` is the
shortest) and add its line to `REGISTRY`. `memseq tasks show NAME` prints an annotated example.
"""

from memseq.tasks import base, capacity
from memseq.tasks.base import SPLITS, Task
from memseq.tasks.delayed_match import DelayedMatch
from memseq.tasks.induction_heads import InductionHeads
from memseq.tasks.mqar import MQAR
from memseq.tasks.needle import Needle
from memseq.tasks.parity import Parity
from memseq.tasks.rewrite import Rewrite
from memseq.tasks.selective_copying import SelectiveCopying
from memseq.tasks.words import Words

REGISTRY: dict[str, type[Task]] = {
    "mqar": MQAR,
    "rewrite": Rewrite,
    "needle": Needle,
    "parity": Parity,
    "words": Words,
    "delayed_match": DelayedMatch,
    "selective_copying": SelectiveCopying,
    "induction_heads": InductionHeads,
}

# Closed-form probes of a memory rule: no training and no examples, rows of numbers from
# `table(variant)`.
PROBES = {"capacity": capacity}

__all__ = ["PROBES", "REGISTRY", "SPLITS", "Task", "get"]


def get(name: str, variant: str | None = None, **options) -> Task:
    """The task `name` with the sizes of a preset and, if asked for, some fields changed.

    Args:
        name: a name in `REGISTRY`.
        variant: a preset of that task; by default its first, "tiny".
        **options: fields of the task's dataclass.

    Raises:
        ValueError: for a name, variant or option that does not exist (it names the nearest one),
            or for settings that cannot be, such as a length too short for the pairs.
    """
    if name in PROBES:
        raise ValueError(
            f"name: {name!r} has no examples to train on; its numbers come from "
            f"memseq.tasks.{name}.table()"
        )
    base.check_name("name", name, REGISTRY)
    return REGISTRY[name].preset(variant, **options)

"""The keys of a recall config, with the values that its files start from."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, config_dict

# Keys of a task's section that a config may leave out.
TASK = {"variant": "tiny", "options": {}, "also": (), "headline": "accuracy", "training": {}}
OPEN = ("options", "training")  # sections that take new keys on the command line


def recall_config(
    memories: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, Mapping[str, Any]],
    claims: Sequence[str] = (),
) -> ConfigDict:
    """A config that compares `memories` on `tasks`, in their order.

    Args:
      memories: label -> `title`, `layer` (a name in `memseq.layers.REGISTRY`), `options` of its
        constructor.
      tasks: label -> `title`, `question` (a few words for figures), `name` in
        `memseq.tasks.REGISTRY`, and where they differ from `TASK`: `variant` and `options` of the
        task, `also` (presets that the trained models are tested on besides), `headline` (the score
        that ranks memories) and `training` (what differs from `config.training`).
      claims: what the run should show, see `memseq.evaluation.verdict.parse_claim`.
    """
    config = ConfigDict()
    config.compare = tuple(memories)
    config.on = tuple(tasks)
    config.memories = {label: _section(memory) for label, memory in memories.items()}
    config.tasks = {label: _section({**TASK, **task}) for label, task in tasks.items()}
    config.claims = tuple(claims)
    config.capacity = ""  # preset of memseq.tasks.capacity to put beside them; empty for none
    config.workers = 0  # processes; 0 is one for each core

    config.model = ConfigDict()
    config.model.features = 64
    config.model.repeats = 1
    config.model.before = ()  # layers in front of each memory, with their default options
    config.model.channel = ""  # no channel layer: what is measured is the memory
    config.model.hidden_ratio = 4.0
    config.model.tie_embeddings = False
    config.model.remat = "none"
    config.model.implementation = "auto"
    config.model.dtype = ""
    config.model.param_dtype = "float32"

    config.training = ConfigDict()  # see memseq.training.copies.Settings
    config.training.learning_rates = (5e-3, 1e-2)  # each seed takes its best on validation
    config.training.steps = 500
    config.training.batch = 32
    config.training.warmup = 50
    config.training.final_fraction = 0.02
    config.training.weight_decay = 0.01
    config.training.clip = 1.0
    config.training.beta1 = 0.9
    config.training.beta2 = 0.999
    config.training.validation_examples = 256
    config.training.test_examples = 512
    config.training.steps_per_dispatch = 25
    config.training.data_seed = 0
    config.training.copies_together = config_dict.placeholder(bool)  # None: by the platform
    return config


def _section(values: Mapping[str, Any]) -> ConfigDict:
    return ConfigDict(
        {
            key: ConfigDict(value, type_safe=False) if key in OPEN else value
            for key, value in values.items()
        }
    )

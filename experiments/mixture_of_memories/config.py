"""A mixture of memories beside one memory of the same total state, on associative recall.

    memseq recall --config=experiments/mixture_of_memories/config.py --seeds=3

One layer of Gated DeltaNet on a ladder of MQAR that is short enough for minutes on a CPU: 2, 4 or 8
pairs of 16 keys and 16 values in 32 tokens, zeros for filler, with memories of two heads of 6 x 6.

- `shared_only`: one memory of all tokens, which is the base layer;
- `expanded`: one memory of all tokens with the mixture's state bytes;
- `mixture`: four memories, two a token, and one of all tokens (Du et al. 2025, arXiv:2502.13685);
- `two_shared`: two memories of all tokens with projections of their own, and nothing to choose.

Variants: "smoke" (2 steps, the mixture alone).
"""

from memseq.config import choose_variant
from memseq.evaluation.settings import recall_config

BASE = {"heads": 2, "key_dim": 6, "value_dim": 6, "conv_width": 2, "chunk_size": 16}
OF_MIXTURE = ("heads", "chunk_size")  # what a mixture passes on to its base layer


def mixture(**options):
    own = {name: BASE[name] for name in OF_MIXTURE}
    base = {name: value for name, value in BASE.items() if name not in OF_MIXTURE}
    return {**own, "options": base, "page_size": 32, **options}


MEMORIES = {
    "shared_only": {
        "title": "One memory of all tokens",
        "layer": "gated_delta_net",
        "options": BASE,
    },
    "expanded": {
        "title": "One memory of the mixture's bytes",
        "layer": "gated_delta_net",
        "options": {**BASE, "key_dim": 15, "value_dim": 15},
    },
    "mixture": {
        "title": "Mixture, 2 of 4 and one of all tokens",
        "layer": "mixture_of_memories",
        "options": mixture(memories=4, top_k=2),
    },
    "two_shared": {
        "title": "Two memories of all tokens",
        "layer": "mixture_of_memories",
        "options": mixture(memories=1, top_k=1),
    },
}

TASKS = {
    "mqar": {
        "title": "MQAR",
        "question": "is the value of every key read back?",
        "name": "mqar",
        "options": {
            "vocab_size": 32,
            "cells": ((32, 2, 1), (32, 4, 1), (32, 8, 1)),
            "noise": "zero",
        },
        "headline": "32x8",
    },
}

VARIANTS = {
    "smoke": {
        "compare": ("mixture",),
        "model.features": 16,
        "training.steps": 2,
        "training.batch": 4,
        "training.warmup": 1,
        "training.validation_examples": 4,
        "training.test_examples": 8,
    },
}


def get_config(variant=""):
    config = recall_config(MEMORIES, TASKS)
    config.workers = 1
    config.training.learning_rates = (5e-3,)
    config.training.copies_together = True  # arrays are small: what an operation costs counts
    config.training.steps = 500
    return choose_variant(config, variant, VARIANTS)

"""Multi-query associative recall, the short ladder: 4, 8 or 16 pairs in 64 tokens.

    memseq recall --config=configs/recall/mqar.py:gated_delta_net --seeds=3
    memseq recall --config=configs/recall/mqar.py:matrix --seeds=3

Filler between the queries is random, as in zoology, so it can look like a pair. At this size the
task is to tell memories with a matrix, which should all come close to 1, from those without one; it
does not tell the matrix memories from each other (`configs/recall/main.py` does).

In front of each memory stands a gated convolution, as in Based, which brings a key to its value,
and a memory has one head: with four of them, or without the convolution, DeltaNet learned several
times more slowly (`experiments/mqar`, which also has what came out, and what was not run).

Time: 45 to 60 CPU-seconds for one seed at one learning rate, RWKV-7 105; there are two rates.

Variants: the name of a memory (that one alone), "matrix" (the matrix memories, with a claim for
those that were seen to meet it), "smoke" (2 steps).
"""

from memseq.config import choose_variant
from memseq.evaluation.settings import recall_config

MATRIX = {"heads": 1, "key_dim": 16, "value_dim": 64, "conv_width": 0, "chunk_size": 16}

# memories that are networks: 16 -> 32 -> 16 a head, trained in chunks of 16
NETWORK = {
    "heads": 4,
    "key_dim": 16,
    "value_dim": 16,
    "expansion": 2,
    "conv_width": 0,
    "update_chunk": 16,
    "max_segments": 1,
}

# Layer of `memseq.layers.REGISTRY` -> title and options of its constructor.
LAYERS = {
    "softmax_attention": ("Softmax attention (RoPE)", {"heads": 1, "head_dim": 64}),
    "linear_attention": ("Linear attention", MATRIX),
    "retention": ("Retention", MATRIX),
    "gated_linear_attention": ("Gated linear attention", MATRIX),
    "delta_net": ("DeltaNet", MATRIX),
    "gated_delta_net": ("Gated DeltaNet", MATRIX),
    "kimi_delta_attention": ("Kimi Delta Attention", MATRIX),
    "delta_product": ("DeltaProduct, two steps", MATRIX),
    "rwkv7": ("RWKV-7", {"heads": 1, "chunk_size": 16}),  # a matrix 64 x 64
    "mesa_net": ("MesaNet", {**MATRIX, "iterations": 16}),
    "mamba2": (
        "Mamba-2",
        {"heads": 4, "expand": 1, "state_dim": 16, "conv_width": 0, "chunk_size": 16},
    ),
    "titans_lmm": ("Titans LMM", NETWORK),
    "yaad": ("Yaad", NETWORK),
}

MEMORIES = {
    layer: {"title": title, "layer": layer, "options": options}
    for layer, (title, options) in LAYERS.items()
}

TASKS = {
    "mqar": {
        "title": "MQAR",
        "question": "is the value of every key read back?",
        "name": "mqar",
    },
}

NOT_MATRIX = ("softmax_attention", "titans_lmm", "yaad")
MATRICES = tuple(layer for layer in LAYERS if layer not in NOT_MATRIX)
# of three seeds' median
SEEN = ("delta_net", "gated_delta_net", "delta_product", "rwkv7")

VARIANTS = {layer: {"compare": (layer,)} for layer in LAYERS} | {
    "matrix": {
        "compare": MATRICES,
        "claims": tuple(f"mqar 64x16: {layer} >= 0.85" for layer in SEEN),
    },
    "smoke": {
        "compare": ("linear_attention",),
        "model.features": 16,
        "training.learning_rates": (3e-3,),
        "training.steps": 2,
        "training.batch": 4,
        "training.warmup": 1,
        "training.validation_examples": 4,
        "training.test_examples": 8,
    },
}


def get_config(variant=""):
    config = recall_config(MEMORIES, TASKS)
    config.model.before = ("gated_convolution",)
    config.training.learning_rates = (3e-3, 5e-3)
    config.training.steps = 700
    config.training.batch = 64
    return choose_variant(config, variant, VARIANTS)

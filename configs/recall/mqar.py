"""Multi-query associative recall, the short ladder: 4, 8 or 16 pairs in 64 tokens.

    memseq recall --config=configs/recall/mqar.py:gated_delta_net --seeds=3
    memseq recall --config=configs/recall/mqar.py:matrix --seeds=3

Filler between the queries is random, as in zoology, so it can look like a pair. At this size the
task tells memories with a matrix, which all come close to 1, from those without one; it does not
tell the matrix memories from each other (`configs/recall/main.py` does).

Time on two cores: about a minute a memory for one seed.

Variants: the name of a memory (that one alone), "matrix" (the matrix memories, with a claim for
each, on half the vocabulary and zeros for filler, which a CPU learns in 450 steps:
`experiments/mqar` has what came out), "smoke" (2 steps).
"""

from memseq.config import choose_variant
from memseq.evaluation.settings import recall_config

MATRIX = {
    "heads": 4,
    "key_dim": 16,
    "value_dim": 16,
    "conv_width": 2,  # a key and its value are neighbours
    "output_gate": True,
    "chunk_size": 16,
}

# memories that are networks: 16 -> 32 -> 16 a head, trained in chunks of 16
NETWORK = {
    "heads": 4,
    "key_dim": 16,
    "value_dim": 16,
    "expansion": 2,
    "conv_width": 2,
    "update_chunk": 16,
    "max_segments": 1,
}

# Layer of `memseq.layers.REGISTRY` -> title and options of its constructor.
LAYERS = {
    "softmax_attention": (
        "Softmax attention (RoPE)",
        {"heads": 4, "head_dim": 16, "conv_width": 2, "output_gate": True},
    ),
    "linear_attention": ("Linear attention", MATRIX),
    "retention": ("Retention", MATRIX),
    "gated_linear_attention": ("Gated linear attention", MATRIX),
    "delta_net": ("DeltaNet", MATRIX),
    "gated_delta_net": ("Gated DeltaNet", MATRIX),
    "kimi_delta_attention": ("Kimi Delta Attention", MATRIX),
    "delta_product": ("DeltaProduct, two steps", MATRIX),
    "rwkv7": ("RWKV-7", {"heads": 4, "chunk_size": 16}),
    "mesa_net": ("MesaNet", {**MATRIX, "iterations": 16}),
    "mamba2": (
        "Mamba-2",
        {"heads": 4, "expand": 1, "state_dim": 16, "conv_width": 2, "chunk_size": 16},
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
        "training": {"steps": 700},
    },
}

NOT_MATRIX = ("softmax_attention", "titans_lmm", "yaad")
MATRICES = tuple(layer for layer in LAYERS if layer not in NOT_MATRIX)

VARIANTS = {layer: {"compare": (layer,)} for layer in LAYERS} | {
    "matrix": {
        "compare": MATRICES,
        "claims": tuple(f"mqar 64x16: {layer} >= 0.85" for layer in MATRICES),
        "training.learning_rates": (5e-3,),
        "tasks.mqar.options.vocab_size": 64,
        "tasks.mqar.options.noise": "zero",
        "tasks.mqar.training.steps": 450,
    },
    "smoke": {
        "compare": ("linear_attention",),
        "model.features": 16,
        "training.learning_rates": (3e-3,),
        "training.batch": 4,
        "training.warmup": 1,
        "training.validation_examples": 4,
        "training.test_examples": 8,
        "tasks.mqar.training.steps": 2,
    },
}


def get_config(variant=""):
    return choose_variant(recall_config(MEMORIES, TASKS), variant, VARIANTS)

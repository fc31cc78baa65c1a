"""RWKV-7 of 0.4B parameters.

What: the second smallest model of Peng et al. 2025, arXiv:2503.14456: 24 layers of width 1024 with
heads of 64, each with its channel mixing, which has a state and so a block of its own.

    memseq train --config=configs/lm/rwkv7_04b.py --workdir=runs/rwkv7_04b
    memseq train --config=configs/lm/rwkv7_04b.py:smoke --workdir=runs/smoke

451M parameters, as the paper's. The vocabulary has the size of the paper's, so that the model does;
the text is that of configs/lm/bytes.py, which uses 257 entries of it. Training is the usual one at
this size: half a million tokens a step, AdamW, a cosine.
"""

from pathlib import Path

from ml_collections import ConfigDict

from memseq import config as configs


def get_config(variant: str = "") -> ConfigDict:
    config = configs.load(f"{Path(__file__).with_name('bytes.py')}:{variant}")
    config.model.pattern = ("rwkv7", "rwkv_channel_mix")
    config.model.channel = ""
    config.model.mixers = ConfigDict(
        {
            "rwkv7": {
                "heads": 16,
                "decay_rank": 64,
                "rate_rank": 64,
                "value_rank": 32,
                "gate_rank": 128,
            }
        },
        type_safe=False,
    )
    if variant:  # a variant of bytes.py keeps its sizes
        return config
    config.model.update(
        vocab_size=65536,
        features=1024,
        repeats=24,
        tie_embeddings=False,
        dtype="bfloat16",
        remat="dots",
    )
    config.train.update(steps=190_000, batch=256, length=2048, microbatches=16)
    config.optimizer.update(
        name="adamw", learning_rate=6e-4, schedule="cosine", warmup_steps=1024, final_fraction=0.1
    )
    return config

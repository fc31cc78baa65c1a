"""Gated DeltaNet of 1.3B parameters.

What: the larger model of Yang et al. 2025, arXiv:2412.06464: 21 layers of width 2048 with six heads
of 256-wide keys and 512-wide values, SwiGLU.

    memseq train --config=configs/lm/gated_deltanet_1b.py --workdir=runs/gated_deltanet_1b
    memseq train --config=configs/lm/gated_deltanet_1b.py:smoke --workdir=runs/smoke

1.39B parameters, 66M of them the logits' own matrix. The vocabulary has the size of the paper's, so
that the model does; the text is that of configs/lm/bytes.py, which uses 257 entries of it. Training
is the usual one at this size: half a million tokens a step, AdamW, a cosine.
"""

from pathlib import Path

from ml_collections import ConfigDict

from memseq import config as configs


def get_config(variant: str = "") -> ConfigDict:
    config = configs.load(f"{Path(__file__).with_name('bytes.py')}:{variant}")
    config.model.pattern = ("gated_delta_net",)
    config.model.mixers = ConfigDict(
        {"gated_delta_net": {"heads": 6, "key_dim": 256, "value_dim": 512}}, type_safe=False
    )
    if variant:  # a variant of bytes.py keeps its sizes
        return config
    config.model.update(
        vocab_size=32000,
        features=2048,
        repeats=21,
        hidden_ratio=4.125,
        tie_embeddings=False,
        dtype="bfloat16",
        remat="dots",
    )
    config.train.update(steps=190_000, batch=256, length=2048, microbatches=16)
    config.optimizer.update(
        name="adamw", learning_rate=4e-4, schedule="cosine", warmup_steps=1024, final_fraction=0.1
    )
    return config

"""Gated linear attention of 340M parameters.

What: the smaller model of Yang et al. 2024, arXiv:2312.06635: 24 layers of width 1024 with four
heads, keys of half the width, SwiGLU.

    memseq train --config=configs/lm/gla_340m.py --workdir=runs/gla_340m
    memseq train --config=configs/lm/gla_340m.py:smoke --workdir=runs/smoke

341M parameters. The vocabulary has the size of the paper's, so that the model does; the text is
that of configs/lm/bytes.py, which uses 257 entries of it. Training is the usual one at this size:
half a million tokens a step, AdamW, a cosine.
"""

from pathlib import Path

from ml_collections import ConfigDict

from memseq import config as configs


def get_config(variant: str = "") -> ConfigDict:
    config = configs.load(f"{Path(__file__).with_name('bytes.py')}:{variant}")
    config.model.pattern = ("gated_linear_attention",)
    config.model.mixers = ConfigDict({"gated_linear_attention": {"heads": 4}}, type_safe=False)
    if variant:  # a variant of bytes.py keeps its sizes
        return config
    config.model.update(
        vocab_size=32000,
        features=1024,
        repeats=24,
        hidden_ratio=4.125,
        dtype="bfloat16",
        remat="dots",
    )
    config.train.update(steps=28_672, batch=256, length=2048, microbatches=16)
    config.optimizer.update(
        name="adamw", learning_rate=3e-4, schedule="cosine", warmup_steps=1024, final_fraction=0.1
    )
    return config

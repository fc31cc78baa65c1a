"""Based of 341M parameters.

What: linear attention with the exponential's second-order series, in turn with softmax attention in
a window of 64: Arora et al. 2024, arXiv:2402.18668. 24 layers of width 1024 with 16 heads of
16-wide keys. The paper has layers of gated convolution between them; here each linear attention has
a short convolution of width 3.

    memseq train --config=configs/lm/based.py --workdir=runs/based
    memseq train --config=configs/lm/based.py:smoke --workdir=runs/smoke

341M parameters; the paper's have 363M. The vocabulary has the size of the paper's, so that the
model does; the text is that of configs/lm/bytes.py, which uses 257 entries of it. Training is the
usual one at this size: half a million tokens a step, AdamW, a cosine.
"""

from pathlib import Path

from ml_collections import ConfigDict

from memseq import config as configs


def get_config(variant: str = "") -> ConfigDict:
    config = configs.load(f"{Path(__file__).with_name('bytes.py')}:{variant}")
    config.model.pattern = ("based", "softmax_attention")
    config.model.mixers = ConfigDict(
        {
            "based": {"heads": 16, "conv_width": 3},
            "softmax_attention": {"heads": 16, "window": 64},
        },
        type_safe=False,
    )
    if variant:  # a variant of bytes.py keeps its sizes
        return config
    config.model.update(
        vocab_size=50304,
        features=1024,
        repeats=12,
        hidden_ratio=4.125,
        dtype="bfloat16",
        remat="dots",
    )
    config.train.update(steps=20_000, batch=256, length=2048, microbatches=16)
    config.optimizer.update(
        name="adamw", learning_rate=8e-4, schedule="cosine", warmup_steps=1024, final_fraction=0.1
    )
    return config

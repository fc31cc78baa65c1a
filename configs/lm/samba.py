"""Samba: Mamba and sliding-window attention by turns.

What: Ren et al. 2024, arXiv:2406.07522: Mamba, SwiGLU, attention over a window of 2,048, SwiGLU,
again and again; the model of 1.3B: eighteen layers of width 2304, nine of each.

    memseq train --config=configs/lm/samba.py --workdir=runs/samba
    memseq train --config=configs/lm/samba.py:smoke --workdir=runs/smoke

The vocabulary and the training are those of gla_340m; the text is that of configs/lm/bytes.py.
"""

from pathlib import Path

from ml_collections import ConfigDict

from memseq import config as configs


def get_config(variant: str = "") -> ConfigDict:
    config = configs.load(f"{Path(__file__).with_name('gla_340m.py')}:{variant}")
    heads, window = (4, 32) if variant else (18, 2048)
    config.model.pattern = ("mamba", "sliding_window_attention")
    config.model.mixers = ConfigDict(
        {"mamba": {}, "sliding_window_attention": {"heads": heads, "window": window}},
        type_safe=False,
    )
    config.model.repeats = 1 if variant else 9
    if not variant:
        config.model.features = 2304
    return config

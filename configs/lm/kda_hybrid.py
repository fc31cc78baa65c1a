"""Kimi Delta Attention and full attention, three layers to one.

What: the layout of Kimi Linear (Kimi Team 2025, arXiv:2510.26692, section 4) at the size of the
other presets: 24 layers of width 1024, full attention without positions, which the delta layers
supply, as every fourth. The paper's own models have mixtures of experts as channel layers.

    memseq train --config=configs/lm/kda_hybrid.py --workdir=runs/kda_hybrid
    memseq train --config=configs/lm/kda_hybrid.py:smoke --workdir=runs/smoke

The vocabulary and the training are those of gla_340m; the text is that of configs/lm/bytes.py.
"""

from pathlib import Path

from ml_collections import ConfigDict

from memseq import config as configs


def get_config(variant: str = "") -> ConfigDict:
    config = configs.load(f"{Path(__file__).with_name('gla_340m.py')}:{variant}")
    heads, head_dim = (4, 16) if variant else (8, 128)
    sizes = {"heads": heads, "key_dim": head_dim, "value_dim": head_dim}
    config.model.pattern = ("kimi_delta_attention",) * 3 + ("softmax_attention",)
    config.model.mixers = ConfigDict(
        {
            "kimi_delta_attention": sizes,
            "softmax_attention": {"heads": heads, "head_dim": head_dim, "rope": False},
        },
        type_safe=False,
    )
    config.model.repeats = 1 if variant else 6
    return config

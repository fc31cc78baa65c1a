"""Gated DeltaNet and attention, three layers to one, with any of the attentions there are.

What: the layout of most deployed hybrids (three recurrent layers, one of attention) at the size of
the other presets: 24 layers of width 1024. Yang et al. 2025, arXiv:2412.06464, section 4, mix Gated
DeltaNet with windows; the variants put other attentions in the same places.

    memseq train --config=configs/lm/hybrid.py --workdir=runs/hybrid
    memseq train --config=configs/lm/hybrid.py:path_attention --workdir=runs/hybrid_path

Variants: an attention of `PARTNERS`; "smoke" (a tiny model, two steps). Another ratio is another
pattern, such as one to one:

    --config.model.pattern="('gated_delta_net', 'softmax_attention')" --config.model.repeats=12

The vocabulary and the training are those of gla_340m; the text is that of configs/lm/bytes.py.
"""

from pathlib import Path

from ml_collections import ConfigDict

from memseq import config as configs
from memseq.pallas_kernels.common.checks import check_choice

# Attention by layer name -> options beside `heads`.
PARTNERS = {
    "softmax_attention": {"rope": False},  # the delta layers supply positions
    "sliding_window_attention": {"window": 2048},
    "forgetting_attention": {},
    "path_attention": {},
    "differential_attention": {},
}


def get_config(variant: str = "") -> ConfigDict:
    check_choice("variant", variant, ["", "smoke", *PARTNERS])
    small = variant == "smoke"
    config = configs.load(f"{Path(__file__).with_name('gla_340m.py')}:{variant if small else ''}")
    partner = variant if variant in PARTNERS else "softmax_attention"
    heads = 4 if small else 8
    config.model.pattern = ("gated_delta_net",) * 3 + (partner,)
    config.model.mixers = ConfigDict(
        {"gated_delta_net": {"heads": heads}, partner: {"heads": heads, **PARTNERS[partner]}},
        type_safe=False,
    )
    config.model.repeats = 1 if small else 6
    return config

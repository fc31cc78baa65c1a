"""Sequence layers with associative memory: Flax Linen modules over `memseq.pallas_kernels`.

layer = GatedDeltaNet(features=512, heads=4)
params = layer.init(key, x)                          # x [batch, time, features]
y, state = layer.apply(params, x)
y, state = layer.apply(params, more, state)          # goes on where it stopped
"""

from memseq.layers.attention.differential_attention import DifferentialAttention
from memseq.layers.attention.path_attention import PathAttention
from memseq.layers.attention.softmax_attention import (
    ForgettingAttention,
    SlidingWindowAttention,
    SoftmaxAttention,
)
from memseq.layers.common.base import SequenceLayer
from memseq.layers.common.context_parallel import context_parallel
from memseq.layers.convolution.gated_convolution import GatedConvolution
from memseq.layers.convolution.rwkv_channel_mix import RWKVChannelMix
from memseq.layers.delta_rule.comba import Comba
from memseq.layers.delta_rule.delta_net import DeltaNet
from memseq.layers.delta_rule.delta_product import DeltaProduct, GatedDeltaProduct
from memseq.layers.delta_rule.gated_delta_net import GatedDeltaNet
from memseq.layers.delta_rule.kimi_delta_attention import GatedDeltaNet2, KimiDeltaAttention
from memseq.layers.delta_rule.longhorn import Longhorn
from memseq.layers.delta_rule.momentum_delta_net import MomentumDeltaNet
from memseq.layers.delta_rule.oja_rule import OjaRule
from memseq.layers.delta_rule.preconditioned import (
    PreconditionedGatedDeltaNet,
    PreconditionedKimiDeltaAttention,
)
from memseq.layers.delta_rule.rwkv7 import RWKV7
from memseq.layers.hopfield.binary import BinaryMemory, ClassicalHopfield
from memseq.layers.hopfield.blocks import HopfieldDecoderBlock, HopfieldEncoderBlock
from memseq.layers.hopfield.dense_associative_memory import DenseAssociativeMemory
from memseq.layers.hopfield.energy_transformer import EnergyTransformerBlock
from memseq.layers.hopfield.feature_map import UHopfield
from memseq.layers.hopfield.hopfield import Hopfield
from memseq.layers.hopfield.learned_patterns import HopfieldLookup, HopfieldPooling
from memseq.layers.hopfield.random_features import RandomFeatureMemory
from memseq.layers.hopfield.sparse import (
    GeneralizedSparseHopfield,
    SparseHopfield,
    STanHopBlock,
)
from memseq.layers.linear_attention.cumulative_softmax import ABC, LightNet
from memseq.layers.linear_attention.gated_linear_attention import GatedLinearAttention
from memseq.layers.linear_attention.gated_slot_attention import GatedSlotAttention
from memseq.layers.linear_attention.hgrn2 import HGRN2
from memseq.layers.linear_attention.linear_attention import Based, LinearAttention
from memseq.layers.linear_attention.retention import LightningAttention, Retention
from memseq.layers.linear_attention.rwkv6 import RWKV6
from memseq.layers.linear_attention.simple_gated_linear_attention import (
    SimpleGatedLinearAttention,
)
from memseq.layers.mixture.mixture_of_memories import MixtureOfMemories
from memseq.layers.neural_memory.atlas import OmegaNet
from memseq.layers.neural_memory.miras import Memora, Moneta, Yaad
from memseq.layers.neural_memory.neural_memory import NeuralMemory
from memseq.layers.neural_memory.titans import TitansLMM, TitansMAG, TitansMAL
from memseq.layers.neural_memory.titans_mac import TitansMAC
from memseq.layers.neural_memory.ttt import TTTMLP, TTTLinear
from memseq.layers.readout.log_linear import LogLinearGatedDeltaNet, LogLinearMamba2
from memseq.layers.readout.mesa_net import MesaNet
from memseq.layers.readout.prefix_linear_attention import PrefixLinearAttention
from memseq.layers.recurrent.bilinear import BilinearRNN, FactoredBilinearRNN
from memseq.layers.recurrent.elm import ELMNeuron
from memseq.layers.recurrent.ffm import FFM
from memseq.layers.recurrent.gated import HGRN, ComplexHGRN, MinGRU, MinLSTM
from memseq.layers.recurrent.griffin import RGLRU, Hawk
from memseq.layers.recurrent.lem import LEM
from memseq.layers.recurrent.lmu import LMU
from memseq.layers.recurrent.lstm import GRU, LSTM, SLSTM
from memseq.layers.recurrent.mlstm import MLSTM
from memseq.layers.recurrent.reservoir import EchoState, ReservoirMemory
from memseq.layers.recurrent.wave_rnn import WaveRNN
from memseq.layers.shared.cross_decoder_attention import CrossDecoderAttention, SharedAttention
from memseq.layers.shared.gated_memory_unit import GatedMemoryUnit, SharedMemory
from memseq.layers.state_space.bmojo import BMojo
from memseq.layers.state_space.h3 import H3
from memseq.layers.state_space.hippo_memory import HiPPOMemory
from memseq.layers.state_space.hydra import Hydra
from memseq.layers.state_space.layered_notes import LayeredMemMamba
from memseq.layers.state_space.lru import LRU
from memseq.layers.state_space.mamba import Mamba, PolarizedMamba
from memseq.layers.state_space.mamba2 import Mamba2
from memseq.layers.state_space.mamba3 import Mamba3, Mamba3MIMO
from memseq.layers.state_space.mem_mamba import MemMamba
from memseq.layers.state_space.s4 import LSSL, S4
from memseq.layers.state_space.s4d import DSS, S4D, SMR
from memseq.layers.state_space.s5 import S5, BidirectionalS5

# Every causal sequence layer by name; each constructor works with `features` alone.
REGISTRY = {
    "softmax_attention": SoftmaxAttention,
    "sliding_window_attention": SlidingWindowAttention,
    "forgetting_attention": ForgettingAttention,
    "path_attention": PathAttention,
    "differential_attention": DifferentialAttention,
    "shared_attention": SharedAttention,
    "linear_attention": LinearAttention,
    "based": Based,
    "gated_linear_attention": GatedLinearAttention,
    "simple_gated_linear_attention": SimpleGatedLinearAttention,
    "hgrn2": HGRN2,
    "gated_slot_attention": GatedSlotAttention,
    "abc": ABC,
    "light_net": LightNet,
    "rwkv6": RWKV6,
    "retention": Retention,
    "lightning_attention": LightningAttention,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "gated_delta_net2": GatedDeltaNet2,
    "kimi_delta_attention": KimiDeltaAttention,
    "delta_product": DeltaProduct,
    "gated_delta_product": GatedDeltaProduct,
    "comba": Comba,
    "longhorn": Longhorn,
    "momentum_delta_net": MomentumDeltaNet,
    "oja_rule": OjaRule,
    "preconditioned_gated_delta_net": PreconditionedGatedDeltaNet,
    "preconditioned_kimi_delta_attention": PreconditionedKimiDeltaAttention,
    "mesa_net": MesaNet,
    "mixture_of_memories": MixtureOfMemories,
    "shared_memory": SharedMemory,
    "log_linear_mamba2": LogLinearMamba2,
    "log_linear_gated_delta_net": LogLinearGatedDeltaNet,
    "rwkv7": RWKV7,
    "rwkv_channel_mix": RWKVChannelMix,
    "gated_convolution": GatedConvolution,
    "mamba": Mamba,
    "polarized_mamba": PolarizedMamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "mamba3_mimo": Mamba3MIMO,
    "bmojo": BMojo,
    "mem_mamba": MemMamba,
    "layered_mem_mamba": LayeredMemMamba,
    "lru": LRU,
    "s4d": S4D,
    "s4": S4,
    "lssl": LSSL,
    "s5": S5,
    "h3": H3,
    "dss": DSS,
    "smr": SMR,
    "hippo_memory": HiPPOMemory,
    "rglru": RGLRU,
    "hawk": Hawk,
    "min_gru": MinGRU,
    "min_lstm": MinLSTM,
    "hgrn": HGRN,
    "complex_hgrn": ComplexHGRN,
    "mlstm": MLSTM,
    "slstm": SLSTM,
    "lstm": LSTM,
    "gru": GRU,
    "lem": LEM,
    "lmu": LMU,
    "wave_rnn": WaveRNN,
    "ffm": FFM,
    "bilinear_rnn": BilinearRNN,
    "factored_bilinear_rnn": FactoredBilinearRNN,
    "elm_neuron": ELMNeuron,
    "echo_state": EchoState,
    "reservoir_memory": ReservoirMemory,
    "neural_memory": NeuralMemory,
    "titans_lmm": TitansLMM,
    "moneta": Moneta,
    "yaad": Yaad,
    "memora": Memora,
    "ttt_linear": TTTLinear,
    "ttt_mlp": TTTMLP,
    "omega_net": OmegaNet,
    "titans_mag": TitansMAG,
    "titans_mal": TitansMAL,
    "titans_mac": TitansMAC,
}
# Layers of a model that read what a layer below them left in `shared`.
SHARED_LAYERS = {
    "cross_decoder_attention": CrossDecoderAttention,
    "gated_memory_unit": GatedMemoryUnit,
}
# Layers of sets: y = layer(x[, mask]).
SET_LAYERS = {
    "bidirectional_s5": BidirectionalS5,
    "hydra": Hydra,
    "hopfield": Hopfield,
    "hopfield_pooling": HopfieldPooling,
    "hopfield_lookup": HopfieldLookup,
    "hopfield_encoder_block": HopfieldEncoderBlock,
    "sparse_hopfield": SparseHopfield,
    "generalized_sparse_hopfield": GeneralizedSparseHopfield,
    "u_hopfield": UHopfield,
    "dense_associative_memory": DenseAssociativeMemory,
    "energy_transformer_block": EnergyTransformerBlock,
}
# Layers of single positions, y = layer(x), which a model can take beside its own "swiglu".
CHANNEL_LAYERS: dict = {}
# Layers that read another sequence or set: y, state = layer(x, memory[, state]).
CROSS_LAYERS = {
    "hopfield_decoder_block": HopfieldDecoderBlock,
    "prefix_linear_attention": PrefixLinearAttention,
}

__all__ = [
    "ABC",
    "CHANNEL_LAYERS",
    "CROSS_LAYERS",
    "DSS",
    "FFM",
    "FactoredBilinearRNN",
    "ForgettingAttention",
    "GRU",
    "H3",
    "HGRN",
    "HGRN2",
    "LEM",
    "LMU",
    "LRU",
    "LSSL",
    "LSTM",
    "MLSTM",
    "REGISTRY",
    "RGLRU",
    "RWKV6",
    "RWKV7",
    "RWKVChannelMix",
    "S4",
    "S4D",
    "S5",
    "SET_LAYERS",
    "SHARED_LAYERS",
    "SLSTM",
    "SMR",
    "TTTMLP",
    "BMojo",
    "Based",
    "BidirectionalS5",
    "BilinearRNN",
    "BinaryMemory",
    "ClassicalHopfield",
    "Comba",
    "ComplexHGRN",
    "CrossDecoderAttention",
    "DeltaNet",
    "DeltaProduct",
    "DenseAssociativeMemory",
    "DifferentialAttention",
    "ELMNeuron",
    "EchoState",
    "EnergyTransformerBlock",
    "GatedConvolution",
    "GatedDeltaNet",
    "GatedDeltaNet2",
    "GatedDeltaProduct",
    "GatedLinearAttention",
    "GatedMemoryUnit",
    "GatedSlotAttention",
    "GeneralizedSparseHopfield",
    "Hawk",
    "HiPPOMemory",
    "Hopfield",
    "Hydra",
    "HopfieldDecoderBlock",
    "HopfieldEncoderBlock",
    "HopfieldLookup",
    "HopfieldPooling",
    "KimiDeltaAttention",
    "LayeredMemMamba",
    "LightNet",
    "LightningAttention",
    "LinearAttention",
    "LogLinearGatedDeltaNet",
    "LogLinearMamba2",
    "Longhorn",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "Mamba3MIMO",
    "MemMamba",
    "Memora",
    "MesaNet",
    "MinGRU",
    "MinLSTM",
    "MixtureOfMemories",
    "MomentumDeltaNet",
    "Moneta",
    "NeuralMemory",
    "OjaRule",
    "OmegaNet",
    "PathAttention",
    "PolarizedMamba",
    "PreconditionedGatedDeltaNet",
    "PreconditionedKimiDeltaAttention",
    "PrefixLinearAttention",
    "RandomFeatureMemory",
    "ReservoirMemory",
    "Retention",
    "STanHopBlock",
    "SequenceLayer",
    "SharedAttention",
    "SharedMemory",
    "SimpleGatedLinearAttention",
    "SlidingWindowAttention",
    "SoftmaxAttention",
    "SparseHopfield",
    "TTTLinear",
    "TitansLMM",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "UHopfield",
    "WaveRNN",
    "Yaad",
    "context_parallel",
]

"""Every operation with its forms and sizes: what is compiled, timed and checked as a whole."""

import argparse
import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

from memseq.pallas_kernels.attention import FORMS as ATTENTION
from memseq.pallas_kernels.attention import attention
from memseq.pallas_kernels.attention import shapes as attention_shapes
from memseq.pallas_kernels.causal_conv import FORMS as CAUSAL_CONV
from memseq.pallas_kernels.causal_conv import causal_conv
from memseq.pallas_kernels.causal_conv import shapes as causal_conv_shapes
from memseq.pallas_kernels.common.chunks import CHUNK
from memseq.pallas_kernels.common.dispatch import Forms
from memseq.pallas_kernels.delta_rule import FORMS as DELTA_RULE
from memseq.pallas_kernels.delta_rule import delta_rule
from memseq.pallas_kernels.delta_rule import shapes as delta_rule_shapes
from memseq.pallas_kernels.diagonal_plus_low_rank import FORMS as DIAGONAL_PLUS_LOW_RANK
from memseq.pallas_kernels.diagonal_plus_low_rank import diagonal_plus_low_rank
from memseq.pallas_kernels.diagonal_plus_low_rank import shapes as diagonal_plus_low_rank_shapes
from memseq.pallas_kernels.hopfield_retrieve import FORMS as HOPFIELD_RETRIEVE
from memseq.pallas_kernels.hopfield_retrieve import hopfield_retrieve
from memseq.pallas_kernels.hopfield_retrieve import shapes as hopfield_retrieve_shapes
from memseq.pallas_kernels.linear_attention import FORMS as LINEAR_ATTENTION
from memseq.pallas_kernels.linear_attention import linear_attention
from memseq.pallas_kernels.linear_attention import shapes as linear_attention_shapes
from memseq.pallas_kernels.linear_scan import FORMS as LINEAR_SCAN
from memseq.pallas_kernels.linear_scan import linear_scan
from memseq.pallas_kernels.linear_scan import shapes as linear_scan_shapes
from memseq.pallas_kernels.log_linear_attention import FORMS as LOG_LINEAR_ATTENTION
from memseq.pallas_kernels.log_linear_attention import log_linear_attention
from memseq.pallas_kernels.log_linear_attention import shapes as log_linear_attention_shapes
from memseq.pallas_kernels.mlstm import mlstm
from memseq.pallas_kernels.mlstm import shapes as mlstm_shapes
from memseq.pallas_kernels.momentum_delta_rule import FORMS as MOMENTUM_DELTA_RULE
from memseq.pallas_kernels.momentum_delta_rule import momentum_delta_rule
from memseq.pallas_kernels.momentum_delta_rule import shapes as momentum_delta_rule_shapes
from memseq.pallas_kernels.neural_memory import FORMS as NEURAL_MEMORY
from memseq.pallas_kernels.neural_memory import neural_memory
from memseq.pallas_kernels.neural_memory import shapes as neural_memory_shapes
from memseq.pallas_kernels.path_attention import FORMS as PATH_ATTENTION
from memseq.pallas_kernels.path_attention import path_attention
from memseq.pallas_kernels.path_attention import shapes as path_attention_shapes
from memseq.pallas_kernels.ridge_readout import FORMS as RIDGE_READOUT
from memseq.pallas_kernels.ridge_readout import ridge_readout
from memseq.pallas_kernels.ridge_readout import shapes as ridge_readout_shapes
from memseq.pallas_kernels.selective_scan import FORMS as SELECTIVE_SCAN
from memseq.pallas_kernels.selective_scan import selective_scan
from memseq.pallas_kernels.selective_scan import shapes as selective_scan_shapes

DECAYS = {"none": None, "step": "step", "channel": "channel"}  # of linear attention and delta rule


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation; `shape(args)` gives its shape for the sizes that the command line asks for."""

    function: Callable[..., Any]
    forms: Forms
    shapes: ModuleType
    shape: Callable[[argparse.Namespace], Any]
    chunks: str | None = "chunk_size"  # the argument that says how long a chunk is
    products: bool = True  # its work is matrix products

    def sized(self, args: argparse.Namespace) -> Any:
        """The shape that the command line asks for, by its name or by sizes."""
        return self.shape(args) if args.shape is None else self.shapes.SHAPES[args.shape]

    def options(self, args: argparse.Namespace) -> dict[str, int]:
        """The chunk that was asked for. Left to themselves, scans take time as a CPU likes it."""
        # a part of the memory's definition: it has no default, but named shapes say it
        if self.chunks == "update_chunk" and args.shape is None:
            return {self.chunks: args.chunk_size or CHUNK}
        return {self.chunks: args.chunk_size} if self.chunks and args.chunk_size else {}


OPERATIONS = {
    "linear_attention": Operation(
        linear_attention,
        LINEAR_ATTENTION,
        linear_attention_shapes,
        lambda a: linear_attention_shapes.Shape(
            a.batch, a.time, a.heads, a.heads, a.dim, a.dim, DECAYS[a.decay]
        ),
    ),
    "delta_rule": Operation(
        delta_rule,
        DELTA_RULE,
        delta_rule_shapes,
        lambda a: delta_rule_shapes.Shape(
            a.batch, a.time, a.heads, a.heads, a.dim, a.dim, DECAYS[a.decay]
        ),
    ),
    "momentum_delta_rule": Operation(
        momentum_delta_rule,
        MOMENTUM_DELTA_RULE,
        momentum_delta_rule_shapes,
        lambda a: momentum_delta_rule_shapes.Shape(
            a.batch, a.time, a.heads, a.heads, a.dim, a.dim, "step"
        ),
    ),
    "diagonal_plus_low_rank": Operation(
        diagonal_plus_low_rank,
        DIAGONAL_PLUS_LOW_RANK,
        diagonal_plus_low_rank_shapes,
        lambda a: diagonal_plus_low_rank_shapes.Shape(
            a.batch, a.time, a.heads, a.heads, a.dim, a.dim
        ),
    ),
    "log_linear_attention": Operation(
        log_linear_attention,
        LOG_LINEAR_ATTENTION,
        log_linear_attention_shapes,
        lambda a: log_linear_attention_shapes.Shape(
            a.batch, a.time, a.heads, a.heads, a.dim, a.dim, "step", levels=16
        ),
    ),
    "ridge_readout": Operation(
        ridge_readout,
        RIDGE_READOUT,
        ridge_readout_shapes,
        lambda a: ridge_readout_shapes.Shape(
            a.batch, a.time, a.heads, a.heads, a.dim, a.dim, "step"
        ),
    ),
    "neural_memory": Operation(
        neural_memory,
        NEURAL_MEMORY,
        neural_memory_shapes,
        lambda a: neural_memory_shapes.Shape(a.batch, a.time, a.heads, a.dim),
        chunks="update_chunk",
    ),
    "mlstm": Operation(
        mlstm,
        dataclasses.replace(LINEAR_ATTENTION, name="mlstm", mosaic_tpu=None, mosaic_gpu=None),
        mlstm_shapes,
        lambda a: mlstm_shapes.Shape(a.batch, a.time, a.heads, a.dim, a.dim),
    ),
    "linear_scan": Operation(
        linear_scan,
        LINEAR_SCAN,
        linear_scan_shapes,
        lambda a: linear_scan_shapes.Shape(a.batch, a.time, a.heads * a.dim),
        products=False,
    ),
    "selective_scan": Operation(
        selective_scan,
        SELECTIVE_SCAN,
        selective_scan_shapes,
        lambda a: selective_scan_shapes.Shape(a.batch, a.time, a.heads * a.dim),
        products=False,
    ),
    "causal_conv": Operation(
        causal_conv,
        CAUSAL_CONV,
        causal_conv_shapes,
        lambda a: causal_conv_shapes.Shape(a.batch, a.time, a.heads * a.dim),
        chunks=None,
        products=False,
    ),
    "attention": Operation(
        attention,
        ATTENTION,
        attention_shapes,
        lambda a: attention_shapes.Shape(a.batch, a.time, a.heads, a.heads, a.dim),
        chunks=None,
    ),
    "path_attention": Operation(
        path_attention,
        PATH_ATTENTION,
        path_attention_shapes,
        lambda a: path_attention_shapes.Shape(a.batch, a.time, a.heads, a.heads, a.dim),
    ),
    "hopfield_retrieve": Operation(
        hopfield_retrieve,
        HOPFIELD_RETRIEVE,
        hopfield_retrieve_shapes,
        lambda a: hopfield_retrieve_shapes.Shape(a.batch, a.time, a.time, a.heads, a.dim),
    ),
}

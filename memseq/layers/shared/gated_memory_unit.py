"""One memory's read-out for many layers: SambaY's gated memory units."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
from flax.core import freeze

from memseq.layers.common.base import SequenceLayer
from memseq.layers.common.parts import RMSNorm, merge_heads
from memseq.layers.shared.reader import SharedReader
from memseq.pallas_kernels.common.checks import check_choice, check_count


class SharedMemory(SequenceLayer):
    """A layer with a memory, whose read-out the layers above it gate as well.

    Ren et al. 2025, "Decoder-Hybrid-Decoder Architecture for Efficient Reasoning with Long
    Generation", arXiv:2507.06607: the last recurrent layer of SambaY's self-decoder leaves what it
    read, before its own gate and projection. `GatedMemoryUnit` reads it.

    Attributes (beside those of every layer):
        base: name in `memseq.layers.REGISTRY` of the layer.
        options: its constructor options.
    """

    base: str = "mamba"
    options: Mapping[str, Any] = nn.FrozenDict()

    PAPER: ClassVar[str] = "Ren et al. 2025, arXiv:2507.06607"
    MEMORY: ClassVar[str] = "that of the base layer"
    OPERATION: ClassVar[str] = "selective_scan"  # of the default base
    SHARES: ClassVar[bool] = True

    def __post_init__(self):
        self.options = freeze(self.options)  # hashable, as modules are
        super().__post_init__()

    def setup(self):
        self.layer = self.make_base()

    @nn.nowrap
    def make_base(self, **options: Any) -> SequenceLayer:
        """The base layer."""
        from memseq.layers import REGISTRY  # which holds this class

        known = sorted(set(REGISTRY) - {"shared_attention", "shared_memory"})
        check_choice("base", self.base, known)
        common = {
            name: getattr(self, name)
            for name in ("heads", "implementation", "chunk_size", "dtype", "param_dtype")
        }
        return REGISTRY[self.base](self.features, **common | dict(self.options), **options)

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> Any:
        """That of the base layer."""
        return self.make_base(parent=None).init_state(batch, context)

    def project(self, x):
        return self.layer.project(x)

    def mix(self, inputs, state, segment_ids, shared):
        out, state = self.layer.mix(inputs, state, segment_ids)
        shared["shared_memory"] = merge_heads(out) if out.ndim == 4 else out
        return out, state

    def finish(self, x, out):
        return self.layer.finish(x, out)


class GatedMemoryUnit(SharedReader):
    """A gate on what the `SharedMemory` below has read, at the same step.

        y_t = W (m_t * silu(V x_t)),  m_t the read-out of that layer

    Ren et al. 2025, arXiv:2507.06607, equation 1: a layer's worth of mixing for two projections,
    with nothing to keep.

    Attributes (beside those of every layer; there are no heads):
        expand: size of the read-out per feature; that of the shared layer.
        output_norm: RMS norm of the gated read-out, as the authors have above matrix memories.
    """

    expand: int = 2
    output_norm: bool = False

    PAPER: ClassVar[str] = "Ren et al. 2025, arXiv:2507.06607"
    MEMORY: ClassVar[str] = "that of the shared memory below"
    READS: ClassVar[str] = "shared_memory"

    def setup(self):
        check_count("expand", self.expand, 1)
        self.gate = self.dense(self.expand * self.features)
        self.norm = RMSNorm(param_dtype=self.param_dtype) if self.output_norm else None
        self.output = self.dense(self.features)

    def project(self, x):
        return x

    def recall_shared(self, inputs: jax.Array, held: jax.Array) -> jax.Array:
        if held.shape[-1] != self.expand * self.features:
            raise ValueError(
                f"expand: expected {held.shape[-1]} / {self.features}, as the shared memory has "
                f"{held.shape[-1]} channels, got {self.expand}"
            )
        return held

    def finish(self, x, out):
        out = out * nn.silu(self.gate(x))
        if self.norm is not None:
            out = self.norm(out)
        return self.output(out)

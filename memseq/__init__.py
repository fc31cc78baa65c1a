"""memseq: sequence models with associative memory, in JAX.

Importing this package loads nothing else. Its parts: `memseq.layers` (Flax Linen modules),
`memseq.pallas_kernels` (the memory operations they are made of), `memseq.models`, `memseq.tasks`,
`memseq.data`, `memseq.training` and `memseq.evaluation`.
"""

__version__ = "0.1.0"

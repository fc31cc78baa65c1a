"""What the TPU kernels share.

recurrence: a kernel forward and one backward from the function of one chunk. blocks: what such
functions are built of. squares: how the [C, C] matrices of several heads lie side by side. heads:
how the arrays of a matrix memory become their operands. scan, scan_blocks: the same for elementwise
recurrences, one step after another. hardware: what all TPUs have in common.
"""

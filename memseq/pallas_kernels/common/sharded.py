"""Kernels under a mesh: the compilers split XLA programs over devices, but not a Pallas kernel.

Every sequence of a memory operation is computed alone, so a kernel is run by each device on the
batch rows and heads that it holds, inside `jax.shard_map`.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec

from memseq.partitioning import AXES, split


def over_mesh(
    function: Callable, axes: Sequence[str], out_axes: Sequence[str], arrays: Sequence
) -> Callable:
    """`function(*arrays)` made to run on each device's part, under the mesh of `jax.set_mesh`.

    Mesh axes split batch and heads as `partitioning.split` says.
    Axes that a surrounding shard_map has split already are left alone, and so is a dimension whose
    size they do not divide: then every device computes all of it.

    Args:
        function: takes `arrays` (each an array or None) and returns a tuple of arrays or None.
        axes: of each array its dimensions, a letter each: "b" is the batch and "h" the heads (or
            channels), others stay whole. Letters beyond an array's dimensions are ignored.
        out_axes: the same of each output. An output without "b" or "h" is summed over the devices
            that hold parts of what it was computed from.
        arrays: the arrays, or their shapes.

    Raises:
        ValueError: `split_over` names an axis that is neither of the mesh nor of the table.
    """
    mesh, wanted = jax.sharding.get_abstract_mesh(), split()
    for key, names in wanted._asdict().items():
        unknown = set(names) - {*mesh.axis_names, *AXES}
        if unknown and mesh.axis_names:
            raise ValueError(
                f"{key} of split_over: expected axes of the mesh, {list(mesh.axis_names)}, "
                f"got {sorted(unknown)}"
            )
    free = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }
    parts = {
        letter: _dividing(
            mesh, [n for n in names if n in free and mesh.shape[n] > 1], letter, axes, arrays
        )
        for letter, names in zip("bh", wanted, strict=True)
    }
    split_already = len(free) < len(mesh.axis_names)
    # once some axes are split the compilers ask for all, also for those of one device
    if not free or (not split_already and math.prod(mesh.shape[n] for n in free) == 1):
        return function

    def spec(letters, ndim):
        return PartitionSpec(*(parts.get(letter) or None for letter in letters[:ndim]))

    @functools.wraps(function)
    def on_each_device(*arrays):
        given = [x for x in arrays if x is not None]
        specs = [
            spec(letters, x.ndim) for letters, x in zip(axes, arrays, strict=True) if x is not None
        ]
        shapes = jax.eval_shape(function, *arrays)
        kept = [y is not None for y in shapes]
        out_specs = [
            spec(letters, y.ndim)
            for letters, y in zip(out_axes, shapes, strict=True)
            if y is not None
        ]

        def local(*given):
            left = iter(vary_together(given))
            outputs = function(*(None if x is None else next(left) for x in arrays))
            return [
                _summed(y, [name for key in "bh" if key not in letters for name in parts[key]])
                for letters, y in zip(out_axes, outputs, strict=True)
                if y is not None
            ]

        # over all axes, also those that split nothing here: the compilers accept nothing less
        found = jax.shard_map(local, in_specs=tuple(specs), out_specs=out_specs, axis_names=free)(
            *given
        )
        left = iter(found)
        return tuple(next(left) if keep else None for keep in kept)

    return on_each_device


def vary_together(arrays: Sequence) -> tuple:
    """Inside shard_map: marks all arrays as differing over every mesh axis that one of them does.

    A scan's carry must be marked like what is added to it, and a backward rule may then treat all
    arrays alike: the sum over devices for an array that they share comes from this mark.
    """
    axes = [frozenset() if x is None else jax.typeof(x).manual_axis_type.varying for x in arrays]
    every = frozenset().union(*axes)
    return tuple(
        x if x is None or own == every else jax.lax.pcast(x, tuple(every - own), to="varying")
        for x, own in zip(arrays, axes, strict=True)
    )


def _summed(x, names):
    return jax.lax.psum(x, tuple(names)) if names else x


def _dividing(mesh, names, letter, axes, arrays) -> tuple[str, ...]:
    """The names if together they divide every dimension of this letter, else fewer of them."""
    sizes = {
        size
        for letters, x in zip(axes, arrays, strict=True)
        if x is not None
        for key, size in zip(letters, x.shape, strict=False)
        if key == letter
    }
    while names and any(size % math.prod(mesh.shape[n] for n in names) for size in sizes):
        names = names[:-1]
    return tuple(names)

"""Compiles a function for a TPU that is not there.

The `libtpu` wheel holds the whole TPU compiler and works on any x86-64 Linux machine: it is asked
for the description of a TPU (a topology), and programs are compiled for the devices named in it.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from memseq.pallas_kernels.common.checks import check_choice

# The smallest whole machine of each generation, in libtpu's names.
TARGETS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
# Without them libtpu asks the cloud's metadata server what machine it is on, and takes a lock that
# lets one process a machine use it.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def compile_for(target: str, function: Callable[..., Any], *specs: Any, devices: int = 1):
    """`jax.jit(function)` compiled ahead of time for a TPU, on any machine with libtpu.

    Nothing is run and no TPU is needed. The program is lowered under the target's abstract mesh, so
    lowering rules that ask which chip they are for get the target and not this machine's backend.

    Args:
        target: one of `TARGETS`.
        function: a function of arrays, or what `jax.jit` made of one.
        *specs: its arguments, pytrees of `jax.ShapeDtypeStruct` or arrays. Those that carry a
            sharding over a mesh of the target's devices (see `mesh_for`) keep it, all others are
            whole on every device.
        devices: size of the mesh, whose one axis is called "data".

    Returns:
        The `jax.stages.Compiled`: its `as_text()`, `memory_analysis()` and `cost_analysis()` are
        the target's.

    Raises:
        ValueError: for an unknown target, more devices than it has, or when libtpu is missing.
            What the compiler has against the program it raises as its own exception.
    """
    own = mesh_for(target, data=devices)
    given = {x.sharding.mesh for x in jax.tree.leaves(specs) if _is_placed(x)}
    if len(given | {own}) > 1 and (len(given) > 1 or devices != 1):
        raise ValueError(
            f"specs: expected shardings over one mesh of {target} (and no devices=), got "
            f"{len(given)} meshes and devices={devices}"
        )
    mesh = given.pop() if given else own
    whole = NamedSharding(mesh, PartitionSpec())
    specs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=x.sharding if _is_placed(x) else whole
        ),
        specs,
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).lower(*specs)
    return lowered.compile()


def mesh_for(target: str, **axes: int) -> Mesh:
    """A mesh (of Auto axes) over the first devices of a TPU: `mesh_for("v5e", data=2, tensor=2)`.

    Raises:
        ValueError: for an unknown target, more devices than it has, or when libtpu is missing.
    """
    check_choice("target", target, TARGETS)
    require_libtpu()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    known = topologies.get_topology_desc(platform="tpu", topology_name=TARGETS[target]).devices
    count = int(np.prod(list(axes.values())))
    if not 1 <= count <= len(known):
        raise ValueError(f"devices: {target} has 1 to {len(known)}, got {axes}")
    grid = np.array(known[:count]).reshape(*axes.values())
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def has_libtpu() -> bool:
    """Is the TPU compiler installed?"""
    return importlib.util.find_spec("libtpu") is not None


def require_libtpu() -> None:
    """Raises ValueError, which says what to install, if the TPU compiler is not there."""
    if not has_libtpu():
        raise ValueError(
            "libtpu, the TPU compiler, is not installed (it exists for Linux on x86-64): "
            "pip install 'memseq[tpu]'"
        )


def _is_placed(x) -> bool:
    """Does it carry a sharding over devices of a TPU?"""
    sharding = getattr(x, "sharding", None)
    return isinstance(sharding, NamedSharding) and sharding.mesh.devices.flat[0].platform == "tpu"

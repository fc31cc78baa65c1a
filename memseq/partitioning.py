"""Where arrays live on a mesh, decided by parameter name. The ground floor: imports jax only.

One table, `RULES`, says for every parameter name which mesh axes carry its trailing dimensions,
whether weight decay applies to it and whether Muon may orthogonalise it. The axis over stacked
layers comes first and is never sharded, so a rule covers the single layer and the stack alike.
Optimiser moments end in the name of their parameter and follow the same rules.

Mesh axes: `data` splits the batch, `fsdp` splits the batch and the parameters, `context` splits
time, `tensor` splits features and heads. For kernels on a mesh with other axes there is
`split_over`.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
HEAD_AXES = ("tensor",)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How parameters whose path ends in `pattern` are treated.

    Attributes:
      pattern: regular expression for the last parts of the path, joined by "/".
      spec: mesh axis (or None) of each trailing dimension; dimensions before them are not sharded.
      decay: weight decay applies.
      matrix: the last two dimensions are a weight matrix [inputs, outputs] for Muon.
    """

    pattern: str
    spec: tuple[str | None, ...]
    decay: bool = False
    matrix: bool = False


# The first match wins. No weight decay on:
# - embeddings: a row's gradient is sparse, so decay would erase rare tokens between occurrences;
# - convolution taps: a handful of numbers a channel, which act as a gain like a norm's scale;
# - norm scales, biases, decay rates and other vectors: they have a meaning of their own at zero;
# - feature maps of a head, which start as the identity.
RULES = (
    Rule(r"embed(ding)?s?/embedding", ("tensor", "fsdp")),
    Rule(r"(state|stored|value)_patterns", ("tensor", "fsdp")),  # as rare as an embedding's rows
    Rule(r"\w*conv\w*/kernel", (None, "tensor")),
    Rule(r"(out|output|down)/kernel", ("tensor", "fsdp"), True, True),
    Rule(r"head/kernel", ("fsdp", "tensor"), True),  # Adam: rows of rare classes see few gradients
    Rule(r"\w+/kernel", ("fsdp", "tensor"), True, True),
    Rule(
        r"\w*scale|bonus|phase|bias|\w+_bias|\w+_log|[A-DP]|sinks|\w*decay\w*|\w*initial\w*"
        r"|\w+_map/\w+_kernel|log_beta|\w+_logits?",
        (),
    ),
)


def make_mesh(
    shape: str | Mapping[str, int] = "data=-1", devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes `AXES` (all of type Auto, which Linen's logical constraints need).

    Args:
      shape: sizes by axis name, as a mapping or as text such as "data=-1,fsdp=4". Axes left out
        have size 1; one axis may be -1 and takes the devices that remain.
      devices: defaults to all devices.

    Raises:
      ValueError: an unknown axis, a bad size, or a product that is not the number of devices.
    """
    sizes = dict.fromkeys(AXES, 1)
    given = _parse_shape(shape) if isinstance(shape, str) else dict(shape)
    for axis, size in given.items():
        if axis not in AXES:
            raise ValueError(
                f"mesh {shape!r}: unknown axis {axis!r}; the axes are {', '.join(AXES)}"
            )
        if size != -1 and size < 1:
            raise ValueError(f"mesh {shape!r}: axis {axis!r} has size {size}, expected >= 1, or -1")
        sizes[axis] = size
    devices = list(jax.devices() if devices is None else devices)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh {shape!r}: only one axis may be -1, got {' and '.join(free)}")
    if free:
        fixed = math.prod(size for size in sizes.values() if size != -1)
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {shape!r}: the sizes do not multiply to the {len(devices)} devices there are"
        )
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=auto, devices=devices)


class Split(NamedTuple):
    """Mesh axes over which kernels split batch and heads (or channels)."""

    batch: tuple[str, ...] = BATCH_AXES
    heads: tuple[str, ...] = HEAD_AXES


_SPLIT = jax.make_user_context(Split())  # what jax.jit has traced under another one, it traces anew


def split() -> Split:
    """The axes where this is called: those of `split_over`, or the table's."""
    return _SPLIT.value


@contextlib.contextmanager
def split_over(
    batch: str | Sequence[str] | None = None, heads: str | Sequence[str] | None = None
) -> Iterator[None]:
    """Inside, kernels split batch and heads over these axes of the mesh of `jax.set_mesh`.

        mesh = jax.make_mesh((4, 2), ("replica", "model"), (AxisType.Auto,) * 2)
        with jax.set_mesh(mesh), split_over("replica", "model"):
            y, state = jax.jit(layer.apply)(params, x)

    For a mesh whose axes have other names than `AXES`, around a model, a layer or an operation. A
    layer has no such fields: its wrappers would have to pass them on, and who calls operations in
    plain JAX has no layer. What counts is where an operation is called, for its backward pass too.

    Args:
        batch: names of mesh axes, () for none; None leaves it as it is outside.
        heads: the same of heads and channels.

    Raises:
        ValueError: not names, or one name in both; where a kernel is traced, a name that is neither
            of its mesh nor in `AXES`.
    """
    names = {
        key: outer if given is None else (given,) if isinstance(given, str) else given
        for key, given, outer in zip(Split._fields, (batch, heads), split(), strict=True)
    }
    for key, given in names.items():
        if not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given):
            raise ValueError(f"{key}: expected names of mesh axes, got {given!r}")
    inside = Split(*map(tuple, names.values()))
    if both := sorted(set(inside.batch) & set(inside.heads)):
        raise ValueError(f"heads: expected other axes than batch's {inside.batch}, got {both} too")
    with _SPLIT(inside):
        yield


def with_split_from_here(function: Callable) -> Callable:
    """`function`, which may be traced later and elsewhere, with the axes that hold here."""
    here = split()

    @functools.wraps(function)
    def inside(*args):
        with split_over(*here):
            return function(*args)

    return inside


def find_rule(name: str) -> Rule | None:
    """The rule for a parameter path such as "params/layers/mixer/out/kernel", or None."""
    for rule in RULES:
        if re.search(rf"(^|/)({rule.pattern})$", name):
            return rule
    return None


def decays(name: str) -> bool:
    """True where weight decay applies to the parameter of this path; unknown names do not decay."""
    rule = find_rule(name)
    return rule is not None and rule.decay


def is_matrix(name: str) -> bool:
    """True where the parameter's last two dimensions are a weight matrix for Muon."""
    rule = find_rule(name)
    return rule is not None and rule.matrix


def partition_spec(name: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The spec of one array. A dimension that its mesh axis does not divide stays whole."""
    rule = find_rule(name)
    if rule is None or len(rule.spec) > len(shape):
        return PartitionSpec()
    leading = (None,) * (len(shape) - len(rule.spec))
    axes = [
        axis if axis and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(leading + rule.spec, shape, strict=True)
    ]
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of parameters, optimiser state or a whole train state."""
    return map_named(lambda name, x: NamedSharding(mesh, partition_spec(name, x.shape, mesh)), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays [batch, ...]: batch over `data` and `fsdp`, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def map_named(function, tree: Any) -> Any:
    """`jax.tree.map` whose function gets (path joined by "/", leaf)."""
    return jax.tree.map_with_path(lambda path, leaf: function(leaf_name(path), leaf), tree)


def leaf_name(path: tuple) -> str:
    """A key path as text: "params/embed/embedding"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter in the report: `rule` is the pattern that matched, or None."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: PartitionSpec
    bytes: int
    bytes_per_device: int
    rule: str | None


def report(tree: Any, mesh: Mesh) -> list[Row]:
    """A row for each leaf of a parameter tree (arrays or ShapeDtypeStructs)."""
    rows = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        name, rule = leaf_name(path), find_rule(leaf_name(path))
        spec = partition_spec(name, leaf.shape, mesh)
        shard = NamedSharding(mesh, spec).shard_shape(tuple(leaf.shape))
        itemsize = leaf.dtype.itemsize
        rows.append(
            Row(
                name,
                tuple(leaf.shape),
                str(leaf.dtype),
                spec,
                math.prod(leaf.shape) * itemsize,
                math.prod(shard) * itemsize,
                rule and rule.pattern,
            )
        )
    return rows


def replicated_fraction(rows: Sequence[Row]) -> float:
    """The share of parameter bytes that every device holds whole."""
    total = sum(row.bytes for row in rows)
    return sum(row.bytes for row in rows if row.bytes_per_device == row.bytes) / max(total, 1)


def format_report(rows: Sequence[Row]) -> str:
    """The rows as a text table with a line of totals."""
    width = max([len(row.name) for row in rows] + [9])
    lines = [f"{'parameter':<{width}}  {'shape':<20} {'dtype':<9} {'bytes/device':>12}  spec"]
    for row in rows:
        spec = ", ".join(map(str, row.spec)) or "-"
        unmatched = "" if row.rule else "  (no rule)"
        lines.append(
            f"{row.name:<{width}}  {str(list(row.shape)):<20} {row.dtype:<9} "
            f"{row.bytes_per_device:>12,}  {spec}{unmatched}"
        )
    count = sum(math.prod(row.shape) for row in rows)
    per_device = sum(row.bytes_per_device for row in rows)
    lines.append(f"{count:,} parameters, {per_device:,} bytes on each device")
    return "\n".join(lines)


def _parse_shape(text: str) -> dict[str, int]:
    sizes = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or not re.fullmatch(r"-?\d+", size):
            raise ValueError(f"mesh {text!r}: {part!r} is not AXIS=SIZE")
        sizes[axis] = int(size)
    return sizes

"""`hopfield_retrieve` for softmax by TPU kernels, forward and backward.

Forward is one kernel: a tile of queries stays in the vector memory for all steps. The backward pass
runs it once more to keep each step's new state and the log of its total, goes back through the
steps with a kernel for the gradient of a state (flash attention's, Dao et al. 2022,
arXiv:2205.14135, with the stored patterns as keys and as values), and ends with one for what is
stored, over the queries of all steps together.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common.dispatch import KernelForm
from memseq.pallas_kernels.common.mosaic_tpu import heads
from memseq.pallas_kernels.common.mosaic_tpu.hardware import LANES, kernel_dtype, operands_vjp
from memseq.pallas_kernels.common.mosaic_tpu.recurrence import largest_divisor
from memseq.pallas_kernels.hopfield_retrieve import tpu_kernels
from memseq.pallas_kernels.hopfield_retrieve.separation import STREAMED, confinement, normalize

TILE = 512  # most queries, and
BLOCK = 512  # most stored patterns that are taken together
ROWS = 32  # in a register of the 8-bit numbers of masks
WIDE = 1024  # the sum of dim and value_dim above which tiles and blocks are smaller
LARGEST = 2048


def limit(query, stored, values, beta, alpha, sink, mask, position, **options):
    """Why the kernels cannot run, or None."""
    if options["separation"] not in STREAMED:
        return (
            f"separation {options['separation']!r} needs a row's scores together, the kernels "
            "stream them"
        )
    if options["tolerance"] is not None:
        return "the kernels take all steps of all queries, a tolerance ends them one by one"
    if options["dtype"] != jnp.float32:
        return f"the kernels compute in float32, got an input of {options['dtype']}"
    for name, x in (("dim", stored), ("value_dim", values)):
        if x is not None and x.shape[3] > LARGEST:
            return f"{name} is {x.shape[3]}, the kernels take up to {LARGEST}"
    return None


def forward(*arrays, steps, state_norm, energies, chunk_size, **others):
    """As `chunked`."""
    call = _Call(arrays, chunk_size)
    query, memory = call.operands(arrays)
    found = tpu_kernels.retrieve(
        query, memory, call.plan, steps=steps, state_norm=state_norm, keep=energies
    )
    out = call.from_tiles(found["out"]).astype(call.result)
    if not energies:
        return out, None
    states = call.walked(query, found, state_norm)
    bounded = confinement(states, state_norm, axis=-2)[..., None, :]
    energy = bounded - found["totals"] / call.by_query(memory.beta)
    return out, call.from_tiles(jnp.moveaxis(energy[..., 0, :], 0, -2))


def backward(arrays, cotangents, *, steps, gradient, state_norm, chunk_size, **others):
    """One cotangent for each of `arrays`, None for masks, positions and None."""
    call = _Call(arrays, chunk_size)

    def operands(arrays):
        query, memory = call.operands(arrays)
        free = (query, memory.stored, memory.values, memory.beta, memory.sink)
        return free, (memory.mask, memory.position)

    (query, *free), pull, seen = operands_vjp(operands, arrays)
    memory = tpu_kernels.Memory(*free, *seen)
    back = _Back(call, query, memory, steps, state_norm, cotangents[1])
    d_query = back.through(call.to_tiles(cotangents[0].astype(jnp.float32)), gradient)
    d_stored, d_values, d_beta, d_sink = back.of_memory()
    found = (d_query, d_stored, d_values, d_beta, d_sink)
    return pull(
        tuple(
            None if x is None else d.astype(x.dtype)
            for d, x in zip(found, (query, *free), strict=True)
        )
    )


MOSAIC_TPU = KernelForm(forward, backward, limit)


class _Call:
    """How a call's arrays become those of the kernels, see `tpu_kernels`, and back."""

    def __init__(self, arrays, chunk_size):
        query, stored, values, *_, mask, _ = arrays
        self.batch, self.queries, self.heads, self.group, dim = query.shape
        inputs = [x for x in (query, stored, values) if x is not None]
        self.result = inputs[-1 if values is not None else 0].dtype
        wide = dim + (dim if values is None else values.shape[3])
        smaller = max(1, 2 ** math.ceil(math.log2(wide / WIDE)))
        tiles = math.ceil(self.queries / (TILE // smaller))
        tile = _round_up(math.ceil(self.queries / tiles), ROWS if tiles == 1 else LANES)
        patterns = stored.shape[1]
        most = BLOCK // smaller
        if chunk_size is not None:
            most = min(most, _round_up(chunk_size, LANES))
        blocks = math.ceil(patterns / most)
        block = _round_up(math.ceil(patterns / blocks), ROWS if blocks == 1 else LANES)
        self.plan = tpu_kernels.Plan(
            heads=largest_divisor(self.heads, max(1, TILE // smaller // tile)),
            stored_heads=self.heads,
            tile=tile,
            tiles=tiles,
            block=block,
            patterns=patterns,
            passes=heads.passes(*inputs),
        )
        self.pad_queries = tile * tiles - self.queries
        self.pad_patterns = block * blocks - patterns

    def operands(self, arrays):
        """(query [P, T, D, C], Memory)."""
        query, stored, values, beta, _, sink, mask, position = arrays
        query = self.to_tiles(query.astype(kernel_dtype(query.dtype)))
        if mask is not None:
            each = mask.shape[1] > 1
            rows = self.pad_queries if each else 0
            mask = jnp.pad(mask.astype(jnp.int8), ((0, 0), (0, rows), (0, self.pad_patterns)))
            mask = jnp.swapaxes(mask, 1, 2) if each else mask
        if position is not None:
            position = jnp.pad(position, ((0, 0), (0, self.pad_queries)), constant_values=-1)
            position = position.reshape(self.plan.tiles, 1, self.plan.tile)
        return query, tpu_kernels.Memory(
            self._to_patterns(stored),
            None if values is None else self._to_patterns(values),
            beta[..., None, None],
            None if sink is None else sink[..., None, None],
            mask,
            position,
        )

    def to_tiles(self, x):
        """[batch, queries, heads, group, size] -> [P, T, size, C]."""
        x = jnp.moveaxis(x, 1, 4)
        x = jnp.pad(x, [(0, 0)] * 4 + [(0, self.pad_queries)])
        x = x.reshape(*x.shape[:4], self.plan.tiles, self.plan.tile)
        x = jnp.moveaxis(x, 4, 3)
        return x.reshape(x.shape[0] * x.shape[1], -1, *x.shape[4:])

    def from_tiles(self, x):
        """The inverse."""
        x = jnp.moveaxis(self._by_head(x), 3, 4)
        x = x.reshape(*x.shape[:4], -1)[..., : self.queries]
        return jnp.moveaxis(x, 4, 1)

    def by_query(self, x):
        """[heads, group, 1, 1] -> [P, T, 1, C]."""
        shape = (self.batch, *x.shape[:2], self.plan.tiles, self.plan.tile)
        x = jnp.broadcast_to(x[None], shape)
        return x.reshape(self.batch * self.heads, -1, 1, self.plan.tile)

    def sum_queries(self, x):
        """[..., P, T, 1, C] -> [heads, group, 1, 1]: its transpose."""
        x = x.reshape(-1, *x.shape[-4:]).sum(0)
        return self._by_head(x).sum((0, 3, 4, 5))[..., None, None]

    def walked(self, query, found, state_norm):
        """The states that the steps start from, [steps, P, T, D, C]."""
        states, moves = query.astype(jnp.float32)[None], len(found["totals"]) - 1
        if moves == 0:
            return states
        return jnp.concatenate([states, normalize(found["found"][:moves], state_norm, axis=-2)])

    def _by_head(self, x):
        return x.reshape(self.batch, self.heads, self.group, self.plan.tiles, *x.shape[2:])

    def _to_patterns(self, x):
        """[batch, patterns, heads, dim] -> [P, dim, N]."""
        x = jnp.moveaxis(x.astype(kernel_dtype(x.dtype)), 1, 3)
        x = x.reshape(-1, *x.shape[2:])
        return jnp.pad(x, ((0, 0), (0, 0), (0, self.pad_patterns)))


class _Step(NamedTuple):
    """What is known of a step: the state it starts from, what it finds, the log of its total.

    [P, T, D, C], [P, T, V, C] and [P, T, 1, C]; energy: the cotangent of its energy, or None.
    """

    state: jax.Array
    found: jax.Array
    total: jax.Array
    energy: jax.Array | None


class _Given(NamedTuple):
    """What a step gives to the memory: what the kernel needs, and what is summed over queries."""

    state: jax.Array
    d_found: jax.Array
    rows: jax.Array
    d_beta: jax.Array
    d_sink: jax.Array | None


class _Back:
    """The backward pass. Its first part gathers what each step gives to the memory."""

    def __init__(self, call, query, memory, steps, state_norm, d_energies):
        self.call, self.memory, self.steps, self.state_norm = call, memory, steps, state_norm
        kept = tpu_kernels.retrieve(
            query, memory, call.plan, steps=steps, state_norm=state_norm, keep=True
        )
        states, totals = call.walked(query, kept, state_norm), kept["totals"]
        energies = None
        if d_energies is not None:
            energies = jnp.moveaxis(call.to_tiles(d_energies), -2, 0)[..., None, :]
        self.last = self.own = None
        if memory.values is None or steps > 1:
            count = len(kept["found"])
            part = None if energies is None else energies[:count]
            self.own = _Step(states[:count], kept["found"], totals[:count], part)
        if memory.values is not None:
            part = None if energies is None else energies[-1]
            self.last = _Step(states[-1], kept["out"], totals[-1], part)
        self.beta = call.by_query(memory.beta)
        self.sink = None if memory.sink is None else call.by_query(memory.sink)
        self.moves: list[_Given] = []  # of steps that sum stored patterns, [steps, ...] each
        self.read: _Given | None = None  # of the one that sums values

    def through(self, d_out, gradient):
        """The cotangent of the query, from that of the output."""
        only_last = gradient != "unrolled"
        steps = self.own
        if self.last is not None:
            d_state, self.read = self._step(self.last, d_out, self.memory)
            if only_last:
                steps = None
        else:
            d_state = d_out
            if only_last:
                steps = jax.tree.map(lambda x: x[-1:], steps)
        if steps is not None:
            d_state, given = jax.lax.scan(self._move, d_state, steps, reverse=True)
            self.moves.append(given)
        if self.steps == 1 or not only_last:
            return d_state
        if gradient == "implicit":
            self._fixed_point(d_state)
        return jnp.zeros_like(d_state)

    def _move(self, d_new, step):
        """Back through one step whose new state has the cotangent d_new."""
        d_found = jax.vjp(lambda x: normalize(x, self.state_norm, axis=-2), step.found)[1](d_new)[0]
        return self._step(step, d_found, self.memory._replace(values=None))

    def _step(self, step, d_found, memory):
        if self.call.plan.passes == 1:  # as the kernels take it, so that errors cancel
            d_found = jax.lax.reduce_precision(d_found, exponent_bits=8, mantissa_bits=7)
        d_total = 0 if step.energy is None else -step.energy / self.beta
        shift = (d_found * step.found).sum(-2, keepdims=True) - d_total
        rows = jnp.concatenate([step.total, shift], axis=-2)
        d_state, d_beta = tpu_kernels.state_gradient(
            step.state, d_found, rows, memory, self.call.plan
        )
        d_sink = None if self.sink is None else -jnp.exp(self.sink - step.total) * shift
        if step.energy is not None:
            d_beta += step.energy * step.total / self.beta**2
            bounded = jax.vjp(lambda x: confinement(x, self.state_norm, axis=-2), step.state)[1]
            d_state += bounded(step.energy[..., 0, :])[0]
        return d_state, _Given(step.state, d_found, rows, d_beta, d_sink)

    def _fixed_point(self, given):
        """See `iterate._fixed_point`: the steps before the read are at where they led to."""
        if self.last is None:
            step = jax.tree.map(lambda x: x[-1], self.own)._replace(energy=None)
        else:
            own = self.memory._replace(values=None)
            moved = tpu_kernels.retrieve(
                self.last.state, own, self.call.plan, steps=1, state_norm=None, keep=True
            )
            step = self.last._replace(found=moved["found"][0], energy=None)
        summed = jax.lax.fori_loop(
            0, self.steps - 1, lambda _, u: given + self._move(u, step)[0], given
        )
        self.moves.append(jax.tree.map(lambda x: x[None], self._move(summed, step)[1]))

    def of_memory(self):
        """The cotangents of stored, values, beta and sink, as the kernels hold them."""
        d_stored = d_values = d_sink = None
        d_beta = jnp.zeros_like(self.memory.beta)
        d_sink = None if self.sink is None else jnp.zeros_like(self.memory.sink)
        parts = []
        if self.moves:
            moves = jax.tree.map(lambda *x: jnp.concatenate(x), *self.moves)
            parts.append((moves, self.memory._replace(values=None)))
        if self.read is not None:
            parts.append((jax.tree.map(lambda x: x[None], self.read), self.memory))
        for given, memory in parts:
            more, values = tpu_kernels.memory_gradient(*given[:3], memory, self.call.plan)
            d_stored = more if d_stored is None else d_stored + more
            d_values = values if values is not None else d_values
            d_beta += self.call.sum_queries(given.d_beta)
            if d_sink is not None:
                d_sink += self.call.sum_queries(given.d_sink)
        return d_stored, d_values, d_beta, d_sink


def _round_up(x: int, multiple: int) -> int:
    return math.ceil(x / multiple) * multiple

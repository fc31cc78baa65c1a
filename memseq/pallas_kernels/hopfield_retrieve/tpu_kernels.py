"""The three TPU kernels of `hopfield_retrieve`: all steps, and the two gradients of one step.

Every one streams the stored patterns through the vector memory in blocks, beside a tile of queries,
and takes the scores of that pair again: no matrix of queries and patterns exists outside.

P sequences, one a stored head of a batch row, `Plan.heads` of them in a program. The queries of all
heads that share a stored head are of one sequence: T tiles of C. Queries and patterns lie along the
lanes, which dims of 32 or 64 would fill in part only, and the scores of a pair of tiles are
[patterns, queries], so that what is summed and compared for a query is a row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from memseq.pallas_kernels.common.mosaic_tpu.blocks import product
from memseq.pallas_kernels.common.mosaic_tpu.hardware import VMEM_LIMIT
from memseq.pallas_kernels.hopfield_retrieve.separation import normalize

FLOAT32 = jnp.float32
LOW = float(jnp.finfo(FLOAT32).min)


class Plan(NamedTuple):
    """How a call is cut. Static.

    heads: sequences of a program; divides `stored_heads`.
    stored_heads: sequences of a batch row.
    tile: queries that a program takes together; tiles: of one head of queries.
    block: patterns that it takes together.
    patterns: how many there are, without padding.
    passes: of a matrix product, see `blocks.product`.
    """

    heads: int
    stored_heads: int
    tile: int
    tiles: int
    block: int
    patterns: int
    passes: int


class Memory(NamedTuple):
    """What states are compared with, and who sees what.

    stored: [P, D, N]. values: [P, V, N] that a read sums, None where it sums stored.
    beta, sink: float32 [stored_heads, group, 1, 1]; sink may be None.
    mask: int8, None for all ones: [1 or batch, 1, N], or [1 or batch, N, tiles x C].
    position: int32 [tiles, 1, C]: a query sees patterns up to this one; None for all.
    """

    stored: jax.Array
    values: jax.Array | None
    beta: jax.Array
    sink: jax.Array | None
    mask: jax.Array | None
    position: jax.Array | None


def retrieve(query, memory: Memory, plan: Plan, *, steps, state_norm, keep):
    """All steps of each tile of queries.

    Args:
        query: [P, T, D, C].
        keep: also return what the backward pass starts from.

    Returns:
        "out": what the last step found [P, T, V, C], through the norm if it is a state, in
        values' dtype or query's. With `keep` all in float32, also "found": the new state of every
        step that sums stored patterns, before its norm [steps, P, T, D, C], if there is one; and
        "totals": the log of every step's total [steps, P, T, 1, C].
    """
    sequences, tiles, dim, _ = query.shape
    own = steps if memory.values is None else steps - 1  # those that sum stored patterns
    reads = dim if memory.values is None else memory.values.shape[1]
    blocks = memory.stored.shape[2] // plan.block
    at = _Places(plan, lambda i, t, s, j: (i, t, j))
    like = None if keep else query if memory.values is None else memory.values
    outs = {"out": ((sequences, tiles, reads, plan.tile), like)}
    out_specs = {"out": at.queries(reads)}
    if keep:
        if own:
            outs["found"] = ((own, *query.shape), None)
            out_specs["found"] = pl.BlockSpec(
                (None, plan.heads, None, dim, plan.tile),
                lambda i, t, s, j: (jnp.minimum(s, own - 1), i, t, 0, 0),
            )
        outs["totals"] = ((steps, sequences, tiles, 1, plan.tile), None)
        out_specs["totals"] = pl.BlockSpec(
            (None, plan.heads, None, 1, plan.tile), lambda i, t, s, j: (s, i, t, 0, 0)
        )
    in_specs = at.memory(memory)
    if memory.values is not None:  # stays at the first block, which is fetched once, until read
        in_specs = in_specs._replace(
            values=pl.BlockSpec(
                (plan.heads, reads, plan.block),
                lambda i, t, s, j: (i, 0, jnp.where(s == steps - 1, j, 0)),
            )
        )
    scratch = {"state": dim, "top": 1, "total": 1}
    scratch |= {"summed": dim} if own else {}
    scratch |= {"read": reads} if memory.values is not None else {}

    def kernel(query, memory, outs, scratch):
        s, j = pl.program_id(2), pl.program_id(3)
        sink = memory.sink

        @pl.when((s == 0) & (j == 0))
        def _():
            scratch["state"][...] = query[...].astype(FLOAT32)

        @pl.when(j == 0)
        def _():
            for name, ref in scratch.items():
                if name != "state":
                    ref[...] = jnp.full(ref.shape, LOW if name == "top" else 0, FLOAT32)
            if sink is not None:
                top = jnp.maximum(scratch["top"][...], sink[:, 0])
                scratch["top"][...] = top
                scratch["total"][...] = jnp.exp(sink[:, 0] - top)

        def see(part):
            scores = _scores(scratch["state"][...], memory, plan)
            scores = scores if part is None else jnp.where(part, scores, LOW)
            top = scratch["top"][...]
            new = jnp.maximum(top, scores.max(1, keepdims=True))
            raised = jnp.exp(scores - new)
            raised = raised if part is None else jnp.where(part, raised, 0)
            kept = jnp.exp(top - new)
            scratch["top"][...] = new
            scratch["total"][...] = scratch["total"][...] * kept + raised.sum(1, keepdims=True)

            def add(name, what):
                more = product("nn", plan.passes, what[...], raised)
                scratch[name][...] = scratch[name][...] * kept + more

            if memory.values is None:
                add("summed", memory.stored)
            elif own:
                pl.when(s < steps - 1)(lambda: add("summed", memory.stored))
                pl.when(s == steps - 1)(lambda: add("read", memory.values))
            else:
                add("read", memory.values)

        _seen(memory, plan, j, see)

        @pl.when(j == blocks - 1)
        def _():
            total = scratch["total"][...]
            held = total > 0
            total = jnp.where(held, total, 1)
            if keep:
                outs["totals"][...] = jnp.where(held, scratch["top"][...] + jnp.log(total), 0)

            def move():
                found = scratch["summed"][...] / total
                if keep:
                    outs["found"][...] = found
                new = normalize(found, state_norm, axis=1)
                scratch["state"][...] = new
                if memory.values is None:
                    outs["out"][...] = new.astype(outs["out"].dtype)

            def read():
                outs["out"][...] = (scratch["read"][...] / total).astype(outs["out"].dtype)

            if memory.values is None:
                move()
            elif own:
                pl.when(s < steps - 1)(move)
                pl.when(s == steps - 1)(read)
            else:
                read()

    grid = (sequences // plan.heads, tiles, steps, blocks)
    return _call(
        kernel,
        "retrieve_keep" if keep else "retrieve",
        grid,
        (query, memory),
        (at.queries(dim), in_specs),
        outs,
        out_specs,
        {name: (plan.heads, size, plan.tile) for name, size in scratch.items()},
        ("parallel", "parallel", "arbitrary", "arbitrary"),
    )


def state_gradient(state, d_found, rows, memory: Memory, plan: Plan):
    """What a step's scores give the state that it started from [P, T, D, C], and beta.

    Of beta each query's part, [P, T, 1, C].

    Args:
        state: float32 [P, T, D, C].
        d_found: float32 [P, T, V, C], the cotangent of what the step found.
        rows: float32 [P, T, 2, C]: the log of the total, and what a score's cotangent is shifted
            by: found . d_found - the cotangent of the log of the total.
    """
    sequences, tiles, dim, _ = state.shape
    blocks = memory.stored.shape[2] // plan.block
    at = _Places(plan, lambda i, t, j: (i, t, j))

    def kernel(state, d_found, rows, memory, outs, scratch):
        j = pl.program_id(2)

        @pl.when(j == 0)
        def _():
            for ref in outs.values():
                ref[...] = jnp.zeros(ref.shape, FLOAT32)

        def see(part):
            scores, _, d_scores = _weights(state[...], d_found[...], rows[...], memory, part, plan)
            outs["d_state"][...] += product("nn", plan.passes, memory.stored[...], d_scores)
            outs["d_beta"][...] += (scores * d_scores).sum(1, keepdims=True)

        _seen(memory, plan, j, see)

        @pl.when(j == blocks - 1)
        def _():
            outs["d_state"][...] *= memory.beta[:, 0]
            outs["d_beta"][...] /= memory.beta[:, 0]

    found = _call(
        kernel,
        "state_gradient",
        (sequences // plan.heads, tiles, blocks),
        (state, d_found, rows, memory),
        (at.queries(dim), at.queries(d_found.shape[2]), at.queries(2), at.memory(memory)),
        {"d_state": (state.shape, None), "d_beta": ((sequences, tiles, 1, plan.tile), None)},
        {"d_state": at.queries(dim), "d_beta": at.queries(1)},
        {},
        ("parallel", "parallel", "arbitrary"),
    )
    return found["d_state"], found["d_beta"]


def memory_gradient(states, d_found, rows, memory: Memory, plan: Plan):
    """The cotangents of stored [P, D, N] and values [P, V, N] (or None) of several steps together.

    As `state_gradient`, each of the first three with the steps as a further first axis.
    """
    steps, sequences, tiles, dim, _ = states.shape
    blocks = memory.stored.shape[2] // plan.block
    at = _Places(plan, lambda i, j, r: (i, jax.lax.rem(r, tiles), j))
    reads = d_found.shape[3]

    def of_step(size):
        """A tile's part of an array [steps, P, T, size, C]."""
        return pl.BlockSpec(
            (None, plan.heads, None, size, plan.tile),
            lambda i, j, r: (jax.lax.div(r, tiles), i, jax.lax.rem(r, tiles), 0, 0),
        )

    def kernel(states, d_found, rows, memory, outs, scratch):
        @pl.when(pl.program_id(2) == 0)
        def _():
            for ref in outs.values():
                ref[...] = jnp.zeros(ref.shape, FLOAT32)

        def see(part):
            state, d_read = states[...], d_found[...]
            _, p, d_scores = _weights(state, d_read, rows[...], memory, part, plan)
            more = product("nt", plan.passes, state, d_scores)
            outs["stored"][...] += more * memory.beta[:, 0]
            outs[target][...] += product("nt", plan.passes, d_read, p)

        _seen(memory, plan, pl.program_id(1), see)

    target = "stored" if memory.values is None else "values"
    outs = {"stored": (memory.stored.shape, None)}
    out_specs = {"stored": at.patterns(dim)}
    if memory.values is not None:
        outs["values"], out_specs["values"] = (memory.values.shape, None), at.patterns(reads)
    found = _call(
        kernel,
        "memory_gradient",
        (sequences // plan.heads, blocks, steps * tiles),
        (states, d_found, rows, memory),
        (
            of_step(dim),
            of_step(reads),
            of_step(2),
            at.memory(memory),
        ),
        outs,
        out_specs,
        {},
        ("parallel", "parallel", "arbitrary"),
    )
    return found["stored"], found.get("values")


def _weights(state, d_found, rows, memory, part, plan):
    """The scores of a block of patterns, their weights and their cotangents, [H, block, C] each.

    What is not seen has a weight of exactly 0.
    """
    total, shift = rows[:, :1], rows[:, 1:]
    scores = _scores(state, memory, plan)
    exponent = scores - total
    p = jnp.exp(exponent if part is None else jnp.where(part, exponent, LOW))
    reads = memory.stored if memory.values is None else memory.values
    return scores, p, p * (product("tn", plan.passes, reads[...], d_found) - shift)


def _scores(state, memory, plan):
    """[H, block, C]."""
    keys, beta = memory.stored[...], memory.beta[:, 0]
    if plan.passes == 6:
        return product("tn", plan.passes, keys, state * beta)
    return product("tn", plan.passes, keys, state) * beta  # a query of 16 bits is exact as it is


def _seen(memory, plan, block, see) -> None:
    """Calls see(part) with part bool, broadcasting to [heads, block, tile], or None for all true.

    Not for a block that begins after the last position of the tile: nothing of it is seen.
    """
    first = block * plan.block
    index = first + jax.lax.broadcasted_iota(jnp.int32, (1, plan.block, 1), 1)
    parts = []
    if memory.mask is not None:
        mask = memory.mask[...].astype(jnp.int32)
        parts.append((jnp.swapaxes(mask, 1, 2) if mask.shape[1] == 1 else mask) != 0)
    if plan.patterns % plan.block:
        parts.append(index < plan.patterns)
    if memory.position is not None:
        position = memory.position[...]
        parts.append(index <= position)
    part = None
    for own in parts:
        part = own if part is None else part & own
    if memory.position is None:
        see(part)
    else:
        pl.when(first <= jnp.max(position))(lambda: see(part))


class _Places:
    """Block specifications of the arrays of a kernel.

    place: the grid's indices -> (of the sequences, of the tile of queries, of the block).
    """

    def __init__(self, plan: Plan, place):
        self.plan, self.place = plan, place

    def _spec(self, block, index):
        return pl.BlockSpec(block, lambda *grid: index(*self.place(*grid)))

    def queries(self, size):
        """[P, T, size, C]."""
        shape = (self.plan.heads, None, size, self.plan.tile)
        return self._spec(shape, lambda i, t, j: (i, t, 0, 0))

    def patterns(self, dim):
        """[P, dim, N]."""
        return self._spec((self.plan.heads, dim, self.plan.block), lambda i, t, j: (i, 0, j))

    def memory(self, memory: Memory) -> Memory:
        plan = self.plan
        programs = plan.stored_heads // plan.heads  # of a batch row

        def head(i, t, j):
            return jax.lax.rem(i, programs), jax.lax.div(t, plan.tiles), 0, 0

        def tile(t):
            return jax.lax.rem(t, plan.tiles)

        by_head = self._spec((plan.heads, 1, 1, 1), head)
        mask = position = None
        if memory.mask is not None:
            each, whole = memory.mask.shape[1] > 1, memory.mask.shape[0] == 1

            def place(i, t, j):
                row = 0 if whole else jax.lax.div(i, programs)
                return (row, j, tile(t)) if each else (row, 0, j)

            shape = (1, plan.block, plan.tile) if each else (1, 1, plan.block)
            mask = self._spec(shape, place)
        if memory.position is not None:
            position = self._spec((1, 1, plan.tile), lambda i, t, j: (tile(t), 0, 0))
        return Memory(
            self.patterns(memory.stored.shape[1]),
            None if memory.values is None else self.patterns(memory.values.shape[1]),
            by_head,
            None if memory.sink is None else by_head,
            mask,
            position,
        )


def _call(kernel, name, grid, arrays, in_specs, outs, out_specs, scratch, semantics):
    """pallas_call with trees of arguments: kernel(*arrays, outs, scratch), each of references.

    outs: of each output its shape and an array of its dtype (None is float32).
    """
    varying = jax.typeof(arrays[-1].stored).manual_axis_type

    def typed(shape, like):
        dtype = FLOAT32 if like is None else like.dtype
        return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)

    structure = jax.tree.structure(arrays)

    def flat(*refs):
        inputs, left = refs[: structure.num_leaves], refs[structure.num_leaves :]
        found = dict(zip(outs, left[: len(outs)], strict=True))
        kept = dict(zip(scratch, left[len(outs) :], strict=True))
        kernel(*jax.tree.unflatten(structure, inputs), found, kept)

    found = pl.pallas_call(
        flat,
        grid=grid,
        in_specs=jax.tree.leaves(in_specs, is_leaf=lambda x: isinstance(x, pl.BlockSpec)),
        out_specs=[out_specs[name] for name in outs],
        out_shape=[typed(*x) for x in outs.values()],
        scratch_shapes=[pltpu.VMEM(shape, FLOAT32) for shape in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT
        ),
        name=f"hopfield_{name}",
    )(*jax.tree.leaves(arrays))
    return dict(zip(outs, found, strict=True))

"""Mixture of memories over any layer with a memory of fixed size."""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import freeze

from memseq.layers.common.base import SequenceLayer, enter, leave, no_segment, state_dataclass
from memseq.layers.mixture.routing import pack
from memseq.pallas_kernels.common import context
from memseq.pallas_kernels.common.checks import check_choice, check_count
from memseq.pallas_kernels.common.segments import Segments, numbered


@state_dataclass
class MixtureOfMemoriesState:
    """State of `MixtureOfMemories`.

    Attributes:
        memories: the base layer's state, each leaf [batch, memories, ...].
        shared: the base layer's state of the memory that reads every token, () without one.
        segment: int32 [batch], id of the segment the memories belong to, -1 for none yet.
    """

    memories: Any
    shared: Any
    segment: jax.Array


class MixtureOfMemories(SequenceLayer):
    """Several memories of one kind; a router sends each token to a few of them.

        p_t = softmax(W x_t),   C_t = the top_k largest of p_t,   g_tm = p_tm / sum_{C_t} p_t
        S^m_t = F(S^m_{t-1}; k^m_t, v^m_t) for m in C_t, else S^m_{t-1}
        out_t = sum_{m in C_t} g_tm read(S^m_t, q_t)  (+ the read of a memory of all tokens)

    Du et al. 2025, "MoM: Linear Sequence Modeling with Mixture-of-Memories", arXiv:2502.13685,
    equations 5 to 11. A memory that a token does not go to neither writes nor decays, and its
    short convolution does not move: its time is counted in its own tokens.

    The tokens of each memory are packed into pages of one memory (see `routing`), which go through
    the base layer's `mix` one after another: the work is that of top_k memories (and of half a
    page for each memory), a decoded token reads and writes top_k states, and no page can see
    another memory's tokens, another row's, or the future.

    The router's balance loss, memories x sum over choices j and memories m of f_jm P_m, less its
    value top_k at even routing, times `balance_scale`, is sown as `load_balance` in `losses`. f_jm
    is the share of tokens whose j-th choice is m and has no gradient; P_m is the mean of p_tm.

    Attributes (beside those of every layer):
        base: name in `memseq.layers.REGISTRY` of a layer whose state has a fixed size.
        options: constructor options of the base layer.
        memories: how many the router chooses among.
        top_k: memories that each token goes to.
        shared_memory: one more memory, of every token, whose read-out is added.
        own_projections: each memory has its own projections to key, value and gates; query,
            convolution, decay rates and read-out are everyone's. False: all are everyone's.
        balance_scale: factor on the balance loss; 0 is none.
        page_size: tokens of a page; changes speed only.
        dispatch: "pages", or "dense": every memory goes over all tokens, most of them as padding.
            The same results for memories / top_k times the work; to check the other by, and where
            time is split over devices: see `context_parallel`.
    """

    base: str = "gated_delta_net"
    options: Mapping[str, Any] = nn.FrozenDict()
    memories: int = 4
    top_k: int = 2
    shared_memory: bool = True
    own_projections: bool = True
    balance_scale: float = 0.01
    page_size: int = 128
    dispatch: str = "pages"

    PAPER: ClassVar[str] = "Du et al. 2025, arXiv:2502.13685"
    MEMORY: ClassVar[str] = "(memories + 1) x that of the base layer"
    OPERATION: ClassVar[str] = "delta_rule"  # of the default base

    def __post_init__(self):
        self.options = freeze(self.options)  # hashable, as modules are
        super().__post_init__()

    def setup(self):
        check_count("memories", self.memories, 1)
        check_count("top_k", self.top_k, 1)
        check_count("page_size", self.page_size, 1)
        check_choice("dispatch", self.dispatch, ("pages", "dense"))
        if self.top_k > self.memories:
            raise ValueError(f"top_k: expected at most memories {self.memories}, got {self.top_k}")
        base = self.make_base()
        self.router = self.dense(self.memories)
        x = jnp.zeros((1, 1, self.features))
        own = self._own(base, x)

        def common(key):
            params = base.init(key, x)["params"]
            unused = () if self.shared_memory else own
            return {name: value for name, value in params.items() if name not in unused}

        def each(key):
            params = jax.vmap(lambda key: base.init(key, x)["params"])(
                jax.random.split(key, self.memories)
            )
            return {name: params[name] for name in own}

        self.common = self.param("memory", common)
        self.each = self.param("memories", each) if own else {}

    @nn.nowrap
    def make_base(self) -> SequenceLayer:
        """The base layer."""
        from memseq.layers import REGISTRY  # which holds this class

        known = sorted(set(REGISTRY) - {"mixture_of_memories"})
        check_choice("base", self.base, known)
        common = {
            name: getattr(self, name)
            for name in ("heads", "implementation", "chunk_size", "dtype", "param_dtype")
        }
        base = REGISTRY[self.base](self.features, **(common | dict(self.options)), parent=None)
        if base.SHARES or getattr(base.init_state(1), "grows", False):
            raise ValueError(
                "base: expected a layer with a state of fixed size that needs no other layer, "
                f"got {self.base!r}"
            )
        return base

    @nn.nowrap
    def _own(self, base: SequenceLayer, x: jax.Array) -> list[str]:
        """Names of the base layer's projections that each memory has for itself."""
        if not self.own_projections:
            return []
        made = jax.eval_shape(
            lambda: base.init(jax.random.key(0), x, method="project").get("params", {})
        )
        return [
            name for name, part in made.items() if isinstance(part, Mapping) and name != "query"
        ]

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> MixtureOfMemoriesState:
        """Empty memories; `context` as of the base layer."""
        fresh = self.make_base().init_state(batch, context)
        memories = jax.tree.map(
            lambda x: jnp.broadcast_to(x[:, None], (batch, self.memories, *x.shape[1:])), fresh
        )
        return MixtureOfMemoriesState(
            memories, fresh if self.shared_memory else (), no_segment(batch)
        )

    def project(self, x):
        base = self.make_base()

        def inputs(params):
            return base.apply({"params": params}, x, method="project")

        # each memory's, on a leading axis of all memories, or of one if they are everyone's
        if self.each:
            own = jax.vmap(lambda each: inputs({**self.common, **each}))(self.each)
        else:
            own = jax.tree.map(lambda a: a[None], inputs(self.common))
        return self.router(x), own, inputs(self.common) if self.shared_memory else ()

    def mix(self, inputs, state, segment_ids):
        logits, own, shared = inputs
        batch, time = logits.shape[:2]
        base = self.make_base()
        fresh = self.init_state(batch)
        state = enter(state, fresh, segment_ids)
        segs = Segments(jnp.ones((batch, time), bool), jnp.zeros((batch, time), jnp.int32))
        if segment_ids is not None:
            segs = numbered(segment_ids)

        def mix(inputs, state, ids):
            return base.apply({"params": self.common}, inputs, state, ids, method="mix")

        weight, chosen = self._route(logits, segs.valid)
        # inside, a segment's id is its number in this call: 0 goes on from the state
        memories = state.memories.replace(segment=jnp.zeros((batch, self.memories), jnp.int32))
        split = context.axis() is not None
        dispatch = self._by_memory if split or self.dispatch == "dense" else self._by_page
        out, memories = dispatch(mix, own, memories, weight, chosen, segs)
        # a memory that the last segment has not reached holds nothing of it
        final = segs.index[:, -1:]
        reached = memories.segment == (context.at_the_end(final) if split else final)
        memories = jax.tree.map(
            lambda a, b: jnp.where(reached.reshape(*reached.shape, *[1] * (a.ndim - 2)), a, b),
            memories,
            fresh.memories,
        )
        held = state.shared
        if self.shared_memory:
            everyone, held = mix(shared, state.shared, segment_ids)
            out = jax.tree.map(jnp.add, out, everyone)
        segment = leave(state, segment_ids)
        memories = memories.replace(
            segment=jnp.broadcast_to(segment[:, None], (batch, self.memories))
        )
        return out, MixtureOfMemoriesState(memories, held, segment)

    def finish(self, x, out):
        base = self.make_base()
        return base.apply({"params": self.common}, x, out, method="finish")

    def _route(self, logits: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Weights float32 and memories int32 [batch, time, top_k] of each token's choices."""
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        probability = jax.nn.softmax(logits)
        top, chosen = jax.lax.top_k(probability, self.top_k)
        tokens = jnp.maximum(valid.sum(), 1)
        choice = (chosen[..., None] == jnp.arange(self.memories)) & valid[..., None, None]
        load = choice.sum((0, 1)) / tokens
        mean = jnp.sum(jnp.where(valid[..., None], probability, 0), axis=(0, 1)) / tokens
        balance = self.memories * jnp.sum(load * mean) - self.top_k
        self.sow("intermediates", "load", load.sum(0))
        self.sow_loss("load_balance", self.balance_scale * balance)
        return top / top.sum(-1, keepdims=True), chosen

    def _by_page(self, mix, own, memories, weight, chosen, segs):
        batch, time = chosen.shape[:2]
        pages = pack(chosen, segs.valid, self.memories, min(self.page_size, time))
        rows = jnp.arange(batch)

        def gather(a):
            memory = jnp.minimum(pages.memory, a.shape[0] - 1)
            return a.at[memory[..., None], rows[:, None], pages.token].get(mode="clip")

        ids = segs.index.at[rows[:, None], pages.token].get(mode="fill", fill_value=-1)

        def page(memories, inputs):
            memory, inputs, ids = inputs
            out, after = mix(inputs, jax.tree.map(lambda a: a[rows, memory], memories), ids)
            put = jax.tree.map(lambda a, b: a.at[rows, memory].set(b), memories, after)
            return put, out

        packed = (pages.memory, jax.tree.map(gather, own), ids)
        # a state comes back wider where inputs are float64
        _, *first = jax.tree.map(lambda a: a[0], packed)
        one = jax.tree.map(lambda a: a[:, 0], memories)
        _, after = jax.eval_shape(lambda x, ids: mix(x, one, ids), *first)
        memories = jax.tree.map(lambda a, b: a.astype(b.dtype), memories, after)
        memories, out = jax.lax.scan(page, memories, packed)

        def combine(out):  # [pages, batch, page, ...] -> [batch, time, ...]
            out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])
            found = out.at[rows[:, None, None], pages.place].get(mode="clip")
            return _weighted(weight, found)

        return jax.tree.map(combine, out), memories

    def _by_memory(self, mix, own, memories, weight, chosen, segs):
        choice = chosen[..., None] == jnp.arange(self.memories)  # [batch, time, top_k, memories]
        ids = jnp.where(choice.any(2) & segs.valid[..., None], segs.index[..., None], -1)
        own = jax.tree.map(lambda a: jnp.broadcast_to(a, (self.memories, *a.shape[1:])), own)
        out, memories = jax.vmap(mix, in_axes=(0, 1, 2), out_axes=(2, 1))(own, memories, ids)
        weight = jnp.sum(jnp.where(choice, weight[..., None], 0), axis=2)
        return jax.tree.map(lambda out: _weighted(weight, out), out), memories


def _weighted(weight: jax.Array, out: jax.Array) -> jax.Array:
    """sum_k weight [batch, time, k] x out [batch, time, k, ...], in out's dtype."""
    weight = weight.reshape(*weight.shape, *[1] * (out.ndim - 3))
    # what no memory read is multiplied by 0: it must be a number, which `mix` sees to
    return jnp.sum(weight * out, axis=2).astype(out.dtype)

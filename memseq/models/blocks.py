"""A block (norm, mixer, residual, norm, channel layer, residual) and a stack of repeated blocks."""

import dataclasses
from collections import ChainMap
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers import CHANNEL_LAYERS, REGISTRY, SHARED_LAYERS, SequenceLayer
from memseq.layers.common.parts import RMSNorm, take_step
from memseq.layers.shared.reader import read_at
from memseq.pallas_kernels.common.checks import check_choice

REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

MIXERS = ChainMap(REGISTRY, SHARED_LAYERS)
_NOT_OPTIONS = {"features", "name", "parent"}
_DEPTH = ("layer_index", "num_layers")


def as_pattern(names: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple; one string would be read as a name a letter."""
    if isinstance(names, str):
        raise ValueError(f"pattern: expected names of layers as a tuple, got {names!r}")
    return tuple(names)


class SwiGLU(nn.Module):
    """W3 (silu(W1 x) * W2 x) (Shazeer 2020, arXiv:2002.05202, equation 6).

    The hidden size is 2/3 hidden_ratio features, rounded up to a multiple of 16, so that three
    matrices cost what two of hidden_ratio would.
    """

    features: int
    hidden_ratio: float = 4.0
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = -(-int(self.features * self.hidden_ratio * 2 / 3) // 16) * 16

        def dense(size, name):
            return nn.Dense(
                size, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype, name=name
            )

        gate = nn.silu(dense(hidden, "gate")(x))
        return dense(self.features, "down")(gate * dense(hidden, "up")(x))


class Block(nn.Module):
    """Pre-norm residual block around one mixer of the registry and one channel layer.

    Attributes:
        mixer: name in `memseq.layers.REGISTRY` or `SHARED_LAYERS`.
        options: constructor options of the mixer.
        depth: (index, number) of this block in the model, for mixers that depend on it.
        channel: "swiglu", a name in `memseq.layers.CHANNEL_LAYERS`, or None for none.
    """

    features: int
    mixer: str
    options: Mapping[str, Any]
    depth: tuple[int, int]
    channel: str | None
    hidden_ratio: float
    implementation: str
    dtype: Any
    param_dtype: Any

    def setup(self):
        self.mixer_norm = RMSNorm(param_dtype=self.param_dtype)
        self.layer = self.make_mixer()
        if self.channel is not None:
            check_choice("channel", self.channel, ("swiglu", *CHANNEL_LAYERS))
            self.channel_norm = RMSNorm(param_dtype=self.param_dtype)
            common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            if self.channel == "swiglu":
                self.channel_layer = SwiGLU(self.features, self.hidden_ratio, **common)
            else:
                self.channel_layer = CHANNEL_LAYERS[self.channel](self.features, **common)

    @nn.nowrap
    def make_mixer(self) -> SequenceLayer:
        check_choice("pattern", self.mixer, MIXERS)
        options = {
            "implementation": self.implementation,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        if "layer_index" in _options_of(self.mixer):
            options |= dict(zip(_DEPTH, self.depth, strict=True))
        options |= dict(self.options)
        if known := _options_of(self.mixer):
            for name in options:
                check_choice(f"mixers.{self.mixer}", name, sorted(known))
        return MIXERS[self.mixer](self.features, **options)

    def __call__(self, x, state, segment_ids, shared):
        shared = jax.tree.map(lambda a: a, shared)  # the caller keeps its own
        mixed, state = self.layer(self.mixer_norm(x), state, segment_ids, shared)
        x = x + mixed
        if self.channel is not None:
            x = x + self.channel_layer(self.channel_norm(x))
        return x, state, shared


def _options_of(mixer: str) -> set[str]:
    """The options of a mixer's constructor, empty for one that does not tell."""
    constructor = MIXERS[mixer]
    if not dataclasses.is_dataclass(constructor):
        return set()
    return {f.name for f in dataclasses.fields(constructor)} - _NOT_OPTIONS


def first_reader(blocks: tuple[Block, ...]) -> int:
    """The first of the last blocks that have no memory of their own: they look at no other step."""
    count = len(blocks)
    while count and hasattr(MIXERS[blocks[count - 1].mixer], "READS"):
        count -= 1
    return count


def depends_on_depth(mixer: str) -> bool:
    """True for a mixer that is not the same in every layer, or uses what another layer computed."""
    return "layer_index" in _options_of(mixer) or getattr(MIXERS[mixer], "SHARES", False)


class _Group(nn.Module):
    """One repeat of the pattern: the body that `Stack` scans."""

    blocks: tuple[Block, ...]
    remat: str
    prevent_cse: bool

    @nn.compact
    def __call__(self, x, states, segment_ids, last):
        def call(block, *arguments):
            return block(*arguments)

        if self.remat != "none":
            policy = REMAT_POLICIES[self.remat]
            call = nn.remat(call, policy=policy, prevent_cse=self.prevent_cse)
        states = (None,) * len(self.blocks) if states is None else states
        after, shared, whole = [], {}, x.shape
        for i, (block, state) in enumerate(zip(self.blocks, states, strict=True)):
            if last is not None and i == first_reader(self.blocks):
                x, shared = take_step(x, last), read_at(shared, last)
                segment_ids = None if segment_ids is None else take_step(segment_ids, last)
            block = block.clone(name=f"block_{i}", parent=self)
            x, state, shared = call(block, x, state, segment_ids, shared)
            after.append(state)
        return jnp.broadcast_to(x, whole), tuple(after)  # a loop's carry keeps its shape


class Stack(nn.Module):
    """`repeats` copies of a pattern of blocks, scanned, so that compile time is one pattern's.

    The state is a tuple, one entry a pattern position; each leaf is [repeats, batch, ...]. So are
    the parameters' leaves: [repeats, ...]. Mixers that depend on their depth, or that use another
    layer's activations, cannot be scanned: a pattern with one of them is written out, and is one
    repeat of a pattern `repeats` times as long.

    Attributes: as of `LanguageModel`.
    """

    features: int
    pattern: tuple[str, ...]
    repeats: int = 1
    mixers: Mapping[str, Mapping[str, Any]] = nn.FrozenDict()
    channel: str | None = "swiglu"
    hidden_ratio: float = 4.0
    remat: str = "none"
    implementation: str = "auto"
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.nowrap
    def blocks(self) -> tuple[Block, ...]:
        if not self.pattern or self.repeats < 1:
            raise ValueError(
                "pattern, repeats: expected at least one block, "
                f"got {self.pattern!r} x {self.repeats}"
            )
        for name in self.mixers:
            check_choice("mixers", name, self.pattern)
        pattern = self.pattern * (self.repeats // self.scanned())
        return tuple(
            Block(
                features=self.features,
                mixer=mixer,
                options=self.mixers.get(mixer, nn.FrozenDict()),
                depth=(i, len(pattern)),
                channel=self.channel,
                hidden_ratio=self.hidden_ratio,
                implementation=self.implementation,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                parent=None,
            )
            for i, mixer in enumerate(pattern)
        )

    @nn.nowrap
    def scanned(self) -> int:
        """Steps of the scan over repeats: 1 where the repeats are written out."""
        known = [mixer for mixer in self.pattern if mixer in MIXERS]
        return 1 if any(map(depends_on_depth, known)) else self.repeats

    @nn.compact
    def __call__(self, x, state, segment_ids, last=None):
        """x [batch, time, features] to the same, and the state.

        last: int32 [batch], the last valid position of each row, if only what comes out there is
            wanted: elsewhere it means nothing. Blocks behind all memories run at that step alone.
        """
        check_choice("remat", self.remat, REMAT_POLICIES)
        scanned = nn.scan(
            _Group,
            variable_axes={"params": 0, "intermediates": 0, "losses": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            out_axes=0,
            length=self.scanned(),
        )
        # a loop itself keeps recomputation from being merged away, one of a single step does not
        prevent_cse = self.scanned() == 1
        group = scanned(self.blocks(), self.remat, prevent_cse, name="layers")
        return group(x, state, segment_ids, last)

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> tuple:
        """An empty state; `context`: positions to hold, for mixers that store them one by one."""
        states = (block.make_mixer().init_state(batch, context) for block in self.blocks())
        return tuple(
            jax.tree.map(lambda x: jnp.broadcast_to(x, (self.scanned(), *x.shape)), state)
            for state in states
        )

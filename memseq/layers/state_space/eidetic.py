"""Mamba beside tokens that are kept as they came: B'MOJO and MemMamba."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import SequenceLayer, enter, no_segment, state_dataclass
from memseq.layers.common.parts import merge_heads, split_heads, widen
from memseq.layers.recurrent.step import scan_steps
from memseq.layers.state_space.mamba import Mamba, MambaState
from memseq.pallas_kernels.common.checks import check_count


@state_dataclass
class BMojoState:
    """State of `BMojo`.

    Attributes:
        fading: state of the Mamba layer.
        memory: float32 [batch, kept, 2, heads, head_dim], keys and values of the tokens kept.
        memory_score: float32 [batch, kept], what they were kept for; -1 for an empty slot.
        window: float32 [batch, window, 2, heads, head_dim], those of the last tokens, oldest first.
        window_score: float32 [batch, window]; -1 for an empty slot.
        expected: float32 [batch, features], the next input as the Mamba layer's output predicts it.
        segment: int32 [batch].
    """

    fading: MambaState
    memory: jax.Array
    memory_score: jax.Array
    window: jax.Array
    window_score: jax.Array
    expected: jax.Array
    segment: jax.Array


class BMojo(SequenceLayer):
    """Fading memory of a state space, and eidetic memory of what it did not expect.

        out_t = W softmax(q_t K_t^T / sqrt(head_dim)) V_t, where the keys and values K_t, V_t are of
        the last `window` tokens, of `kept` tokens before them, and of f_t = mamba(x)_t

    Zancato et al. 2024, "B'MOJO: hybrid state space realizations of foundation models with eidetic
    and fading memory", arXiv:2407.06324, section 3; no code was published. A token's innovation is
    the mean square of x_t - P f_{t-1}; P learns from it as an auxiliary loss (sown in `losses`),
    which changes nothing else. A token that leaves the window takes the place of the kept one
    that was least of an innovation, if its own is greater. Which tokens are kept has no gradient;
    what they hold has. The Mamba layer runs as its operation does, the rest is a scan over time.

    Attributes (beside those of every layer):
        window: tokens that are seen anyway.
        kept: tokens kept for good, as long as none is less expected.
        state_dim: of the Mamba layer.
    """

    window: int = 64
    kept: int = 16
    state_dim: int = 16

    PAPER: ClassVar[str] = "Zancato et al. 2024, arXiv:2407.06324"
    MEMORY: ClassVar[str] = "vectors [channels, state_dim] and kept tokens"
    OPERATION: ClassVar[str] = "selective_scan"
    STATE: ClassVar[type] = BMojoState

    def setup(self):
        self._dims()
        self.fading = mamba_of(self)
        for name in ("query", "key", "value", "fading_key", "fading_value", "expect"):
            setattr(self, name, self.dense(self.features))
        self.output = self.dense(self.features)

    @nn.nowrap
    def _dims(self) -> tuple[int, int]:
        """(heads, head_dim)."""
        check_count("window", self.window, 1)
        check_count("kept", self.kept, 1)
        return self.heads, self.split_features("heads", None)

    @nn.nowrap
    def init_state(self, batch, context=None):
        """Empty memories; `context` changes nothing."""
        heads, head_dim = self._dims()

        def tokens(count):
            return jnp.zeros((batch, count, 2, heads, head_dim), jnp.float32)

        return BMojoState(
            fading=mamba_of(self, parent=None).init_state(batch),
            memory=tokens(self.kept),
            memory_score=jnp.full((batch, self.kept), -1, jnp.float32),
            window=tokens(self.window),
            window_score=jnp.full((batch, self.window), -1, jnp.float32),
            expected=jnp.zeros((batch, self.features), jnp.float32),
            segment=no_segment(batch),
        )

    def project(self, x):
        return x, self.query(x), self.key(x), self.value(x)

    def mix(self, inputs, state, segment_ids):
        x, query, key, value = inputs
        heads, _ = self._dims()
        fresh = self.init_state(x.shape[0])
        state = enter(state, fresh, segment_ids)
        faded, fading = self.fading(x, state.fading, segment_ids)
        expected = widen(self.expect(jax.lax.stop_gradient(faded)))

        dtype = jnp.result_type(expected, state.memory)
        names = ("memory", "memory_score", "window", "window_score", "expected")
        carried, empty = (
            {name: getattr(s, name).astype(dtype) for name in names} for s in (state, fresh)
        )
        (out, surprise), after = scan_steps(
            self._step,
            carried,
            {
                "x": jax.lax.stop_gradient(widen(x)).astype(dtype),
                "query": split_heads(widen(query), heads).astype(dtype),
                "token": pair_of(key, value, heads).astype(dtype),
                "faded": pair_of(self.fading_key(faded), self.fading_value(faded), heads).astype(
                    dtype
                ),
                "expected": expected.astype(dtype),
            },
            segment_ids,
            empty,
        )
        taken = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids >= 0
        loss = jnp.sum(jnp.where(taken, surprise, 0)) / jnp.maximum(jnp.sum(taken), 1)
        self.sow_loss("innovation", loss)
        out = merge_heads(out).astype(query.dtype)
        return out, self.leave_with(state, segment_ids, fading=fading, **after)

    @nn.nowrap
    def _step(self, carried, inputs):
        """One step of time: ((read-out, innovation), state)."""
        surprise = jnp.mean((inputs["x"] - carried["expected"]) ** 2, axis=-1)
        memory, memory_score = keep_the_greatest(
            carried["memory"],
            carried["memory_score"],
            carried["window"][:, 0],
            carried["window_score"][:, 0],
        )

        window = enqueue(carried["window"], inputs["token"])
        score = jax.lax.stop_gradient(surprise)
        window_score = enqueue(carried["window_score"], score)
        tokens = jnp.concatenate([memory, window, inputs["faded"][:, None]], axis=1)
        seen = jnp.concatenate([memory_score, window_score, score[:, None]], axis=1) >= 0
        out = attend(inputs["query"], tokens, seen)
        after = {
            "memory": memory,
            "memory_score": memory_score,
            "window": window,
            "window_score": window_score,
            "expected": inputs["expected"],
        }
        return after, (out, surprise)

    def finish(self, x, out):
        return self.output(out)


def keep_the_greatest(
    kept: jax.Array, kept_score: jax.Array, item: jax.Array, score: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Puts an item in the place of the kept one with the least score, if its own is greater.

    kept [batch, slots, ...], kept_score [batch, slots], item [batch, ...], score [batch].
    """
    least = jnp.argmin(kept_score, axis=1)
    better = score > jnp.take_along_axis(kept_score, least[:, None], axis=1)[:, 0]
    here = better[:, None] & (jnp.arange(kept_score.shape[1]) == least[:, None])
    wide = here.reshape(*here.shape, *[1] * (kept.ndim - 2))
    return jnp.where(wide, item[:, None], kept), jnp.where(here, score[:, None], kept_score)


def attend(query: jax.Array, tokens: jax.Array, seen: jax.Array) -> jax.Array:
    """softmax(q K^T / sqrt(dim)) V of one step; 0 where nothing is seen.

    query [batch, heads, dim], tokens [batch, n, 2, heads, dim], seen bool [batch, n].
    """
    logits = jnp.einsum("bhd,bnhd->bhn", query, tokens[:, :, 0]) * query.shape[-1] ** -0.5
    logits = jnp.where(seen[:, None], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weight = jnp.exp(logits - jnp.where(jnp.isfinite(top), jax.lax.stop_gradient(top), 0))
    weight = weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), 1e-30)
    return jnp.einsum("bhn,bnhd->bhd", weight, tokens[:, :, 1])


@state_dataclass
class MemMambaState:
    """State of `MemMamba`.

    Attributes:
        fading: state of the Mamba layer.
        memory: float32 [batch, notes, 2, heads, head_dim], keys and values of notes, oldest first.
        filled: float32 [batch, notes], what a note was worth; 0 for an empty slot.
        segment: int32 [batch].
    """

    fading: MambaState
    memory: jax.Array
    filled: jax.Array
    segment: jax.Array


class MemMamba(SequenceLayer):
    """Mamba with a pool of notes: tokens worth one leave it, steps in need of one read them.

        out_t = f_t + [r_t > recall_above] r_t W attend(q_t, notes),  f = mamba(x),
        a note (K x_t, s_t V x_t) is left where s_t > note_above,
        s_t = sigmoid(w_s x_t),  r_t = sigmoid(w_r f_t),  q_t = Q f_t

    Wang et al. 2025, "MemMamba: rethinking memory patterns in state space model",
    arXiv:2510.03279; no code was published. This is its note block and its attention across
    tokens; `LayeredMemMamba` adds attention across layers. A full pool drops its oldest note.
    Thresholds have no gradient, but s and r weigh what passes them, so both are learned.

    Attributes (beside those of every layer):
        notes: size of the pool.
        note_above, recall_above: thresholds, in [0, 1).
        state_dim: of the Mamba layer.
    """

    notes: int = 32
    note_above: float = 0.5
    recall_above: float = 0.5
    state_dim: int = 16

    PAPER: ClassVar[str] = "Wang et al. 2025, arXiv:2510.03279"
    MEMORY: ClassVar[str] = "vectors [channels, state_dim] and notes"
    OPERATION: ClassVar[str] = "selective_scan"
    STATE: ClassVar[type] = MemMambaState

    def setup(self):
        self._dims()
        for name in ("note_above", "recall_above"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 0 <= threshold < 1, got {getattr(self, name)}")
        self.fading = mamba_of(self)
        for name in ("query", "key", "value"):
            setattr(self, name, self.dense(self.features))
        self.worth = self.dense(1, use_bias=True)
        self.need = self.dense(1, use_bias=True)
        self.output = self.dense(self.features)

    @nn.nowrap
    def _dims(self) -> tuple[int, int]:
        """(heads, head_dim)."""
        check_count("notes", self.notes, 1)
        return self.heads, self.split_features("heads", None)

    @nn.nowrap
    def init_state(self, batch, context=None):
        """An empty memory and an empty pool; `context` changes nothing."""
        heads, head_dim = self._dims()
        return self.STATE(
            fading=mamba_of(self, parent=None).init_state(batch),
            memory=jnp.zeros((batch, self.notes, 2, heads, head_dim), jnp.float32),
            filled=jnp.zeros((batch, self.notes), jnp.float32),
            segment=no_segment(batch),
        )

    def project(self, x):
        return x, self.key(x), self.value(x), nn.sigmoid(widen(self.worth(x)))

    def mix(self, inputs, state, segment_ids):
        x, key, value, worth = inputs
        heads, _ = self._dims()
        fresh = self.init_state(x.shape[0])
        state = enter(state, fresh, segment_ids)
        faded, fading = self.fading(x, state.fading, segment_ids)
        need = nn.sigmoid(widen(self.need(faded)))
        self.sow("intermediates", "mean_worth", worth.mean())
        self.sow("intermediates", "mean_need", need.mean())
        note = pair_of(widen(key), worth * widen(value), heads)
        query = split_heads(widen(self.query(faded)), heads)
        dtype = jnp.result_type(note, query, state.memory)

        def step(carried, inputs):
            memory, filled = carried
            note, worth, query = inputs
            left = worth > self.note_above
            filled = jnp.where(left, enqueue(filled, worth[:, 0]), filled)
            memory = jnp.where(left[:, :, None, None, None], enqueue(memory, note), memory)
            return (memory, filled), attend(query, memory, filled > 0)

        out, (memory, filled) = scan_steps(
            step,
            (state.memory.astype(dtype), state.filled.astype(dtype)),
            (note.astype(dtype), worth.astype(dtype), query.astype(dtype)),
            segment_ids,
            (fresh.memory.astype(dtype), fresh.filled.astype(dtype)),
        )
        recalled = jnp.where(need > self.recall_above, need, 0) * merge_heads(out)
        out = faded, recalled.astype(faded.dtype)
        return out, self.leave_with(state, segment_ids, fading=fading, memory=memory, filled=filled)

    def finish(self, x, out):
        faded, recalled = out
        return faded + self.output(recalled)


def mamba_of(layer: SequenceLayer, **options: Any) -> Mamba:
    """The Mamba layer that a layer's fields describe."""
    return Mamba(
        layer.features,
        state_dim=layer.state_dim,
        implementation=layer.implementation,
        chunk_size=layer.chunk_size,
        dtype=layer.dtype,
        param_dtype=layer.param_dtype,
        **options,
    )


def pair_of(key: jax.Array, value: jax.Array, heads: int) -> jax.Array:
    """A token's key and value by heads: [batch, time, 2, heads, head_dim]."""
    return jnp.stack([split_heads(key, heads), split_heads(value, heads)], axis=2)


def enqueue(queue: jax.Array, new: jax.Array) -> jax.Array:
    """[batch, slots, ...] without its first, and with `new` [batch, ...] at the end."""
    return jnp.concatenate([queue[:, 1:], new[:, None]], axis=1)

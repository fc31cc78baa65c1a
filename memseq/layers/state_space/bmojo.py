"""B'MOJO: Mamba beside the tokens that it did not expect."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import SequenceLayer, enter, no_segment, state_dataclass
from memseq.layers.common.parts import merge_heads, split_heads, widen
from memseq.layers.recurrent.step import scan_steps
from memseq.layers.state_space.kept_tokens import attend, enqueue, mamba_of, pair_of
from memseq.layers.state_space.mamba import MambaState
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

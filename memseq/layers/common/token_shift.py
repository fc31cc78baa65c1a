"""What RWKV layers share: shift to the previous token, gates of low rank, the read-out's norm."""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memseq.layers.common.base import SequenceLayer, check_layer_index, no_segment
from memseq.layers.common.matrix import MatrixState
from memseq.layers.common.parts import conv_tail, merge_heads, split_heads, widen
from memseq.pallas_kernels import causal_conv
from memseq.pallas_kernels.common.checks import check_count


def constant(values: np.ndarray) -> Callable[..., jax.Array]:
    """An initialiser that gives these values."""
    return lambda key, shape, dtype: jnp.asarray(values, dtype).reshape(shape)


class LowRank(nn.Module):
    """bias + activation(x W_in) W_out, in float32 at least; W_in starts at 0: the bias alone acts.

    x [..., features] to [..., size].
    """

    rank: int
    size: int
    bias_init: Callable[..., jax.Array]
    out_init: Callable[..., jax.Array]
    activation: Callable[[jax.Array], jax.Array] = lambda x: x
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        common = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        inner = nn.Dense(self.rank, kernel_init=nn.initializers.zeros, name="in", **common)(x)
        inner = self.activation(inner)
        y = nn.Dense(self.size, kernel_init=self.out_init, name="out", **common)(inner)
        return widen(y) + self.param("bias", self.bias_init, (self.size,), jnp.float32)


class TokenShiftLayer(SequenceLayer):
    """Matrix memories whose inputs are each a mixture of this token and the one before it.

    The state is a `MatrixState` whose `conv` is the last token, as of a short convolution of two
    steps. `mix` does everything but the output projection, for all else follows the shift.

    Attributes (beside those of every layer):
        layer_index: place of this layer among `num_layers`, from 0; sets where parameters start.
        num_layers: layers of the model.
    """

    layer_index: int = 0
    num_layers: int = 1

    MEMORY: ClassVar[str] = "matrix [heads, head_dim, head_dim] and the last token"

    def setup_shift(self, **starts: np.ndarray) -> None:
        """The shares of the previous token, by name, and where they start."""
        check_layer_index(self.layer_index, self.num_layers)
        self.shift_names = tuple(starts)
        start = constant(np.stack(list(starts.values())))
        shape = (len(starts), self.features)
        self.shift_bias = self.param("shift_bias", start, shape, self.param_dtype)

    @nn.nowrap
    def head_dim(self) -> int:
        check_count("heads", self.heads, 1)
        if self.features % self.heads:
            raise ValueError(
                f"heads: features {self.features} must be a multiple of it, got {self.heads}"
            )
        return self.features // self.heads

    @nn.nowrap
    def falling(self, power: float) -> np.ndarray:
        """1 - (i / C)^power for channel i of C: where shares start."""
        return 1 - (np.arange(self.features) / self.features) ** power

    @nn.nowrap
    def depth(self) -> tuple[float, float]:
        """(from 0 at the first layer to 1 at the last, from 1 at the first to almost 0)."""
        return (
            self.layer_index / max(self.num_layers - 1, 1),
            1 - self.layer_index / self.num_layers,
        )

    @nn.nowrap
    def low_rank(self, rank: int, size: int, bias_init, out_init, **options: Any) -> LowRank:
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return LowRank(rank, size, bias_init, out_init, **common, **options)

    @nn.nowrap
    def head_norm(self) -> nn.LayerNorm:
        """Layer norm of each head, with a scale and a bias for every channel."""
        return nn.LayerNorm(
            epsilon=1e-5 * self.head_dim(),
            reduction_axes=-1,
            feature_axes=(-2, -1),
            use_fast_variance=False,
            param_dtype=self.param_dtype,
        )

    @nn.nowrap
    def init_state(self, batch: int, context: int | None = None) -> MatrixState:
        """An empty memory and no last token; `context` changes nothing."""
        dim = self.head_dim()
        return self.STATE(
            memory=jnp.zeros((batch, self.heads, dim, dim), jnp.float32),
            conv=conv_tail(batch, 2, self.features, self.activation_dtype()),
            segment=no_segment(batch),
        )

    def project(self, x: jax.Array) -> jax.Array:
        """x in the dtype of activations."""
        return nn.dtypes.promote_dtype(x, self.shift_bias, dtype=self.dtype)[0]

    def shift(self, x: jax.Array, tail: jax.Array, segment_ids: jax.Array | None):
        """(the token before each, 0 at a segment's start, minus x; the last token)."""
        kernel = jnp.zeros((2, self.features), x.dtype).at[0].set(1)
        previous, tail = causal_conv(
            x,
            kernel,
            initial_state=tail.astype(x.dtype),
            segment_ids=segment_ids,
            implementation=self.plain_implementation(),
        )
        return previous - x, tail

    def shifted(self, x: jax.Array, change: jax.Array, *more: jax.Array) -> dict[str, jax.Array]:
        """x moved by its share of `change`, for each name given to `setup_shift`.

        more: [batch, time, features] for every name, added to its share.
        """
        shares = self.shift_bias.astype(x.dtype)
        if more:
            shares = [share + own for share, own in zip(shares, more, strict=True)]
        return {name: x + change * shares[i] for i, name in enumerate(self.shift_names)}

    def heads_of(self, x: jax.Array) -> jax.Array:
        return split_heads(x, self.heads)

    def finish(self, x: jax.Array, out: jax.Array) -> jax.Array:
        return self.output(merge_heads(out))

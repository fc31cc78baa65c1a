"""Hopfield layers: association of a set with itself, with a memory, or with learned patterns."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from memseq.layers.common.base import state_dataclass
from memseq.layers.common.parts import hidden, merge_heads, split_heads
from memseq.pallas_kernels import hopfield_retrieve
from memseq.pallas_kernels.common.checks import check_array, check_choice, check_count

LEARNED_BETA = (None, "shared", "per_head")


@state_dataclass
class HopfieldState:
    """What a Hopfield layer has stored.

    Attributes:
        key: [batch, patterns, stored_heads, dim], what states are compared with and move towards.
        value: [batch, patterns, stored_heads, value_dim], what is read; None reads `key`.
        mask: bool [batch, patterns], True takes part; batch may be 1 in all three.
    """

    key: jax.Array
    value: jax.Array | None
    mask: jax.Array


class Hopfield(nn.Module):
    """A modern Hopfield network as a layer (Ramsauer et al. 2020, arXiv:2008.02217, section 3).

        out = softmax(beta state K^T) V,  after steps - 1 times  state <- softmax(beta state K^T) K

    with state = R W_Q, K = Y W_K and V = Y W_V of state patterns R and stored patterns Y; here all
    steps but the last move the state among the keys, which lowers its energy, and values are read
    once (the paper's section 3 with separate values). Without `stored` a set is associated with
    itself. A member that is masked out gives 0, and so does one that sees nothing.

    Attributes:
        features: size of the input's and output's last axis.
        heads: associations side by side.
        head_dim: size of a state and a key per head; None is features / heads, or features where
            one of them is not projected.
        value_dim: size of a value per head; None is features / heads.
        beta: inverse temperature, or what it starts from where it is learned; None is
            head_dim ** -0.5.
        learned_beta: None, "shared" by the heads, or "per_head".
        steps: softmaxes taken, at least 1.
        separation: "softmax", "softmax_n", "entmax", "sparsemax" or "budget".
        alpha: of "entmax", or what it starts from.
        learned_alpha: learn alpha in (1, 2), one number for all heads.
        learned_sink: learn the logit of "softmax_n" per head; it starts from 0.
        budget: of "budget".
        state_norm: of every new state: None, "l2", "layer" or "tanh".
        tolerance, gradient: see `hopfield_retrieve`.
        project: which of query, key, value and output are projected. What is not is taken as it
            comes, whole by every head.
        shared_map: query and key are projected by the same matrix, without bias.
        normalize: layer norms of state, stored and value patterns before their projections.
        use_bias: biases of the projections.
        bias_pattern: a learned pattern of every head that is always stored.
        dropout: share of stored patterns that a call in training does not see.
        implementation, chunk_size, dtype, param_dtype: as in every layer.
    """

    features: int
    heads: int = 4
    implementation: str = "auto"
    chunk_size: int | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    head_dim: int | None = None
    value_dim: int | None = None
    beta: float | None = None
    learned_beta: str | None = None
    steps: int = 1
    separation: str = "softmax"
    alpha: float = 1.5
    learned_alpha: bool = False
    learned_sink: bool = False
    budget: int | None = None
    state_norm: str | None = None
    tolerance: float | None = None
    gradient: str = "unrolled"
    project: tuple[bool, bool, bool, bool] = (True, True, True, True)
    shared_map: bool = False
    normalize: tuple[bool, bool, bool] = (True, True, True)
    use_bias: bool = True
    bias_pattern: bool = False
    dropout: float = 0.0

    PAPER: ClassVar[str] = "Ramsauer et al. 2020, arXiv:2008.02217"
    MEMORY: ClassVar[str] = "stored patterns 2 x [patterns, heads, head_dim]"
    OPERATION: ClassVar[str] = "hopfield_retrieve"

    @classmethod
    def retrieval_only(cls, features: int, beta: float, steps: int = 1, **options) -> "Hopfield":
        """The network itself: nothing projected, normed or learned, so `init` has no parameters.

        pattern = layer.apply({}, query, stored=patterns)
        """
        bare = {"heads": 1, "project": (False,) * 4, "normalize": (False,) * 3}
        return cls(features, beta=beta, steps=steps, **bare | options)

    def setup(self):
        check_choice("learned_beta", self.learned_beta, LEARNED_BETA)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a share in [0, 1), got {self.dropout!r}")
        query, key, value, output = self.project
        head_dim, value_dim = self.dims()
        if self.shared_map and not (query and key):
            raise ValueError(
                f"shared_map: expected query and key to be projected, got project {self.project}"
            )
        self.query_norm, self.stored_norm, self.value_norm = (
            nn.LayerNorm(dtype=self.dtype, param_dtype=self.param_dtype) if on else None
            for on in self.normalize
        )
        bias = self.use_bias and not self.shared_map
        self.key = self._dense(self.heads * head_dim, bias) if key else None
        self.query = None
        if query and not self.shared_map:
            self.query = self._dense(self.heads * head_dim, bias)
        self.value = self._dense(self.heads * value_dim, self.use_bias) if value else None
        self.output = self._dense(self.features, self.use_bias) if output else None
        if self.learned_beta is not None:
            start = head_dim**-0.5 if self.beta is None else self.beta
            shape = () if self.learned_beta == "shared" else (self.heads,)
            constant = nn.initializers.constant(jnp.log(start))
            self.log_beta = self.param("log_beta", constant, shape, jnp.float32)
        if self.learned_alpha:
            start = jnp.log(self.alpha - 1) - jnp.log(2 - self.alpha)
            constant = nn.initializers.constant(start)
            self.alpha_logit = self.param("alpha_logit", constant, (), jnp.float32)
        if self.learned_sink:
            zeros = nn.initializers.zeros
            self.sink_logits = self.param("sink_logits", zeros, (self.heads,), jnp.float32)
        if self.bias_pattern:
            shape, normal = (self.heads, head_dim), nn.initializers.normal(1.0)
            self.key_bias = self.param("pattern_key_bias", normal, shape, self.param_dtype)
            shape = (self.heads, value_dim if value else self.features)
            self.value_bias = self.param("pattern_value_bias", normal, shape, self.param_dtype)

    @nn.nowrap
    def dims(self) -> tuple[int, int]:
        """(size of a state and a key per head, size of a projected value per head)."""
        check_count("heads", self.heads, 1)
        for name in ("head_dim", "value_dim"):
            check_count(name, getattr(self, name), 1, optional=True)
        whole = not (self.project[0] and self.project[1])
        if whole and self.head_dim not in (None, self.features):
            raise ValueError(
                f"head_dim: expected features {self.features} where query or key is not "
                f"projected, got {self.head_dim}"
            )
        if (self.head_dim is None and not whole) or (self.value_dim is None and self.project[2]):
            if self.features % self.heads:
                raise ValueError(
                    f"heads: features {self.features} must be a multiple of it, or head_dim and "
                    f"value_dim be given; got heads {self.heads}"
                )
        share = self.features // self.heads
        head_dim = self.features if whole else share if self.head_dim is None else self.head_dim
        return head_dim, share if self.value_dim is None else self.value_dim

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        *,
        stored: jax.Array | None = None,
        values: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Associates x with what is stored.

        Args:
            x: state patterns [batch, n, features].
            mask: bool, True takes part: [batch, n] of x, or [batch, patterns] of `stored`.
            stored: [batch, patterns, features]; None stores x itself.
            values: [batch, patterns, features], what is read; None reads what is stored.
            deterministic: without dropout, which draws from the stream "dropout".

        Returns:
            y [batch, n, features].
        """
        self._check(x)
        if stored is None:
            x = hidden(x, mask)
        state = self.store(x if stored is None else stored, values, mask)
        y = self.read(x, state, deterministic)
        return y if stored is not None else hidden(y, mask)

    def store(
        self, stored: jax.Array, values: jax.Array | None = None, mask: jax.Array | None = None
    ) -> HopfieldState:
        """Keys and values of stored patterns [batch, patterns, features], to read many times."""
        check_array("stored", stored, (None, None, self.features), "[batch, patterns, features]")
        if values is not None:
            shape = (*stored.shape[:2], self.features)
            check_array("values", values, shape, "[batch, patterns, features]")
        batch, patterns = stored.shape[:2]
        given = stored if values is None else values
        if mask is None:
            mask = jnp.ones((batch, patterns), bool)
        else:
            if getattr(mask, "shape", None) != (batch, patterns) or mask.dtype != jnp.bool_:
                came = f"{getattr(mask, 'dtype', '')} {list(getattr(mask, 'shape', []))}"
                raise ValueError(
                    f"mask: expected bool [batch, patterns] = [{batch}, {patterns}], got {came}"
                )
            stored, given = hidden(stored, mask), hidden(given, mask)
        key = stored if self.stored_norm is None else self.stored_norm(stored)
        key = key[..., None, :] if self.key is None else split_heads(self.key(key), self.heads)
        if values is None and not self.project[2] and not self.normalize[2]:
            value = stored[..., None, :] if self.project[1] or self.normalize[1] else None
        else:
            value = given if self.value_norm is None else self.value_norm(given)
            value = value[..., None, :] if self.value is None else self.value(value)
            value = value if self.value is None else split_heads(value, self.heads)
        if self.bias_pattern:
            value = key if value is None else value
            key = self._with_pattern(key, self.key_bias)
            value = self._with_pattern(value, self.value_bias)
            mask = jnp.pad(mask, ((0, 0), (0, 1)), constant_values=True)
        if value is not None and value.shape[2] != key.shape[2]:
            key, value = (
                jnp.broadcast_to(x, (*x.shape[:2], self.heads, x.shape[3])) for x in (key, value)
            )
        return HopfieldState(key, value, mask)

    def read(self, x: jax.Array, state: HopfieldState, deterministic: bool = True) -> jax.Array:
        """y [batch, n, features] of state patterns x [batch, n, features]."""
        mask = state.mask
        if self.dropout and not deterministic:
            seen = 1 - self.dropout
            mask &= jax.random.bernoulli(self.make_rng("dropout"), seen, mask.shape)
        out = merge_heads(self._retrieve(x, state.replace(mask=mask), state.value, self.steps))
        y = out if self.output is None else self.output(out)
        present = state.mask[:, :-1] if self.bias_pattern else state.mask
        return hidden(y, jnp.any(present, axis=1, keepdims=True))

    def retrieve(
        self,
        x: jax.Array,
        stored: jax.Array | None = None,
        steps: int | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Where states end among the keys: [batch, n, heads, head_dim] after `steps`.

        Without projections and norms those are the patterns. None is the layer's own steps.
        """
        state = self.store(x if stored is None else stored, None, mask)
        return self._retrieve(x, state, None, self.steps if steps is None else steps)

    def energy(
        self, x: jax.Array, stored: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """Energies [batch, n, heads, steps] of the states that the steps start from."""
        state = self.store(x if stored is None else stored, None, mask)
        return self._retrieve(x, state, None, self.steps, return_energy=True)[1]

    def associations(
        self, x: jax.Array, stored: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """Weights [batch, heads, n, patterns] of the last step, the bias pattern's last."""
        state = self.store(x if stored is None else stored, None, mask)
        batch, patterns, stored_heads, _ = state.key.shape
        each = jnp.eye(patterns, dtype=state.key.dtype)[:, None]
        each = jnp.broadcast_to(each, (batch, patterns, stored_heads, patterns))
        return jnp.moveaxis(self._retrieve(x, state, each, self.steps), 2, 1)

    def _retrieve(self, x, state, values, steps, **options):
        self._check(x)
        query = x if self.query_norm is None else self.query_norm(x)
        project = self.key if self.shared_map else self.query
        if project is None:
            query = jnp.broadcast_to(
                query[..., None, :], (*query.shape[:-1], self.heads, query.shape[-1])
            )
        else:
            query = split_heads(project(query), self.heads)
        if self.separation == "softmax_n":
            options["sink"] = self.sink_logits if self.learned_sink else None
        alpha = 1 + nn.sigmoid(self.alpha_logit) if self.learned_alpha else self.alpha
        return hopfield_retrieve(
            query,
            state.key.astype(query.dtype),
            values if values is None else values.astype(query.dtype),
            beta=self.beta if self.learned_beta is None else jnp.exp(self.log_beta),
            steps=steps,
            separation=self.separation,
            alpha=alpha,
            budget=self.budget,
            mask=state.mask,
            state_norm=self.state_norm,
            tolerance=self.tolerance,
            gradient=self.gradient,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
            **options,
        )

    def _with_pattern(self, x, pattern):
        """x [batch, patterns, heads or 1, dim] with one more pattern of every head."""
        x = jnp.broadcast_to(x, (*x.shape[:2], self.heads, x.shape[3]))
        one = jnp.broadcast_to(pattern.astype(x.dtype), (x.shape[0], 1, *pattern.shape))
        return jnp.concatenate([x, one], axis=1)

    @nn.nowrap
    def _check(self, x):
        check_array("x", x, (None, None, self.features), "[batch, n, features]")

    @nn.nowrap
    def _dense(self, features, use_bias):
        return nn.Dense(features, use_bias=use_bias, dtype=self.dtype, param_dtype=self.param_dtype)

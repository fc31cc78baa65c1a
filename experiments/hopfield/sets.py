"""Sets with labels, a classifier of sets, and its training: what the studies here share."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from memseq.layers import SET_LAYERS


def bit_patterns(
    seed: int, *, bags: int, members: int, bits: int, signals: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bags of random bits; half of the bags hold one of a few secret patterns.

    Returns:
        x float32 [bags, members, bits] of 0 and 1, mask (all True), label int32 [bags].
    """
    rng = np.random.default_rng(seed)
    codes = rng.permutation(2**bits)
    secret, others = codes[:signals], codes[signals:]
    drawn = rng.choice(others, size=(bags, members))
    label = np.arange(bags) % 2
    place = rng.integers(members, size=bags)
    drawn[label == 1, place[label == 1]] = rng.choice(secret, size=int(label.sum()))
    order = rng.permutation(bags)
    x = (drawn[..., None] >> np.arange(bits)) & 1
    return (
        x[order].astype(np.float32),
        np.ones((bags, members), bool),
        label[order].astype(np.int32),
    )


def latch(
    seed: int, *, sequences: int, length: int, symbols: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences of symbols whose class is told by the first one (Hochreiter's latch task).

    The first symbol is one of two, the others are drawn from the rest: whoever finds the symbol
    that matters, wherever it stands, knows the class.

    Returns:
        x float32 [sequences, length, symbols], one-hot; mask (all True); label int32 [sequences].
    """
    rng = np.random.default_rng(seed)
    label = rng.integers(2, size=sequences)
    drawn = rng.integers(2, symbols, size=(sequences, length))
    drawn[:, 0] = label
    x = np.eye(symbols, dtype=np.float32)[drawn]
    return x, np.ones((sequences, length), bool), label.astype(np.int32)


def digit_sets(
    images: np.ndarray, digits: np.ndarray, seed: int, *, bags: int, members: int, target: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bags of 2 to `members` images; the label says whether one of them shows the digit `target`.

    images [n, pixels] of 0 to 16, as scikit-learn's bundled digits; digits int [n].

    Returns:
        x float32 [bags, members, pixels], mask bool [bags, members], label int32 [bags].
    """
    rng = np.random.default_rng(seed)
    wanted, others = (np.flatnonzero((digits == target) == is_it) for is_it in (True, False))
    size = rng.integers(2, members + 1, size=bags)
    mask = np.arange(members) < size[:, None]
    chosen = rng.choice(others, size=(bags, members))
    label = np.arange(bags) % 2
    place = rng.integers(size)
    rows = np.flatnonzero(label)
    chosen[rows, place[rows]] = rng.choice(wanted, size=len(rows))
    x = np.where(mask[..., None], images[chosen] / 8 - 1, 0).astype(np.float32)
    return x, mask, label.astype(np.int32)


class SetClassifier(nn.Module):
    """A linear embedding, a set layer, the mean over what it returns, and a logit a class.

    layer: a name of `memseq.layers.SET_LAYERS`; "" is none. options: pairs for its constructor.
    """

    layer: str
    features: int
    options: Any = ()
    classes: int = 2

    @nn.compact
    def __call__(self, x, mask, deterministic: bool = True):
        x = nn.Dense(self.features, name="embedding_in")(x)
        y = x
        if self.layer:
            layer = SET_LAYERS[self.layer](self.features, **dict(self.options), name="memory")
            y = layer(x, mask, deterministic=deterministic)
        y = jnp.where(mask[..., None], y, 0) if y is x else y
        if y.shape[1] == mask.shape[1]:
            y = y.sum(1) / jnp.maximum(mask.sum(1, keepdims=True), 1)
        else:
            y = y.reshape(y.shape[0], -1)
        return nn.Dense(self.classes, name="head")(y)


def train(
    model: nn.Module,
    train_data: tuple,
    test_data: tuple,
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    weight_decay: float,
    seed: int,
    report: Callable[[int, float, float], None] | None = None,
) -> list[tuple[int, float, float]]:
    """AdamW with gradients clipped to norm 1.

    Returns:
        (epoch, AUC of class 1, accuracy) on test_data, about twenty of them over the training.
    """
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(learning_rate, weight_decay=weight_decay)
    )
    x, mask, label = map(jnp.asarray, train_data)
    steps = len(label) // batch
    init, dropout = jax.random.split(jax.random.key(seed))
    params = model.init(init, x[:1], mask[:1])

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def epoch(params, state, key):
        order_key, key = jax.random.split(key)
        order = jax.random.permutation(order_key, len(label))[: steps * batch]

        def step(carry, chosen):
            params, state = carry
            rows, key = chosen

            def loss(params):
                logits = model.apply(
                    params, x[rows], mask[rows], deterministic=False, rngs={"dropout": key}
                )
                return optax.softmax_cross_entropy_with_integer_labels(logits, label[rows]).mean()

            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        chosen = order.reshape(steps, batch), jax.random.split(key, steps)
        return jax.lax.scan(step, (params, state), chosen)[0]

    predict = jax.jit(model.apply)
    state, found = optimizer.init(params), []
    for i in range(epochs):
        params, state = epoch(params, state, jax.random.fold_in(dropout, i))
        if (i + 1) % max(epochs // 20, 1) == 0 or i == epochs - 1:
            logits = np.asarray(predict(params, *test_data[:2]))
            accuracy = float((logits.argmax(-1) == test_data[2]).mean())
            found.append((i + 1, auc(logits[:, 1] - logits[:, 0], test_data[2]), accuracy))
            if report is not None:
                report(*found[-1])
    return found


def auc(score: np.ndarray, label: np.ndarray) -> float:
    """The share of pairs of a positive and a negative that the score puts in order."""
    positive, negative = score[label == 1], score[label == 0]
    above = (positive[:, None] > negative).mean() + (positive[:, None] == negative).mean() / 2
    return float(above)

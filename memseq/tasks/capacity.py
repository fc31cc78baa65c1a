"""How much a memory rule holds, in closed form: no training, no model, well under a CPU-second.

Random unit keys are bound to values drawn from `candidates` random unit vectors, a rule builds its
memory from the pairs in their order, and reading with each key must give an output nearest to the
right candidate. Three tables:

- `unique_keys`: every key is bound once; accuracy and signal-to-noise ratio against the number of
  pairs;
- `rewritten_keys`: every key is bound several times; how often the latest value comes back, and how
  often an older one;
- `forgetting`: every key is bound once; accuracy by age, from the oldest octile of the pairs to the
  newest.

For example, 32 pairs in 32 dimensions: a Hebbian matrix returns 97 % of the values, a delta-rule
matrix 77 % and a least-squares one all; but with 16 keys bound four times each the delta rule
returns 93 % of the latest values and the two others about a quarter. Capacity and rewriting rank
the rules in opposite order.

The rules in these terms, with the memory S `[key_dim, value_dim]` and the output S^T query:

    hebb            S = S + k v^T
    decay           S = decay S + k v^T
    delta           S = S + k (v - S^T k)^T, write strength 1
    least_squares   the smallest S of those with the least sum of |S^T k - v|^2 (mesa, no ridge)
    softmax         values weighted by softmax(beta query . k): keeps all pairs, no positions

Chance is 1 / candidates, 256 of them unless set otherwise.

Ceiling is reached by a reader that keeps the pairs and looks for the very key: keys differ.

The signal-to-noise ratio is the mean squared projection of an output on its true value over the
mean power of the rest per dimension; for the Hebbian matrix it is about `10 log10(dim * dim /
pairs)` decibel: 3 less for every doubling.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from memseq.tasks import base

SUMMARY = "closed form: how many pairs a memory rule holds, rewrites and forgets"
RULES = ("hebb", "decay", "delta", "least_squares", "softmax")
VARIANTS = {
    "tiny": {"dims": (32,), "loads": (0.5, 1, 2, 4), "correlations": (0.0,)},
    "paper": {
        "dims": (32, 64, 128),
        "loads": (0.25, 0.5, 1, 2, 4, 8),
        "correlations": (0.0, 0.5),
    },
}
CHANCE = 1 / 256
CEILING = 1.0
# Outputs of a rule that recalls exactly differ from the values by rounding only; the ratio of that
# means nothing.
EXACT_DB = 100.0

Row = dict[str, object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What all three tables take as keyword arguments.

    Attributes:
        dim: size of keys and of values.
        candidates: values among which an output must be nearest to its own.
        seeds: independent draws (seeds 0, 1, ...), over which rows are means.
        correlation: mean cosine between keys, in [0, 1).
        decay: of the rule "decay", in (0, 1].
        beta: of the rule "softmax".
        rules: names in `RULES`.
    """

    dim: int = 32
    candidates: int = 256
    seeds: int = 8
    correlation: float = 0.0
    decay: float = 0.95
    beta: float = 8.0
    rules: Sequence[str] = RULES

    def __post_init__(self):
        for name in ("dim", "candidates", "seeds"):
            base.check_integer(name, getattr(self, name), 1)
        if not 0 <= self.correlation < 1:
            raise ValueError(f"correlation: expected a cosine in [0, 1), got {self.correlation!r}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay: expected a factor in (0, 1], got {self.decay!r}")
        base.check_positive("beta", self.beta)
        for rule in self.rules:
            base.check_name("rules", rule, RULES)

    @classmethod
    def of(cls, **options) -> "Setting":
        for option in options:
            base.check_name("option", option, [field.name for field in dataclasses.fields(cls)])
        return cls(**options)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`left @ right`, a few rows at a time: BLAS then keeps to one thread.

    With several, products as small as these take twenty times as long on a busy machine.
    """
    rows = max(1, 2**17 // (right.shape[-2] * right.shape[-1]))
    starts = range(0, left.shape[-2], rows)
    return np.concatenate([left[..., at : at + rows, :] @ right for at in starts], axis=-2)


def memory_matrix(rule: str, keys: np.ndarray, values: np.ndarray, decay: float) -> np.ndarray:
    """The memory after all writes, `[..., key_dim, value_dim]`, of a rule that has a matrix.

    Args:
        rule: "hebb", "decay", "delta" or "least_squares".
        keys: `[..., pairs, key_dim]`, in the order of writing.
        values: `[..., pairs, value_dim]`.
        decay: what "decay" multiplies the memory by before each write, in (0, 1].
    """
    base.check_name("rule", rule, [name for name in RULES if name != "softmax"])
    transposed = np.swapaxes(keys, -1, -2)
    if rule == "hebb":
        return _product(transposed, values)
    if rule == "decay":
        age = np.arange(keys.shape[-2])[::-1, None]
        return _product(transposed, decay**age * values)
    if rule == "least_squares":
        # From the two sums k k^T and k v^T that the rule carries. Directions without any key have
        # eigenvalues of rounding, well below the cutoff; those of random keys are well above it.
        inverse = np.linalg.pinv(_product(transposed, keys), rcond=1e-13, hermitian=True)
        return _product(inverse, _product(transposed, values))
    memory = np.zeros((*keys.shape[:-2], keys.shape[-1], values.shape[-1]), keys.dtype)
    for key, value in zip(np.moveaxis(keys, -2, 0), np.moveaxis(values, -2, 0), strict=True):
        error = value - np.einsum("...kv,...k->...v", memory, key)
        memory += key[..., :, None] * error[..., None, :]
    return memory


def recall(
    rule: str, keys: np.ndarray, values: np.ndarray, queries: np.ndarray, decay: float, beta: float
) -> np.ndarray:
    """What each query reads after all writes, `[..., queries, value_dim]`; arguments as above."""
    if rule != "softmax":
        return _product(queries, memory_matrix(rule, keys, values, decay))
    score = beta * _product(queries, np.swapaxes(keys, -1, -2))
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    weight /= weight.sum(axis=-1, keepdims=True)
    return _product(weight, values)


def state_bytes(rule: str, pairs: int, dim: int) -> int:
    """float32 bytes that a rule carries: softmax all pairs, least squares two sums, others S."""
    base.check_name("rule", rule, RULES)
    return 4 * {"softmax": 2 * pairs * dim, "least_squares": 2 * dim * dim}.get(rule, dim * dim)


def _unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _draw(seed: int, pairs: int, writes: int, setting: Setting) -> tuple[np.ndarray, ...]:
    """Keys `[pairs, dim]`, candidates `[candidates, dim]`, numbers of the values `[pairs, writes]`.

    A key's values differ from each other; different keys may share a value.
    """
    rng = np.random.default_rng(seed)
    keys = _unit(rng, pairs, setting.dim)
    table = _unit(rng, setting.candidates, setting.dim)
    numbers = [rng.choice(setting.candidates, writes, replace=False) for _ in range(pairs)]
    if setting.correlation:
        # A direction that all keys share and a part of their own, which is made orthogonal to it.
        shared = _unit(rng, 1, setting.dim)
        own = keys - np.sum(keys * shared, axis=-1, keepdims=True) * shared
        own /= np.linalg.norm(own, axis=-1, keepdims=True)
        keys = np.sqrt(setting.correlation) * shared + np.sqrt(1 - setting.correlation) * own
    return keys, table, np.stack(numbers)


def _probe(
    pairs: int, writes: int, setting: Setting
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Each rule with its outputs and the latest values, `[seeds, pairs, dim]`, and which write of
    each key came back, -1 for none, `[seeds, pairs]`."""
    base.check_integer("pairs", pairs, 1)
    base.check_integer("writes", writes, 1)
    if writes > setting.candidates:
        raise ValueError(
            f"writes: {writes} different values of a key need as many candidates, "
            f"got {setting.candidates}"
        )
    drawn = [_draw(seed, pairs, writes, setting) for seed in range(setting.seeds)]
    keys, table, numbers = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
    # All keys are written once, then all a second time, and so on.
    order = np.swapaxes(numbers, -1, -2).reshape(setting.seeds, -1)
    written = np.take_along_axis(table, order[..., None], axis=1)
    latest = np.take_along_axis(table, numbers[:, :, -1, None], axis=1)
    for rule in setting.rules:
        every_key = np.tile(keys, (1, writes, 1))
        out = recall(rule, every_key, written, keys, setting.decay, setting.beta)
        answer = np.argmax(_product(out, np.swapaxes(table, -1, -2)), axis=-1)
        match = numbers == answer[..., None]
        yield rule, out, latest, np.where(match.any(axis=-1), match.argmax(axis=-1), -1)


def _row(table: str, rule: str, pairs: int, setting: Setting, numbers: dict) -> Row:
    return {
        "table": table,
        "rule": rule,
        "dim": setting.dim,
        "correlation": setting.correlation,
        "pairs": pairs,
        **numbers,
        "state_bytes": state_bytes(rule, pairs * numbers.get("writes", 1), setting.dim),
    }


def unique_keys(loads: Sequence[float] = (0.5, 1, 2, 4), **options) -> list[Row]:
    """Accuracy and signal-to-noise ratio with `loads` times `dim` keys, each written once.

    `options` are the fields of `Setting`. Rows hold table "unique", rule, dim, correlation, pairs,
    load, accuracy, snr_db (at most 100.0, which stands for exact recall) and state_bytes.
    """
    setting = Setting.of(**options)
    rows = []
    for load in loads:
        pairs = round(base.check_positive("loads", load) * setting.dim)
        for rule, out, values, which in _probe(pairs, 1, setting):
            signal = np.sum(out * values, axis=-1, keepdims=True)
            noise = np.mean(np.sum((out - signal * values) ** 2, axis=-1)) / setting.dim
            snr = 10 * np.log10(np.mean(signal**2) / max(noise, np.finfo(float).tiny))
            numbers = {
                "load": float(load),
                "accuracy": float(np.mean(which == 0)),
                "snr_db": float(min(snr, EXACT_DB)),
            }
            rows.append(_row("unique", rule, pairs, setting, numbers))
    return rows


def rewritten_keys(pairs: Sequence[int] = (16, 32), writes: int = 4, **options) -> list[Row]:
    """How often the latest of a key's `writes` values comes back, and how often an older one.

    The keys are written in turn, `writes` times over. `options` are the fields of `Setting`, but
    `decay` is 0.9 here unless it is given. Rows hold table "rewrite", rule, dim, correlation,
    pairs, writes, accuracy (the latest value), stale (an older value of the same key) and
    state_bytes.
    """
    setting = Setting.of(**{"decay": 0.9, **options})
    rows = []
    for count in pairs:
        for rule, _, _, which in _probe(count, writes, setting):
            latest = which == writes - 1
            numbers = {
                "writes": writes,
                "accuracy": float(np.mean(latest)),
                "stale": float(np.mean((which >= 0) & ~latest)),
            }
            rows.append(_row("rewrite", rule, count, setting, numbers))
    return rows


def forgetting(pairs: int = 64, octiles: int = 8, **options) -> list[Row]:
    """Accuracy by the age of the pair: `octiles` equal groups, from 1, the oldest, to the newest.

    `pairs` must be a multiple of `octiles`; `options` are the fields of `Setting`. Rows hold table
    "forgetting", rule, dim, correlation, pairs, octile, accuracy and state_bytes.
    """
    setting = Setting.of(**options)
    base.check_integer("octiles", octiles, 1)
    if base.check_integer("pairs", pairs, 1) % octiles:
        raise ValueError(f"pairs: expected a multiple of octiles, {octiles}, got {pairs}")
    rows = []
    for rule, _, _, which in _probe(pairs, 1, setting):
        for octile, right in enumerate(np.split(which == 0, octiles, axis=1), start=1):
            numbers = {"octile": octile, "accuracy": float(np.mean(right))}
            rows.append(_row("forgetting", rule, pairs, setting, numbers))
    return rows


def table(variant: str = "tiny", **options) -> list[Row]:
    """The rows of all three tables for a preset's sizes; `options` are fields of `Setting`.

    "tiny" (0.1 CPU-seconds) is one size with independent keys; "paper" has three sizes, more loads
    and correlated keys.
    """
    base.check_name("variant", variant, VARIANTS)
    sizes = VARIANTS[variant]
    rows = []
    for dim, correlation in itertools.product(sizes["dims"], sizes["correlations"]):
        setting = {"dim": dim, "correlation": correlation, **options}
        rows += unique_keys(sizes["loads"], **setting)
        rows += rewritten_keys((dim // 2, dim), **setting)
        rows += forgetting(2 * dim, **setting)
    return rows


def pairs_at(rows: Sequence[Row], accuracy: float = 0.9) -> dict[tuple[str, int, float], float]:
    """(rule, dim, correlation) -> how many pairs rows of `unique_keys` return with that accuracy.

    Interpolated linearly in the logarithm of the number of pairs at the first crossing; infinity
    where no row falls below, and 0 where the smallest row already does.
    """
    curves: dict[tuple[str, int, float], list[tuple[int, float]]] = {}
    for row in rows:
        if row["table"] == "unique":
            curve = curves.setdefault((row["rule"], row["dim"], row["correlation"]), [])
            curve.append((row["pairs"], row["accuracy"]))
    found = {}
    for name, curve in curves.items():
        curve.sort()
        below = next((i for i, (_, got) in enumerate(curve) if got < accuracy), None)
        if not below:
            found[name] = float("inf") if below is None else 0.0
            continue
        (few, high), (many, low) = curve[below - 1 : below + 1]
        found[name] = float(few * (many / few) ** ((high - accuracy) / (high - low)))
    return found

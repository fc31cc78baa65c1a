"""`hopfield_retrieve`: arguments, checks and dispatch."""

import dataclasses
import numbers

import jax
import jax.numpy as jnp

from memseq.pallas_kernels.common import checks
from memseq.pallas_kernels.common.dispatch import Forms, run
from memseq.pallas_kernels.hopfield_retrieve.chunked import chunked
from memseq.pallas_kernels.hopfield_retrieve.iterate import GRADIENTS
from memseq.pallas_kernels.hopfield_retrieve.mosaic_tpu import MOSAIC_TPU
from memseq.pallas_kernels.hopfield_retrieve.reference import reference
from memseq.pallas_kernels.hopfield_retrieve.separation import SEPARATIONS, STATE_NORMS

FORMS = Forms("hopfield_retrieve", reference, chunked, MOSAIC_TPU)


def hopfield_retrieve(
    query: jax.Array,
    stored: jax.Array,
    values: jax.Array | None = None,
    *,
    beta: float | jax.Array | None = None,
    steps: int = 1,
    separation: str = "softmax",
    alpha: float | jax.Array = 1.5,
    sink: float | jax.Array | None = None,
    budget: int | None = None,
    mask: jax.Array | None = None,
    causal: bool = False,
    state_norm: str | None = None,
    gradient: str = "unrolled",
    tolerance: float | None = None,
    return_energy: bool = False,
    chunk_size: int | None = None,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Retrieval from a modern Hopfield network: steps towards stored patterns, then one read.

        state <- Y^T p(beta Y state)      (steps - 1 times, from state = query)
        out    = V^T p(beta Y state)

    Ramsauer et al. 2020, arXiv:2008.02217, equations 3 and 10, with stored patterns Y and values
    V; p is softmax or another map from scores to weights. Where V is Y every step lowers

        energy = |state|^2 / 2 - conjugate(beta Y state) / beta

    by at least half the square of the step (for softmax the conjugate is log-sum-exp; constants
    are left out). One step with beta = dim ** -0.5 and values is attention.

    Separations: "softmax"; "softmax_n", softmax with a logit `sink` that has weight and carries
    nothing (Hu et al. 2024, arXiv:2404.03828); "entmax" and "sparsemax" (Hu et al. 2023,
    arXiv:2309.12673; Wu et al. 2023, arXiv:2312.17346; Santos et al. 2024, arXiv:2411.08590);
    "budget", weights in [0, 1] of sum `budget` (k-subsets of the last).

    Args:
        query: [batch, queries, heads, dim], floating.
        stored: [batch, patterns, stored_heads, dim]; batch may be 1: patterns that all rows share.
            Query head h reads stored head h // (heads // stored_heads).
        values: [batch, patterns, stored_heads, value_dim], batch as stored's; None reads stored.
        beta: inverse temperature, > 0; a number or [heads]. None is dim ** -0.5.
        steps: softmaxes taken, the read included; at least 1.
        alpha: of "entmax", in [1, 2]; a number or [heads].
        sink: logit of "softmax_n"; a number or [heads], None is 0. exp(sink) is its n.
        budget: of "budget", at least 1.
        mask: bool [batch, patterns] or [batch, queries, patterns]; True takes part. A query for
            which nothing does gives 0.
        causal: query i sees patterns 0 to i, at every step; as many patterns as queries.
        state_norm: what every new state goes through: "l2", "layer", "tanh" or None. Values that
            are read do not; the energy's first term is then another, and holds for states that
            went through it.
        gradient: of the steps before the read: "unrolled"; "last", none of them; "implicit", that
            of a fixed point, which the steps must have come close to. The last two give the query
            none where steps > 1.
        tolerance: a query whose state moved by no more than this in every coordinate takes no
            further steps; where none takes any, no time is spent. None takes all steps.
        return_energy: also return the energies.
        chunk_size: stored patterns that are taken together, at most; changes speed only.
        implementation: "auto", or one of `FORMS.available`.

    Returns:
        out [batch, queries, heads, value_dim], in the dtype of values (of query without them), and
        with `return_energy` the energies [batch, queries, heads, steps] of the state that each
        step started from. States, weights and energies are float32 (float64 if an input is).

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, at trace time.
    """
    checks.check_array("query", query, (None,) * 4, "[batch, queries, heads, dim]")
    batch, queries, heads, dim = query.shape
    _check_batch("stored", stored, batch)
    checks.check_array(
        "stored", stored, (None, None, None, dim), "[batch or 1, patterns, stored_heads, dim]"
    )
    rows, patterns, stored_heads, _ = stored.shape
    if patterns == 0:
        raise ValueError("stored: expected at least one pattern, got none")
    if values is not None:
        checks.check_array(
            "values",
            values,
            (rows, patterns, stored_heads, None),
            "[batch as stored, patterns, stored_heads, value_dim]",
        )
    checks.check_heads(stored_heads, heads, "query")
    checks.check_count("steps", steps, 1)
    checks.check_choice("separation", separation, SEPARATIONS)
    checks.check_choice("gradient", gradient, GRADIENTS)
    checks.check_choice("state_norm", state_norm, STATE_NORMS)
    checks.check_chunk_size(chunk_size)
    checks.check_count("budget", budget, 1, optional=separation != "budget")
    if causal and queries != patterns:
        raise ValueError(
            f"causal: expected as many stored patterns as queries, got {patterns} patterns and "
            f"{queries} queries"
        )
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance: expected a number >= 0 or None, got {tolerance!r}")
    arrays = (query, stored, values, *(x for x in (beta, alpha, sink) if hasattr(x, "dtype")))
    dtype = checks.state_dtype(*arrays)
    group = (stored_heads, heads // stored_heads)
    beta = dim**-0.5 if beta is None else beta
    beta = _by_head("beta", beta, heads, dtype, lambda b: b > 0, "a number > 0").reshape(group)
    if separation == "entmax":
        wanted = (lambda a: 1 <= a <= 2, "a number in [1, 2]")
        alpha = _by_head("alpha", alpha, heads, dtype, *wanted).reshape(group)
    else:
        alpha = None
    if separation == "softmax_n":
        sink = _by_head("sink", 0 if sink is None else sink, heads, dtype).reshape(group)
    elif sink is not None:
        raise ValueError(f"sink: only separation 'softmax_n' has one, not {separation!r}")

    mask = _mask(mask, batch, queries, patterns)
    position = jnp.arange(queries, dtype=jnp.int32)[None] if causal else None
    given = query
    if rows == 1 < batch:  # shared patterns see one long row of queries
        query = query.reshape(1, batch * queries, heads, dim)
        position = None if position is None else jnp.tile(position, (1, batch))
        if mask is not None and (mask.shape[0] > 1 or mask.shape[1] > 1):
            mask = jnp.broadcast_to(mask, (batch, queries, patterns))
            mask = mask.reshape(1, batch * queries, patterns)
    query = query.reshape(*query.shape[:2], *group, dim)
    out, energies = run(
        dataclasses.replace(FORMS, **_axes(rows, mask)),
        implementation,
        max(query.shape[1], patterns),
        (query, stored, values, beta, alpha, sink, mask, position),
        separation=separation,
        budget=budget,
        dtype=dtype,
        chunk_size=chunk_size,
        steps=steps,
        gradient=gradient,
        tolerance=tolerance,
        state_norm=state_norm,
        energies=return_energy,
    )
    out = out.reshape(*given.shape[:3], out.shape[-1])
    return (out, energies.reshape(*given.shape[:3], steps)) if return_energy else out


def _axes(rows, mask):
    """Which dimensions of the forms' arrays devices split: of one row of stored patterns, queries.

    A mask that all rows or all queries share is not split with them.
    """
    batch, queries = ("1", "b") if rows == 1 else ("b", "q")
    query, stored = f"{batch}{queries}hg", f"{batch}nh"
    seen = ""
    if mask is not None:
        first, second = (
            x if n > 1 else "1" for x, n in zip(batch + queries, mask.shape[:2], strict=True)
        )
        seen = f"{first}{second}n"
    arrays = (f"{query}d", f"{stored}d", f"{stored}v", "hg", "hg", "hg", seen, f"1{queries}")
    return {"axes": arrays, "out_axes": (f"{query}v", f"{query}s")}


def _check_batch(name, x, batch):
    if getattr(x, "ndim", 0) == 4 and x.shape[0] not in (1, batch):
        raise ValueError(f"{name}: expected batch {batch} or 1, got {x.shape[0]}")


def _by_head(name, value, heads, dtype, fits=lambda value: True, wanted="a number"):
    """A number or [heads] as [heads]; numbers must fit."""
    if isinstance(value, numbers.Real):
        if not fits(value):
            raise ValueError(f"{name}: expected {wanted} or [heads], got {value!r}")
    elif getattr(value, "shape", None) not in ((), (heads,)):
        came = getattr(value, "shape", type(value).__name__)
        raise ValueError(f"{name}: expected {wanted} or [heads] = [{heads}], got {came}")
    return jnp.broadcast_to(jnp.asarray(value, dtype), (heads,))


def _mask(mask, batch, queries, patterns):
    """bool [batch or 1, queries or 1, patterns], or None."""
    if mask is None:
        return None
    if getattr(mask, "dtype", None) != jnp.bool_:
        came = getattr(mask, "dtype", type(mask).__name__)
        raise ValueError(f"mask: expected bool, True takes part, got {came}")
    given = list(mask.shape)
    mask = mask[:, None] if mask.ndim == 2 else mask
    if (
        mask.ndim != 3
        or any(
            got not in (1, want) for got, want in zip(mask.shape, (batch, queries), strict=False)
        )
        or mask.shape[2] != patterns
    ):
        raise ValueError(
            f"mask: expected [batch, patterns] = [{batch}, {patterns}] or [batch, queries, "
            f"patterns] = [{batch}, {queries}, {patterns}], got {given}"
        )
    return mask

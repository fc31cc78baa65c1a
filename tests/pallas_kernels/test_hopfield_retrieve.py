"""`hopfield_retrieve`: its forms against the equations, its gradients, masks, memory, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.pallas_kernels import attention, hopfield_retrieve
from tests.pallas_kernels.harness import (
    assert_close,
    assert_same,
    check_16_bit,
    check_agreement,
    check_transforms,
    with_gradients,
)
from tests.pallas_kernels.test_entmax import by_bisection


def weights(z, separation, alpha, sink, budget):
    """(p, conjugate) of one row of scores that all take part, from the definitions."""
    if separation in ("softmax", "softmax_n"):
        top = max(z.max(), sink)
        total = np.exp(z - top).sum() + np.exp(sink - top)
        return np.exp(z - top) / total, top + np.log(total)
    if separation == "budget":
        low, high = z.min() - 1, z.max()
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (
                (middle, high) if np.clip(z - middle, 0, 1).sum() >= budget else (low, middle)
            )
        p = np.clip(z - low, 0, 1) if budget < len(z) else np.ones_like(z)
        return p, p @ z - p @ p / 2
    alpha = 2 if separation == "sparsemax" else alpha
    p = by_bisection(z, alpha)
    return p, p @ z - (p**alpha - p).sum() / (alpha * (alpha - 1))


NORMS = {
    None: lambda x: x,
    "l2": lambda x: x / np.sqrt(x @ x + 1e-12),
    "layer": lambda x: (x - x.mean()) / np.sqrt(x.var() + 1e-5),
    "tanh": np.tanh,
}


def oracle(
    query,
    stored,
    values=None,
    beta=None,
    alpha=1.5,
    sink=None,
    *,
    steps=1,
    separation="softmax",
    budget=None,
    mask=None,
    causal=False,
    state_norm=None,
    return_energy=False,
):
    """One query of one head at a time."""
    batch, queries, heads, dim = query.shape
    patterns = stored.shape[1]
    per_head = [
        np.broadcast_to(x, heads)
        for x in (dim**-0.5 if beta is None else beta, alpha, 0 if sink is None else sink)
    ]
    if separation == "softmax":
        per_head[2] = np.full(heads, -np.inf)
    out = np.zeros((batch, queries, heads, (stored if values is None else values).shape[-1]))
    energies = np.zeros((batch, queries, heads, steps))
    for b, i, h in np.ndindex(batch, queries, heads):
        row = 0 if stored.shape[0] == 1 else b
        head = h // (heads // stored.shape[2])
        part = np.ones(patterns, bool)
        if mask is not None:
            part &= mask[b] if mask.ndim == 2 else mask[b, i]
        if causal:
            part &= np.arange(patterns) <= i
        y = stored[row, part, head]
        state = query[b, i, h]
        for step in range(steps):
            p, conjugate = np.zeros(0), 0
            if part.any():
                p, conjugate = weights(
                    per_head[0][h] * y @ state, separation, per_head[1][h], per_head[2][h], budget
                )
            first = state @ state / 2
            if state_norm in ("l2", "layer"):
                first = 0
            elif state_norm == "tanh":
                up, down = (1 + np.clip(state, -1, 1)) / 2, (1 - np.clip(state, -1, 1)) / 2
                first = sum(a @ np.log(np.where(a > 0, a, 1)) for a in (up, down))
            energies[b, i, h, step] = first - conjugate / per_head[0][h]
            if step == steps - 1 and values is not None:
                state = p @ values[row, part, head]
            else:
                state = NORMS[state_norm](p @ y)
        out[b, i, h] = state
    return (out, energies) if return_energy else out


def build(queries, patterns, batch=2, heads=2, stored_heads=2, rows=None, values=True, **options):
    """Inputs and options; `rows` is the batch of what is stored."""
    rng = np.random.default_rng(0)
    rows = batch if rows is None else rows
    inputs = {
        "query": rng.normal(size=(batch, queries, heads, 5)),
        "stored": rng.normal(size=(rows, patterns, stored_heads, 5)),
    }
    if values:
        inputs["values"] = rng.normal(size=(rows, patterns, stored_heads, 3))
    inputs["beta"] = rng.uniform(0.3, 1.5, heads)
    if options.get("separation") == "softmax_n":
        inputs["sink"] = rng.normal(size=heads)
    if options.get("separation") == "entmax":
        inputs["alpha"] = rng.uniform(1.2, 1.9, heads)
    if "mask" in options:
        shape = (batch, patterns) if options["mask"] == 2 else (batch, queries, patterns)
        options["mask"] = rng.random(shape) < 0.6
        options["mask"][0, ..., :1] = True
    return inputs, options, rng


CASES = {
    "no values, tiles": build(9, 10, values=False, steps=3, chunk_size=4, return_energy=True),
    "shared by grouped heads, mask": build(
        5, 9, batch=3, rows=1, heads=4, mask=2, steps=2, chunk_size=8
    ),
    "sink, mask of queries": build(
        7, 11, separation="softmax_n", mask=3, steps=3, chunk_size=8, return_energy=True
    ),
    "causal": build(13, 13, causal=True, steps=2, chunk_size=8),
    "entmax": build(5, 9, separation="entmax", steps=2, chunk_size=8, return_energy=True),
    "tanh, budget": build(
        5, 9, state_norm="tanh", steps=2, separation="budget", budget=3, values=False, mask=3
    ),
}


SLOW_CASES = ("sink, mask of queries", "tanh, budget", "no values, tiles")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW_CASES else []) for n in CASES]
)
def test_forms_agree(name):
    inputs, options, rng = CASES[name]
    check_agreement(hopfield_retrieve, oracle, inputs, options, rng)


@pytest.mark.parametrize("state_norm", [None, "l2", "layer", "tanh"])
@pytest.mark.parametrize("separation", ["softmax", "sparsemax"])
def test_state_norms_and_energies(separation, state_norm):
    options = {"state_norm": state_norm, "separation": separation, "return_energy": True}
    inputs, options, _ = build(4, 9, values=False, steps=3, **options)
    with jax.enable_x64(True):
        found = jax.jit(lambda x: hopfield_retrieve(**x, **options))(inputs)
    assert_close(found, oracle(**inputs, **options), 1e-9)


def test_16_bit_inputs():
    inputs, options, rng = build(70, 90, separation="softmax_n", steps=2, mask=2, chunk_size=64)
    check_16_bit(hopfield_retrieve, inputs, options, rng)


def test_one_step_is_attention():
    """H6: one step at the default beta, against our own operation and against jax.nn."""
    inputs, _, _ = build(6, 9)
    arrays = [jnp.asarray(inputs[k], jnp.float32) for k in ("query", "stored", "values")]
    out = hopfield_retrieve(*arrays)
    wide = [*arrays[:2], jnp.pad(arrays[2], [(0, 0)] * 3 + [(0, 2)])]
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(*wide)[..., :3], atol=1e-6)
    np.testing.assert_allclose(out, attention(*arrays, causal=False), atol=1e-6)
    twice = hopfield_retrieve(hopfield_retrieve(*arrays[:2]), *arrays[1:])
    np.testing.assert_allclose(hopfield_retrieve(*arrays, steps=2), twice, atol=1e-6)


def test_causal_steps_are_decoding_one_by_one():
    """H6: each query walks on its own prefix only, at every step."""
    inputs, _, _ = build(9, 9)
    query, stored, values = (
        jnp.asarray(inputs[k], jnp.float32) for k in ("query", "stored", "values")
    )
    whole = hopfield_retrieve(query, stored, values, beta=2.0, steps=3, causal=True)
    for t in (0, 4, 8):
        one = hopfield_retrieve(
            query[:, t : t + 1], stored[:, : t + 1], values[:, : t + 1], beta=2.0, steps=3
        )
        np.testing.assert_allclose(one[:, 0], whole[:, t], atol=1e-5)


@pytest.fixture(scope="module")
def grad_call():
    """The chunked form, causal and masked, with its gradients, compiled once."""
    inputs, _, rng = build(40, 40, steps=2)
    inputs = {k: x.astype(np.float32) for k, x in inputs.items()}

    def run(inputs, cotangent, mask):
        options = {"causal": True, "mask": mask, "steps": 3, "chunk_size": 32}
        call = with_gradients(lambda x: hopfield_retrieve(**x, **options, implementation="chunked"))
        return call(inputs, cotangent)

    cotangent = rng.normal(size=(2, 40, 2, 3)).astype(np.float32)
    return jax.jit(run), inputs, cotangent, np.ones((2, 40), bool)


def changed(inputs, where):
    return {k: x if x.ndim < 4 else _changed(x, where) for k, x in inputs.items()}


def _changed(x, where):
    x = x.copy()
    x[where] = 2 - 3 * x[where]
    return x


def test_the_future_changes_nothing(grad_call):
    call, inputs, cotangent, mask = grad_call
    cotangent = cotangent.copy()
    cotangent[:, 21:] = 0
    out, gradients = call(inputs, cotangent, mask)
    other, others = call(changed(inputs, np.s_[:, 21:]), cotangent, mask)
    assert (np.asarray(out)[:, 21:] != np.asarray(other)[:, 21:]).any()
    assert_same(other[:, :21], out[:, :21])
    for name in ("query", "stored", "values"):
        assert_same(others[name][:, :21], gradients[name][:, :21], name)
        assert not np.asarray(gradients[name][:, 21:]).any()


def test_rows_of_a_batch_are_alone(grad_call):
    """Peer defect 3: bitwise, whatever batch-mates hold."""
    call, inputs, cotangent, mask = grad_call
    result, other = (call(x, cotangent, mask) for x in (inputs, changed(inputs, np.s_[1:])))
    for name in ("query", "stored", "values"):
        assert_same(other[1][name][:1], result[1][name][:1])
    assert_same(other[0][:1], result[0][:1])
    assert (np.asarray(other[0][1]) != np.asarray(result[0][1])).any()


def test_hidden_patterns_and_empty_rows(grad_call):
    """Peer defect 4: a row without patterns is 0, with gradients 0; what is hidden has none."""
    call, inputs, cotangent, mask = grad_call
    mask = mask.copy()
    mask[0], mask[1, 5:9] = False, False
    out, gradients = call(inputs, cotangent, mask)
    assert not np.asarray(out[0]).any()
    for name in ("query", "stored", "values"):
        assert np.isfinite(gradients[name]).all()
        assert not np.asarray(gradients[name][0]).any()
    other = changed(inputs, np.s_[1, 5:9])
    other["query"] = inputs["query"]
    assert_same(call(other, cotangent, mask)[0], out)
    assert not np.asarray(gradients["values"][1, 5:9]).any()
    for separation in ("softmax", "softmax_n", "entmax", "sparsemax", "budget"):
        options = {"separation": separation, "steps": 2, "mask": np.zeros((2, 40), bool)}
        options["budget"] = 2 if separation == "budget" else None

        def few(query, options=options):
            return hopfield_retrieve(
                query, *(inputs[k] for k in ("stored", "values")), **options, return_energy=True
            )

        out, energy = jax.jit(few)(inputs["query"][:, :4])
        assert not np.asarray(out).any() and np.isfinite(energy).all()


def contractive(**options):
    """Patterns apart enough, and queries near them, for steps to close in on a fixed point."""
    rng = np.random.default_rng(3)
    stored = rng.normal(size=(1, 6, 1, 4)) * 1.5
    query = stored[:, :3] + 0.1 * rng.normal(size=(1, 3, 1, 4))
    inputs = {"query": query, "stored": stored, "beta": np.array([0.8])}
    if options.pop("values", True):
        inputs["values"] = rng.normal(size=(1, 6, 1, 2))
    return inputs, options, rng


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"separation": "entmax", "state_norm": "tanh", "values": False},
    ],
    ids=str,
)
def test_implicit_gradient_is_that_of_many_unrolled_steps(options):
    inputs, options, rng = contractive(**options)

    def gradients(gradient, form):
        def call(x):
            return hopfield_retrieve(
                **x, **options, steps=60, gradient=gradient, implementation=form, chunk_size=4
            )

        return lambda x, c: with_gradients(call)(x, c)

    with jax.enable_x64(True):
        shape = jax.eval_shape(lambda x: hopfield_retrieve(**x, **options), inputs)
        cotangent = rng.normal(size=shape.shape)
        unrolled, implicit, tiles = jax.jit(
            lambda x, c: [
                gradients(*pair)(x, c)
                for pair in (
                    ("unrolled", "reference"),
                    ("implicit", "reference"),
                    ("implicit", "chunked"),
                )
            ]
        )(inputs, cotangent)
    assert_same(implicit[0], unrolled[0])
    assert_close(tiles, implicit, 1e-9)
    assert not np.asarray(implicit[1]["query"]).any()
    np.testing.assert_allclose(unrolled[1]["query"], 0, atol=1e-7)
    for name in set(inputs) - {"query"}:
        assert np.abs(unrolled[1][name]).max() > 1e-3
        assert_close(implicit[1][name], unrolled[1][name], 1e-7, name)


def test_last_gradient_is_that_of_one_step_from_where_the_others_led():
    inputs, options, rng = contractive()
    with jax.enable_x64(True):
        cotangent = rng.normal(size=(1, 3, 1, 2))
        last = with_gradients(lambda x: hopfield_retrieve(**x, steps=3, gradient="last"))
        out, gradients = jax.jit(last)(inputs, cotangent)
        state = hopfield_retrieve(inputs["query"], inputs["stored"], beta=inputs["beta"], steps=2)
        one = with_gradients(lambda x: hopfield_retrieve(**x))
        want = jax.jit(one)(inputs | {"query": state}, cotangent)
    assert_close(out, want[0], 1e-12)
    assert not np.asarray(gradients.pop("query")).any()
    assert_close(gradients, {k: want[1][k] for k in gradients}, 1e-12)


def test_tolerance_stops_each_query_by_itself():
    """Peer defect 8: what a query gets does not depend on how long its batch-mates walk."""
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(1, 40, 1, 8)).astype(np.float32)
    near = stored[:, :5] + 0.01 * rng.normal(size=(1, 5, 1, 8)).astype(np.float32)
    far = rng.normal(size=(1, 5, 1, 8)).astype(np.float32) * 0.1

    def call(query, **options):
        return hopfield_retrieve(
            query, stored, beta=1.0, steps=40, return_energy=True, chunk_size=16, **options
        )

    for form in ("reference", "chunked"):
        run = jax.jit(lambda q, form=form: call(q, tolerance=1e-4, implementation=form))
        out, energy = run(np.concatenate([near, far], axis=1))
        alone, _ = run(np.concatenate([near, near], axis=1))
        assert_same(alone[:, :5], out[:, :5])
        full, _ = call(np.concatenate([near, far], axis=1), implementation=form)
        np.testing.assert_allclose(out, full, atol=2e-3)
        # a stopped query's energy stays what it was
        steps = np.diff(np.asarray(energy)[0, :, 0, :-1])
        assert (steps[:5, 20:] == 0).all() and (steps <= 1e-5).all()
        early, _ = call(near, tolerance=1e9, implementation=form)
        two, _ = hopfield_retrieve(near, stored, beta=1.0, steps=2, return_energy=True)
        np.testing.assert_allclose(early, two, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda q: call(q, tolerance=1e-4)[0].sum()))(far)
    assert np.isfinite(gradient).all() and np.asarray(gradient).any()


def test_memory_of_a_large_retrieval():
    """3 steps, 4,096 queries, 65,536 patterns: peak below twice inputs and outputs, by compiling.

    The whole matrix of scores alone would be 1 GiB.
    """
    query = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.float32)
    stored = jax.ShapeDtypeStruct((1, 65536, 1, 64), jnp.float32)

    def call(query, stored, values=None):
        return hopfield_retrieve(query, stored, values, steps=3, implementation="chunked")

    def both(cotangent, *arrays):
        out, pull = jax.vjp(call, *arrays)
        return out, pull(cotangent)

    for function, arrays in (
        (call, (query, stored)),
        (both, (query, query, stored)),
        (both, (query, query, stored, stored)),
    ):
        analysis = jax.jit(function).lower(*arrays).compile().memory_analysis()
        held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
        assert held + analysis.temp_size_in_bytes < 2 * held


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="its compiler holds more of them")
@pytest.mark.parametrize("options", [{"tolerance": 1e-3}, {"gradient": "implicit"}], ids=str)
def test_memory_of_other_ways_to_walk(options):
    query = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.float32)
    stored = jax.ShapeDtypeStruct((1, 65536, 1, 64), jnp.float32)
    call = with_gradients(
        lambda x: hopfield_retrieve(*x, steps=3, implementation="chunked", **options)
    )
    for arrays in ((query, stored), (query, stored, stored)):
        analysis = jax.jit(call).lower(arrays, query).compile().memory_analysis()
        held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
        assert held + analysis.temp_size_in_bytes < 2 * held


def test_second_derivatives_are_those_of_finite_differences():
    """Both forms carry the patterns through their loops: they could be wrong together."""
    rng = np.random.default_rng(0)
    query, stored = rng.normal(size=(1, 5, 1, 3)), rng.normal(size=(1, 7, 1, 3))
    direction = rng.normal(size=stored.shape)

    def loss(stored):
        options = {"beta": 1.3, "steps": 3, "chunk_size": 4, "implementation": "chunked"}
        return (hopfield_retrieve(query, stored, **options) ** 3).sum()

    with jax.enable_x64(True):
        found, below, above = jax.jit(
            lambda x, d: (
                jax.jvp(jax.grad(loss), (x,), (d,))[1],
                jax.grad(loss)(x - 1e-5 * d),
                jax.grad(loss)(x + 1e-5 * d),
            )
        )(stored, direction)
    assert_close(found, (np.asarray(above) - np.asarray(below)) / 2e-5, 1e-7)


def test_transforms():
    inputs, options, rng = build(
        6, 6, steps=2, separation="softmax_n", causal=True, chunk_size=4, return_energy=True
    )

    def call(form, x):
        return hopfield_retrieve(**x, **options, implementation=form)

    check_transforms(call, ("reference", "chunked"), inputs, ("beta", "sink"), rng)


def test_whole_numbers_are_temperatures():
    """Peer defect 5: beta=1 is beta=1.0."""
    inputs, _, _ = build(2, 3)
    del inputs["beta"]
    assert_same(hopfield_retrieve(**inputs, beta=1), hopfield_retrieve(**inputs, beta=1.0))

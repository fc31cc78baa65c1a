"""What the tests of the operations share: hard inputs, comparisons, values with their gradients."""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec


def assert_close(actual, expected, tolerance, what=""):
    """Both trees finite, and each leaf within tolerance x its largest expected magnitude."""
    actual, expected = (jax.tree.leaves_with_path(tree) for tree in (actual, expected))
    assert len(actual) == len(expected), what
    for (path, a), (_, e) in zip(actual, expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        label = f"{what} {jax.tree_util.keystr(path)}"
        assert np.isfinite(a).all() and np.isfinite(e).all(), f"{label} is not finite"
        largest = np.abs(e).max(initial=0)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * (largest or 1), err_msg=label)


def assert_same(actual, expected, what=""):
    """Equal to the last bit, and finite."""
    jax.tree.map(lambda a: np.testing.assert_(np.isfinite(a).all(), what), actual)
    jax.tree.map(lambda a, e: np.testing.assert_array_equal(a, e, err_msg=what), actual, expected)


def correlated_keys(rng, batch, time, heads, dim, cosine):
    """Unit vectors that have this cosine with one another, on average, in each row and head."""
    shared = _unit(rng.normal(size=(batch, 1, heads, dim)))
    own = rng.normal(size=(batch, time, heads, dim))
    own = _unit(own - (own * shared).sum(-1, keepdims=True) * shared)
    return np.sqrt(cosine) * shared + np.sqrt(1 - cosine) * own


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def hard_decay(rng, shape):
    """Log decays: a third of them -20 (forgets all), a third 0 (keeps all), the rest between."""
    kind = rng.integers(3, size=shape)
    return np.choose(kind, [np.full(shape, -20.0), np.zeros(shape), -rng.exponential(0.3, shape)])


def packed_ids(rng, batch, time, longest, padding=True):
    """Segments of 1 to `longest` positions whose ids come back; padding anywhere, also inside one.

    With padding, the first row starts with some, the second ends with some and the third is all
    padding.
    """
    rows = np.empty((batch, time), np.int32)
    for row in rows:
        t = 0
        while t < time:
            length = rng.integers(1, longest + 1)
            row[t : t + length] = rng.integers(3)
            t += length
    if padding:
        rows[rng.random(rows.shape) < 0.2] = -1
        rows[:1, :2] = -1
        rows[1:2, -2:] = -1
        rows[2:3] = -1
    return rows


@dataclasses.dataclass(frozen=True)
class PairsCase:
    """Sizes and options of a call with queries, keys and values; `longest`: of packed segments.

    An operation's own Case adds what its `arrays` are made from.
    """

    time: int
    _: dataclasses.KW_ONLY
    longest: int | None = None
    batch: int = 2
    key_heads: int = 2
    heads: int = 2
    chunk_size: int | None = None
    scale: float | None = None
    dim: int = 6
    values: int = 3

    def build(self, seed=0):
        """inputs {argument: array}, options {argument: value} and the generator they come from."""
        rng = np.random.default_rng(seed)
        inputs, options = self.arrays(rng), self.options()
        if self.longest is not None:
            options["segment_ids"] = packed_ids(rng, self.batch, self.time, self.longest)
        return inputs, options, rng

    def options(self):
        return {"chunk_size": self.chunk_size, "scale": self.scale}

    @property
    def by_head(self):
        return self.batch, self.time, self.heads

    def pairs(self, rng, cosine):
        by_key_head = (self.batch, self.time, self.key_heads)
        return {
            "query": rng.normal(size=(*by_key_head, self.dim)),
            "key": correlated_keys(rng, *by_key_head, self.dim, cosine),
            "value": rng.normal(size=(*self.by_head, self.values)),
        }

    def memory(self, rng):
        return {"initial_state": rng.normal(size=(self.batch, self.heads, self.dim, self.values))}

    def decay(self, rng, kind):
        """The argument log_decay of a kind: None, "head", "step" or "channel"."""
        if kind is None:
            return {}
        if kind == "head":
            return {"log_decay": -rng.exponential(0.1, size=self.heads)}
        channels = (self.dim,) if kind == "channel" else ()
        return {"log_decay": hard_decay(rng, (*self.by_head, *channels))}


def float32_values(inputs):
    """The same inputs rounded to float32, still stored in float64."""
    return jax.tree.map(lambda x: x.astype(np.float32).astype(np.float64), inputs)


def with_gradients(function):
    """function(inputs) -> outputs becomes (inputs, cotangents) -> (outputs, gradients)."""

    def run(inputs, cotangents):
        outputs, backward = jax.vjp(function, inputs)
        cotangents = jax.tree.map(lambda c, o: c.astype(o.dtype), cotangents, outputs)
        return outputs, backward(cotangents)[0]

    return run


def cotangents_like(rng, outputs):
    return jax.tree.map(lambda x: rng.normal(size=x.shape), outputs)


def check_agreement(operation, oracle, inputs, options, rng):
    """`reference` against the oracle, `chunked` against `reference`, and `chunked` in float32.

    inputs: NumPy arrays by argument name, all of them differentiated; options: all the rest.
    """
    inputs = float32_values(inputs)
    outputs = oracle(**inputs, **{k: v for k, v in options.items() if k != "chunk_size"})
    cotangents = cotangents_like(rng, outputs)

    def call(form):
        return with_gradients(lambda x: operation(**x, **options, implementation=form))

    with jax.enable_x64(True):
        reference, chunked = jax.jit(lambda *xs: (call("reference")(*xs), call("chunked")(*xs)))(
            inputs, cotangents
        )
    assert_close(reference[0], outputs, 1e-11, "reference, oracle")
    assert_close(chunked, reference, 1e-9, "chunked, reference")
    values, gradients = jax.jit(call("chunked"))(inputs, cotangents)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((values, gradients)))
    assert_close(values, reference[0], 2e-5, "float32 values")
    assert_close(gradients, reference[1], 1e-4, "float32 gradients")


def check_16_bit(operation, inputs, options, rng):
    """bfloat16 inputs: nothing is lost but the rounding of what is returned.

    The measure is float64 on the same rounded inputs.
    """
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), inputs)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), narrow)

    def call(form):
        return with_gradients(lambda x: operation(**x, **options, implementation=form))

    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda x: operation(**x, **options), wide)
        cotangents = cotangents_like(rng, shapes)
        cotangents = jax.tree.map(
            lambda c: np.asarray(c.astype(jnp.bfloat16), np.float64), cotangents
        )
        exact = jax.jit(call("reference"))(wide, cotangents)
    values, gradients = jax.jit(call("chunked"))(narrow, cotangents)
    out = jax.tree.leaves(values)[0]
    assert out.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(gradients))
    assert_close(values, exact[0], 2**-8, "values")
    assert_close(gradients, exact[1], 2**-8, "gradients")


def check_transforms(call, forms, inputs, shared, rng):
    """vmap, forward mode, second derivatives and a mesh of two devices, in float64.

    call(form, inputs) -> outputs; forms: the reference and another; inputs: {argument: tree};
    shared: the arguments without a batch axis. An `initial_state` is left out on the mesh: the
    zeros made for it must vary over the mesh as the inputs do.
    """
    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Auto,), devices=jax.devices()[:2])
    rows, whole = PartitionSpec("rows"), PartitionSpec()
    inputs = jax.tree.map(lambda x: x.astype(np.float64), inputs)
    direction = cotangents_like(rng, inputs)

    def stateless(x):
        return {k: v for k, v in x.items() if k != "initial_state"}

    def transformed(function, x, direction, cotangents):
        def one_row(x):
            x = {k: v if k in shared else jax.tree.map(lambda y: y[None], v) for k, v in x.items()}
            return jax.tree.map(lambda y: y[0], function(x))

        def sharded(x):
            specs = {k: whole if k in shared else rows for k in x}
            return jax.shard_map(function, mesh=mesh, in_specs=(specs,), out_specs=rows)(x)

        def loss(x):
            both = zip(*map(jax.tree.leaves, (cotangents, function(x))), strict=True)
            return sum((c * y).sum() for c, y in both)

        return {
            "vmap": jax.vmap(one_row, in_axes=({k: None if k in shared else 0 for k in x},))(x),
            "shard_map": with_gradients(sharded)(stateless(x), cotangents),
            "jvp": jax.jvp(function, (x,), (direction,))[1],
            "second": jax.jvp(jax.grad(loss), (x,), (direction,))[1],
        }

    reference, other = (functools.partial(call, form) for form in forms)
    with jax.enable_x64(True):
        cotangents = cotangents_like(rng, jax.eval_shape(reference, inputs))
        want, found, plain, without = jax.jit(
            lambda x, direction: (
                transformed(reference, x, direction, cotangents),
                transformed(other, x, direction, cotangents),
                with_gradients(reference)(x, cotangents),
                with_gradients(reference)(stateless(x), cotangents),
            )
        )(inputs, direction)
    assert_close(found, want, 1e-9)
    assert_close(found["vmap"], plain[0], 1e-9)
    assert_close(found["shard_map"], without, 1e-9)
    # the derivative along a direction, once forward and once backward
    np.testing.assert_allclose(
        inner(want["jvp"], cotangents), inner(plain[1], direction), rtol=1e-9
    )


def inner(a, b):
    """The sum of all products of two trees."""
    pairs = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    return sum((np.asarray(x) * y).sum() for x, y in pairs)


@contextlib.contextmanager
def interpreted(form="mosaic_tpu", **options):
    """Where kernels run on a CPU as strictly as can be: memory starts as NaN, reads out of bounds
    and races are errors, parallel grid axes run in another order. Other forms are left alone.
    """
    if form != "mosaic_tpu":
        yield
        return
    parameters = pltpu.InterpretParams(detect_races=True, random_seed=1, **options)
    try:
        with pltpu.force_tpu_interpret_mode(parameters):
            yield
    except Exception:
        pltpu.reset_tpu_interpret_mode_state()
        raise


def check_the_future(operation, form, inputs, by_time, options, rng):
    """Steps from 11 on change nothing before them, to the last bit; nor does a second run.

    operation returns out and the state; by_time: the arguments that have other values from then on.
    """
    now = 11
    inputs = {k: x.astype(np.float32) for k, x in inputs.items()}
    later = {
        k: np.concatenate([x[:, :now], 0.5 * x[:, now:]], axis=1) if k in by_time else x
        for k, x in inputs.items()
    }
    shapes = jax.eval_shape(lambda x: operation(**x, **options), inputs)
    out, *state = cotangents_like(rng, shapes)
    out[:, now:] = 0
    cotangents = type(shapes)([out, *(0 * x for x in state)])
    run = jax.jit(with_gradients(lambda x: operation(**x, **options, implementation=form)))
    with interpreted(form):
        first, again, other = (run(x, cotangents) for x in (inputs, inputs, later))
    assert_same(again, first)
    out, changed = (np.asarray(outputs[0]) for outputs, _ in (first, other))
    assert (out[:, now:] != changed[:, now:]).any()
    assert_same(changed[:, :now], out[:, :now])
    assert_same(other[1], first[1])


GATES = ("log_decay", "value_log_decay", "beta", "sign", "phase", "dt")


def check_kernel(operation, inputs, options, rng):
    """`mosaic_tpu` against the float64 reference, values and all gradients, float32 inputs."""
    inputs = float32_values(inputs)

    def call(form):
        return with_gradients(lambda x: operation(**x, **options, implementation=form))

    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda x: operation(**x, **options), inputs)
        cotangents = cotangents_like(rng, shapes)
        exact = jax.jit(call("reference"))(inputs, cotangents)
    with interpreted():
        values, gradients = jax.jit(call("mosaic_tpu"))(inputs, cotangents)
    assert_close(values, exact[0], 5e-5, "values")
    for name, gradient in gradients.items():
        assert gradient.dtype == jnp.float32
        assert_close(gradient, exact[1][name], 2e-4 if name in GATES else 5e-5, name)


def check_kernel_16_bit(operation, inputs, options, rng, chunk, wide=(*GATES, "initial_state")):
    """bfloat16 inputs: nowhere more than twice as far off as the chunked form on a TPU.

    The measure is float64 on the same rounded inputs; those named in `wide` stay float32. Of each
    tensor, the worst head and stretch of `chunk` steps counts, by its own size.
    """
    narrow = {
        k: jnp.asarray(x, jnp.float32 if k in wide else jnp.bfloat16) for k, x in inputs.items()
    }
    exactly = {k: np.asarray(x, np.float64) for k, x in narrow.items()}

    def call(form):
        return with_gradients(lambda x: operation(**x, **options, implementation=form))

    with jax.enable_x64(True):
        shapes = jax.eval_shape(lambda x: operation(**x, **options), exactly)
        cotangents = jax.tree.map(
            lambda c: np.asarray(c.astype(jnp.bfloat16), np.float64), cotangents_like(rng, shapes)
        )
        exact = jax.jit(call("reference"))(exactly, cotangents)
    with mock.patch.object(jnp, "einsum", einsum_of_a_tpu):
        chunked = jax.jit(call("chunked"))(narrow, cotangents)
    with interpreted():
        kernel = jax.jit(call("mosaic_tpu"))(narrow, cotangents)
    found = [jax.tree.leaves_with_path(tree) for tree in (kernel, chunked, exact)]
    for (path, k), (_, c), (_, e) in zip(*found, strict=True):
        assert k.dtype == c.dtype
        label = jax.tree_util.keystr(path)
        limit = 2 * worst(c, e, chunk)
        assert worst(k, e, chunk) <= limit, f"{label}: {worst(k, e, chunk)} is above {limit}"


def worst(actual, expected, chunk):
    """The largest relative distance of a head's `chunk` steps (or of a whole, without time)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.isfinite(actual).all()
    if expected.ndim < 3:
        return np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    distances = []
    for start in range(0, expected.shape[1], chunk):
        part = np.s_[:, start : start + chunk]
        axes = (1, *range(3, expected.ndim))
        off = np.sqrt(((actual - expected)[part] ** 2).sum(axes))
        size = np.sqrt((expected[part] ** 2).sum(axes))
        distances.append((off / np.maximum(size, 1e-30)).max())
    return max(distances)


_einsum = jnp.einsum


def einsum_of_a_tpu(equation, *operands, precision=None):
    """jnp.einsum as the matrix unit takes it: DEFAULT precision rounds operands to bfloat16."""
    exact = _einsum_exactly(equation)
    if precision is not jax.lax.Precision.DEFAULT:
        return exact(*operands)
    return _rounded(equation, *operands)


def _einsum_exactly(equation):
    def exact(*operands):
        return _einsum(equation, *operands, precision=jax.lax.Precision.HIGHEST)

    return exact


def _round(x):
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _linear(forward, backward):
    """A linear function and its transpose, also inside the rule of a custom_jvp."""
    return functools.partial(
        jax.custom_derivatives.linear_call, lambda _, x: forward(x), lambda _, c: backward(c), ()
    )


def _identity(x):
    return x


def _rounded(equation, *operands):
    """The operands are rounded going forward, the cotangent going backward."""
    through = map(_linear(_round, _identity), operands)
    return _linear(_identity, _round)(_einsum_exactly(equation)(*through))

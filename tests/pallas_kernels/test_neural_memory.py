"""neural_memory: the two forms agree, and what the engine must equal: E1 to E32 of its notes.

Compilation is what these tests cost. Each case of the first test therefore joins several options;
`slow` has every loss, map and option by itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.pallas_kernels import delta_rule, linear_attention, neural_memory
from memseq.pallas_kernels.neural_memory import Loss, Memory, MemoryState, Retention
from memseq.pallas_kernels.neural_memory.losses import WITH_THRESHOLD
from tests.pallas_kernels.harness import assert_close, assert_same, cotangents_like

BATCH, TIME, HEADS, DIM, CHUNK = 2, 11, 2, 3, 4
LINEAR = Memory(residual=False, normalisation="none")
DEEP = Memory()
# borders inside a chunk and at its end, padding in front, between and behind; three segments
IDS = np.array([[-1, 0, 0, 0, 0, 0, -1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 6, -1, -1]], np.int32)
BY_TIME = ("query", "key", "value", "log_keep", "step", "momentum", "threshold")


def layers(rng, depth=2, bias=False, hidden=5, heads=HEADS, dim=DIM):
    sizes = [dim] + [hidden] * (depth - 1) + [dim]
    weights = [
        {"weight": rng.normal(size=(heads, n, m)) / np.sqrt(n)}
        for n, m in zip(sizes[:-1], sizes[1:], strict=True)
    ]
    for w in weights if bias else ():
        w["bias"] = 0.3 * rng.normal(size=w["weight"].shape[::2])
    return tuple(weights)


def inputs(depth=2, bias=False, momentum=True, keep=True, window=1, loss=None, seed=0, batch=BATCH):
    rng = np.random.default_rng(seed)
    lead = (batch, TIME, HEADS)
    arrays = {
        "query": rng.normal(size=(*lead, DIM)),
        "key": rng.normal(size=(*lead, DIM)),
        "value": rng.normal(size=(*lead, DIM)),
        "initial": layers(rng, depth, bias),
        "log_keep": -rng.exponential(0.2, size=lead) if keep else None,
        "step": 0.3 * rng.uniform(size=lead if window == 1 else (*lead, window)),
        "momentum": rng.uniform(size=lead) if momentum else None,
    }
    if loss is not None and loss.kind in WITH_THRESHOLD:
        arrays["threshold"] = rng.uniform(0.5, 2, size=lead)
    return arrays


def zeros(heads=HEADS, dim=DIM):
    return ({"weight": np.zeros((heads, dim, dim))},)


def part(arrays, where):
    return {k: x[:, where] if k in BY_TIME and x is not None else x for k, x in arrays.items()}


def floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def call(arrays, **options):
    """neural_memory in float64, compiled; options may change the defaults of these tests."""
    options = {"memory": LINEAR, "loss": Loss(), "update_chunk": CHUNK} | options
    with jax.enable_x64(True):
        return jax.jit(lambda x: neural_memory(**x, **options))(arrays)


def some_state(arrays, position):
    """A state after `position` [batch] steps of a chunk, of which window - 1 are remembered."""
    rng, window = np.random.default_rng(7), np.shape(arrays["step"])[3:]
    batch, heads = np.shape(arrays["key"])[0], np.shape(arrays["key"])[2]

    def draw(w):
        return rng.normal(size=(batch, *w.shape)) / 2

    three = [jax.tree.map(draw, arrays["initial"]) for _ in range(3)]
    recent = (batch, window[0] - 1 if window else 0, heads)
    return MemoryState(
        weights=three[0],
        anchor=three[1],
        momentum=() if arrays["momentum"] is None else three[2],
        recent_key=rng.normal(size=(*recent, DIM)),
        recent_value=rng.normal(size=(*recent, DIM)),
        recent_count=np.full((batch,), recent[1], np.int32),
        position=np.asarray(position, np.int32),
    )


def check_forms(arrays, before=None, **options):
    """chunked equals reference in values, the state and all gradients (E9).

    before: position in its chunk of each row's initial state; without it there is none.
    """
    options = {"memory": DEEP, "loss": Loss(), "update_chunk": CHUNK, **options}
    with jax.enable_x64(True):
        if before is not None:
            arrays = arrays | {"initial_state": some_state(arrays, before)}
        names = [k for k, x in arrays.items() if x is not None]
        taken = {k: arrays[k] for k in names}
        fixed = {k: None for k in arrays if k not in names}
        shapes = jax.eval_shape(lambda x: neural_memory(**x, **fixed, **options), taken)
        cotangents = cotangents_like(np.random.default_rng(9), floats(shapes))

        def both(x, cotangents):
            def loss(x, form):
                outputs = neural_memory(**x, **fixed, **options, implementation=form)
                pairs = zip(floats(outputs), cotangents, strict=True)
                return sum((y * c).sum() for y, c in pairs), outputs

            grad = jax.grad(loss, has_aux=True, allow_int=True)
            return grad(x, "reference"), grad(x, "chunked")

        (gradients, outputs), (others, other_outputs) = jax.jit(both)(taken, cotangents)
    assert_close(other_outputs, outputs, 1e-10)
    gradients, others = ({k: floats(g) for k, g in x.items()} for x in (gradients, others))
    assert_close(others, gradients, 1e-10)
    return outputs


JOINED = {
    "titans, packed": (dict(), dict(before=[3, -1], segment_ids=IDS)),
    "depth 3, biases": (dict(depth=3, bias=True, keep=False), dict()),
    "window 3, truncated": (
        dict(depth=1, window=3),
        dict(before=[2, 0], outer_grad=("truncate", 2), read="before"),
    ),
    "linear, lp, lq": (
        dict(depth=1, momentum=False),
        dict(loss=Loss("lp"), retention=Retention("lq", 4.0), segment_ids=IDS, max_segments=3),
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "depth" in n else ()) for n in JOINED]
)
def test_chunked_equals_reference(name):
    build, options = JOINED[name]
    check_forms(inputs(**build, loss=options.get("loss")), **options)


SINGLE = {
    **{kind: (dict(), dict(loss=Loss(kind))) for kind in ("dot", "huber", "huber_each", "robust")},
    **{
        f"{kind} retention": (
            dict(bias=True, momentum=kind == "softmax"),
            dict(retention=Retention(kind, amount), before=[2, -1], segment_ids=IDS),
        )
        for kind, amount in [
            ("clamp", 1.0),
            ("elastic", 0.05),
            ("sphere", None),
            ("row_norm", None),
            ("lq", 4.0),
            ("softmax", 2.0),
        ]
    },
    "anchor token": (dict(), dict(anchor="token", before=[0, 0])),
    "anchor decayed": (dict(), dict(anchor="decayed", before=[-1, 0])),
    "anchor call": (dict(), dict(anchor="call", before=[3, 1])),
    **{
        f"read {r}": (dict(), dict(read=r, before=[3, 1], segment_ids=IDS))
        for r in ("before", "chunk")
    },
    **{g: (dict(), dict(outer_grad=g)) for g in ("stop_anchor", "stop_writes")},
    "ttt": (
        dict(depth=2, bias=True, momentum=False, keep=False),
        dict(position_scale=1 / np.arange(1, CHUNK + 1), before=[3, 0], segment_ids=IDS),
    ),
    "ttt with softmax": (
        dict(depth=1, bias=True),
        dict(position_scale=1 / np.arange(1, CHUNK + 1), retention=Retention("softmax", 1.0)),
    ),
    "chunks of one": (dict(), dict(update_chunk=1, before=[0, -1])),
    "longer chunks": (dict(bias=True), dict(update_chunk=16, before=[13, 2])),
    "affine": (dict(), dict(affine={n: np.full((HEADS, DIM), 0.7) for n in ("scale", "offset")})),
    "rms, relu": (dict(depth=4), dict(memory=Memory("relu", False, "rms"))),
    "window across packed segments": (dict(window=4), dict(segment_ids=IDS, before=[2, 1])),
    "truncate, packed": (dict(depth=1), dict(outer_grad=("truncate", 1), segment_ids=IDS)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_every_option(name):
    build, options = SINGLE[name]
    check_forms(inputs(**build, loss=options.get("loss")), **options)


# What the engine equals -----------------------------------------------------------------------


def test_dot_loss_is_linear_attention_for_every_chunk():
    """E1, E2, E29."""
    x = inputs(depth=1, momentum=False) | {"initial": zeros()}
    with jax.enable_x64(True):
        ones = np.ones_like(x["step"])
        plain = linear_attention(
            x["query"], x["key"], x["value"], scale=1.0, implementation="reference"
        )[0]
        gated = linear_attention(
            x["query"],
            x["key"],
            x["value"] * x["step"][..., None],
            x["log_keep"],
            scale=1.0,
            implementation="reference",
        )[0]
    for chunk in (1, 4, TIME):
        found = call(x | {"step": ones, "log_keep": None}, loss=Loss("dot"), update_chunk=chunk)
        assert_close(found[0], plain, 1e-12, "E1")
        found = call(x, loss=Loss("dot"), update_chunk=chunk)
        assert_close(found[0], gated, 1e-12, "E2")


def test_squared_loss_at_every_token_is_the_delta_rule():
    """E3 to E7, the negative ones included."""
    x = inputs(depth=1, momentum=False) | {"initial": zeros()}
    plain, step, log_keep = x | {"log_keep": None}, x["step"], x["log_keep"]
    keep = np.exp(log_keep)
    with jax.enable_x64(True):
        options = {"scale": 1.0, "implementation": "reference"}
        three = [x["query"], x["key"], x["value"]]
        delta = delta_rule(*three, step, **options)[0]
        gated = delta_rule(*three, step, log_keep, **options)[0]
    assert_close(call(plain, anchor="token")[0], delta, 1e-12, "E3")
    assert_close(call(plain, update_chunk=1)[0], delta, 1e-12, "E3 by chunks of one")
    halved = call(plain | {"step": step / 2}, anchor="token", loss=Loss(scale=2.0))
    assert_close(halved[0], delta, 1e-12, "E4")
    assert_close(call(x, anchor="decayed")[0], gated, 1e-12, "E5")
    mapped = x | {"step": keep * step, "value": x["value"] / keep[..., None]}
    assert_close(call(mapped, anchor="token")[0], gated, 1e-12, "E6")
    assert np.abs(call(x, anchor="token")[0] - gated).max() > 0.01, "E6'"
    assert np.abs(call(plain, update_chunk=8)[0] - delta).max() > 0.01, "E7"


def test_one_batch_step_from_zero_is_linear_attention():
    """E8: TTT with the whole sequence as its chunk."""
    x = inputs(depth=1, momentum=False, keep=False) | {"initial": zeros()}
    x["step"] = np.full_like(x["step"], 0.5)
    scores = np.tril(np.einsum("bihd,bjhd->bhij", x["query"], x["key"]))
    want = np.einsum("bhij,bjhd->bihd", scores, x["value"])
    assert_close(call(x, loss=Loss(scale=2.0), update_chunk=TIME)[0], want, 1e-12)


def test_window():
    """E10: a window of one is none. E11: a linear memory is W (keep I - sum g k k^T) + sum g v k^T.

    E12, the banded form against the loop, is `test_chunked_equals_reference`."""
    x = inputs(depth=1, momentum=False, window=3)
    one = x | {"step": x["step"][..., :1]}
    assert_same(call(one), call(one | {"step": one["step"][..., 0]}))
    want = np.empty_like(x["value"])
    for b, h in np.ndindex(BATCH, HEADS):
        w = x["initial"][0]["weight"][h]  # [key_dim, value_dim]
        for t in range(TIME):
            near = [(g, t - i) for i, g in enumerate(x["step"][b, t, h]) if i <= t]
            erase = sum(g * np.outer(x["key"][b, j, h], x["key"][b, j, h]) for g, j in near)
            write = sum(g * np.outer(x["key"][b, j, h], x["value"][b, j, h]) for g, j in near)
            w = (np.exp(x["log_keep"][b, t, h]) * np.eye(DIM) - erase) @ w + write
            want[b, t, h] = x["query"][b, t, h] @ w
    assert_close(call(x, anchor="token")[0], want, 1e-12, "E11")


def test_proximal_steps_are_shorter_explicit_ones():
    """E16: argmin |W k - v|^2 / 2 + |W - W_before|^2 / (2 e) is a step e / (1 + e |k|^2)."""
    x = inputs(depth=1, momentum=False, keep=False)
    step = x["step"] / (1 + x["step"] * np.square(x["key"]).sum(-1))
    found = call(x | {"step": step}, anchor="token")[1].weights[0]["weight"]
    for b, h in np.ndindex(BATCH, HEADS):
        w = x["initial"][0]["weight"][h]
        for t in range(TIME):
            e, k, v = x["step"][b, t, h], x["key"][b, t, h], x["value"][b, t, h]
            w = np.linalg.solve(np.outer(k, k) + np.eye(DIM) / e, np.outer(k, v) + w / e)
        np.testing.assert_allclose(found[b, h], w, rtol=0, atol=1e-12)


def test_softmax_retention_is_multiplicative_weights():
    """E17: softmax(log w - e g) is w exp(-e g) / Z."""
    x = inputs(depth=1, momentum=False, keep=False)
    found, state = call(x, anchor="token", retention=Retention("softmax", 2.0))
    want = np.empty_like(found)
    for b, h in np.ndindex(BATCH, HEADS):
        w = 2 * _softmax(x["initial"][0]["weight"][h])
        for t in range(TIME):
            k, v = x["key"][b, t, h], x["value"][b, t, h]
            w = w * np.exp(-x["step"][b, t, h] * np.outer(k, k @ w - v))
            w = 2 * w / w.sum(axis=0)
            want[b, t, h] = x["query"][b, t, h] @ w
    assert_close(found, want, 1e-12)
    assert np.isfinite(state.weights[0]["weight"]).all()


def _softmax(x):
    e = np.exp(x - x.max(axis=0))
    return e / e.sum(axis=0)


def test_powers_and_thresholds_have_limits():
    """E18: powers of 2 are the squared loss. E19: a threshold that is never met, and always."""
    x = inputs(depth=1, momentum=False)
    half = call(x)[0]
    moneta = call(
        x | {"step": x["step"] / 2},
        loss=Loss("lp", power=2.0),
        retention=Retention("lq", 2.0),
    )
    assert_close(moneta[0], half, 1e-12, "E18")
    small = jax.tree.map(lambda y: y / 100, {k: x[k] for k in ("value", "initial", "step")})
    kept, plain = (call(x | small, retention=r)[0] for r in (Retention("lq", 4.0), None))
    assert_close(kept, plain, 1e-12, "norms below 1 divide nothing")
    far = x | {"threshold": np.full_like(x["step"], 1e6)}
    assert_close(call(far, loss=Loss("huber"))[0], half, 1e-12, "E19, infinite")
    near = 1e-3
    always = x | {"threshold": np.full_like(x["step"], near), "step": x["step"] / near}
    found, want = call(always, loss=Loss("huber"), anchor="token")[0], np.empty_like(half)
    for b, h in np.ndindex(BATCH, HEADS):
        w = x["initial"][0]["weight"][h]
        for t in range(TIME):
            k, r = x["key"][b, t, h], x["key"][b, t, h] @ w - x["value"][b, t, h]
            w = np.exp(x["log_keep"][b, t, h]) * w
            w = w - x["step"][b, t, h] * np.outer(k, r / np.linalg.norm(r))
            want[b, t, h] = x["query"][b, t, h] @ w
    assert_close(found, want, 1e-12, "E19, zero: the length, not the sum of absolute values")


def test_hope_with_its_own_values_erases_twice():
    """E22: W (keep I - e k k^T) - e (W k - v) k^T is a step of the loss |W k - v / 2|^2."""
    x = inputs(depth=1, momentum=False)
    found = call(x | {"value": x["value"] / 2}, anchor="token", loss=Loss(scale=2.0))[1]
    for b, h in np.ndindex(BATCH, HEADS):
        w = x["initial"][0]["weight"][h].T
        for t in range(TIME):
            e, k, v = x["step"][b, t, h], x["key"][b, t, h], x["value"][b, t, h]
            erase = np.exp(x["log_keep"][b, t, h]) * np.eye(DIM) - e * np.outer(k, k)
            w = w @ erase - e * np.outer(w @ k - v, k)
        np.testing.assert_allclose(found.weights[0]["weight"][b, h], w.T, rtol=0, atol=1e-12)


def test_two_writes_under_one_key():
    """Values 2 and 4, steps of 1: one after another 4, both from the start 6, with momentum 7."""
    key = np.zeros((1, 2, 1, 2)) + [1.0, 0.0]
    value = np.array([2.0, 4.0]).reshape(1, 2, 1, 1) * key
    x = {
        "query": key,
        "key": key,
        "value": value,
        "initial": zeros(1, 2),
        "log_keep": None,
        "step": np.ones((1, 2, 1)),
    }
    momentum = {"momentum": np.full((1, 2, 1), 0.5)}
    for want, more, chunk in ((4, {}, 1), (6, {}, 2), (7, momentum, 2)):
        assert_close(call(x | more, update_chunk=chunk)[0][0, -1, 0], np.array([want, 0.0]), 1e-12)


# What a memory does in time ---------------------------------------------------------------------


@functools.cache
def _stream():
    x = inputs()
    step = {"memory": DEEP, "loss": Loss(), "update_chunk": CHUNK}
    with jax.enable_x64(True):
        run = jax.jit(lambda x, state: neural_memory(**x, **step, initial_state=state))
        whole = jax.jit(lambda x: neural_memory(**x, **step, implementation="chunked"))(x)
    return x, run, whole


def test_decoding_equals_prefill_at_every_position():
    """E27; the first call, without a state, is one step long."""
    x, run, whole = _stream()
    with jax.enable_x64(True):
        out, state = neural_memory(
            **part(x, slice(0, 1)), memory=DEEP, loss=Loss(), update_chunk=CHUNK
        )
        outs = [out]
        for t in range(1, TIME):
            assert (np.asarray(state.position) == t % CHUNK).all()
            out, state = run(part(x, slice(t, t + 1)), state)
            outs.append(out)
    assert_close(jnp.concatenate(outs, axis=1), whole[0], 1e-12)
    assert_close(state, whole[1], 1e-12)


def test_split_calls_equal_one_call_and_short_ones_learn():
    """E28, at a cut inside a chunk; and two steps, fewer than a chunk, change what is read."""
    x = inputs(depth=1)
    options = {"implementation": "chunked"}
    whole = call(x, **options)
    out, state = call(part(x, slice(0, 5)), **options)
    rest, state = call(part(x, slice(5, TIME)) | {"initial_state": state}, **options)
    assert_close(jnp.concatenate([out, rest], axis=1), whole[0], 1e-12)
    assert_close(state, whole[1], 1e-12)
    short, untaught = (
        call(part(x, slice(0, 2)) | more, **options)[0]
        for more in ({}, {"step": np.zeros((BATCH, 2, HEADS))})
    )
    assert np.abs(short - untaught).max() > 0.01


def test_gates_at_their_ends():
    """E30: no step reads the initial memory; keep 0 and momentum 0 leave the last token alone."""
    x = inputs(depth=1)
    still = call(x | {"step": np.zeros_like(x["step"]), "log_keep": None})[0]
    initial = x["initial"][0]["weight"]
    assert_close(still, np.einsum("bthd,hde->bthe", x["query"], initial), 1e-12)
    gone = np.full_like(x["step"], -1000.0)
    now = x | {"log_keep": gone, "momentum": np.zeros_like(x["step"])}
    out, state = call(now, loss=Loss("dot"))
    for t in (0, 5, TIME - 1):
        q, k, v, e = (x[n][:, t] for n in ("query", "key", "value", "step"))
        want = (e * np.einsum("bhd,bhd->bh", q, k))[..., None] * v
        np.testing.assert_allclose(out[:, t], want, rtol=0, atol=1e-12)
    assert np.isfinite(state.weights[0]["weight"]).all()


@pytest.mark.parametrize("read", ["after", "before", "chunk"])
def test_causality(read):
    """E31: the future changes nothing; "before" sees no write of its step, "chunk" none of its
    chunk's."""
    x = inputs(depth=1)
    now = 6  # the third of its chunk
    changed = {k: v.copy() if k in BY_TIME else v for k, v in x.items()}
    for name in BY_TIME[1:6]:
        changed[name][:, now:] *= 0.5
    run = functools.partial(call, read=read, implementation="chunked")
    out, other = run(x)[0], run(changed)[0]
    first = {"after": now, "before": now + 1, "chunk": 8}[read]
    assert_same(other[:, :first], out[:, :first])
    assert (np.abs(other[:, first:] - out[:, first:]).max(axis=(0, 2, 3)) > 1e-6).all()


def test_order_within_a_chunk_does_not_matter_when_anchored():
    """E32: without decay and momentum; at every token it does."""
    x = inputs(depth=1, momentum=False, keep=False)
    order = np.arange(TIME)
    order[4:8] = [6, 4, 7, 5]
    permuted = {k: v[:, order] if k in BY_TIME and v is not None else v for k, v in x.items()}
    for anchor, same in (("chunk", True), ("token", False)):
        a, b = (call(y, anchor=anchor)[1].weights[0]["weight"] for y in (x, permuted))
        assert (np.abs(a - b).max() < 1e-12) == same
        assert np.isfinite(a).all() and np.isfinite(b).all()


def test_more_segments_than_allowed_give_nan():
    x = inputs(depth=1)
    for form in ("reference", "chunked"):
        out, state = call(x, segment_ids=IDS, max_segments=2, implementation=form)
        assert np.isnan(out[0]).all() and np.isnan(state.weights[0]["weight"][0]).all()
        assert np.isfinite(out[1]).all() and np.isfinite(state.weights[0]["weight"][1]).all()


def test_dtypes():
    """16-bit inputs: the state and the sums stay float32."""
    x = inputs()
    narrow = {k: jnp.asarray(v, jnp.bfloat16) if k in BY_TIME[:3] else v for k, v in x.items()}
    options = {"memory": DEEP, "loss": Loss(), "update_chunk": CHUNK}
    out, state = jax.eval_shape(lambda x: neural_memory(**x, **options), narrow)
    assert out.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in floats(state))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Memory("gleu"), "memory.activation: .*did you mean 'gelu'"),
        (lambda: Memory(normalisation="batch"), "memory.normalisation"),
        (lambda: Memory(epsilon=0), "memory.epsilon"),
        (lambda: Loss("l3"), "loss.kind"),
        (lambda: Loss("lp", power=0.5), "loss.power"),
        (lambda: Retention("lq"), "retention.amount: 'lq' expects a number"),
        (lambda: Retention("sphere", 1.0), "retention.amount: 'sphere' expects None"),
        (lambda: Retention("clamp", -1.0), "retention.amount: expected a positive"),
    ],
)
def test_bad_descriptions(build, message):
    with pytest.raises(ValueError, match=message):
        build()

"""Generation: prefill and decoding from a state, against the parallel forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memseq.models.generation import generate
from memseq.models.state import fork
from tests.models.harness import VOCAB, layout, small, tokens, with_params

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [7]]
KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, ids):
    return model.apply(params, ids)[0]


def likeliest(model, params, texts, counts, time=24):
    """The likeliest token after each of the last `counts` positions of each text, in one pass."""
    padded = np.zeros((len(texts), time), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    best = np.argmax(forward(model, params, padded), axis=-1)
    return [
        row[len(text) - 1 - n : len(text) - 1].tolist()
        for row, text, n in zip(best, texts, counts, strict=True)
    ]


@functools.cache
def case():
    return with_params(small())


def greedy(prompts=PROMPTS, steps=6, **options):
    model, params = case()
    return generate(model, params, prompts, steps=steps, key=KEY, temperature=0, **options)


def test_greedy_is_argmax_of_the_parallel_pass():
    """Ragged prompts; also after more prompts from the returned state."""
    first, state = greedy()
    more = [[2, 2], [8], [0, 11, 3]]
    second, _ = greedy(more, state=state)
    assert [len(row) for row in first + second] == [6] * 6
    texts = [a + b + c + d for a, b, c, d in zip(PROMPTS, first, more, second, strict=True)]
    model, params = case()
    assert likeliest(model, params, texts, [6] * 3) == second
    shorter = [a + b for a, b in zip(PROMPTS, first, strict=True)]
    assert likeliest(model, params, shorter, [6] * 3) == first
    assert len({token for row in first + second for token in row}) > 3


def test_ragged_is_single():
    together, states = greedy()
    for row, prompt in enumerate(PROMPTS):
        alone, state = greedy([prompt])
        assert alone == [together[row]]
        jax.tree.map(
            lambda a, b, i=row: np.testing.assert_allclose(a[:, i], b[:, 0], rtol=0, atol=2e-5),
            states,
            state,
        )


def test_sampling_is_a_function_of_the_key():
    """One key, one result; a row does not see its batch-mates; equal prompts go different ways."""
    model, params = case()

    def sample(prompts, key=KEY, temperature=1.0):
        return generate(model, params, prompts, steps=6, key=key, temperature=temperature)[0]

    want = sample(PROMPTS)
    assert sample(PROMPTS) == want
    assert sample(PROMPTS, jax.random.key(1)) != want
    assert sample([PROMPTS[0], [2] * 9, [0]])[0] == want[0]
    same = sample([[5, 5]] * 3)
    assert same[0] != same[1] != same[2]
    assert sample(PROMPTS, temperature=1e-6) == greedy()[0]


def test_top_k():
    """Only the k likeliest are drawn; of one the likeliest, whatever the temperature."""
    model, params = case()
    one, _ = generate(model, params, PROMPTS, steps=6, key=KEY, temperature=9.0, top_k=1)
    assert one == greedy()[0]


@functools.cache
def memoryless():
    """A model whose logits are the same at every position: all its tokens look alike."""
    model, params = with_params(small(("softmax_attention",), channel=None))
    table = params["params"]["embed"]["embedding"]
    params["params"]["embed"]["embedding"] = np.broadcast_to(table[:1], table.shape)
    logits = forward(model, params, tokens(2, 24))
    np.testing.assert_allclose(logits, np.broadcast_to(logits[0, 0], logits.shape), atol=1e-5)
    return model, params, np.asarray(logits[0, 0], np.float64)


@pytest.mark.parametrize(
    ("temperature", "top_k"), [(1.0, None), (2.0, None), (0.5, None), (1.0, 3), (3.0, 3)]
)
def test_frequencies(temperature, top_k):
    """Tokens come as often as softmax(logits / temperature) says, over the k likeliest."""
    model, params, logits = memoryless()
    drawn, _ = generate(
        model,
        params,
        [[1]] * 40,
        steps=100,
        key=jax.random.key(2),
        temperature=temperature,
        top_k=top_k,
    )
    scaled = logits / temperature
    if top_k is not None:
        scaled = np.where(logits >= np.sort(logits)[-top_k], scaled, -np.inf)
    want = np.exp(scaled - scaled.max())
    want /= want.sum()
    counts = np.bincount(np.ravel(drawn), minlength=VOCAB) / 4000
    np.testing.assert_allclose(counts, want, rtol=0, atol=4.5 * 0.5 / 4000**0.5)
    assert (counts[want == 0] == 0).all()


def test_fork():
    """One prompt read once, continued in three ways, as if each had been read in whole."""
    model, params = case()
    _, state = jax.jit(model.apply)(
        params, np.array([PROMPTS[0]]), model.init_state(1, context=64 + 6)
    )
    forked = fork(state, 3)
    got, _ = greedy([[1], [2], [3, 4]], state=forked)
    want, _ = greedy([PROMPTS[0] + [1], PROMPTS[0] + [2], PROMPTS[0] + [3, 4]])
    assert got == want
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:, :1]), state, forked)


def test_state_does_not_grow():
    """The state after many tokens has the shapes of the empty one, whatever the context."""
    model, _ = case()
    _, state = greedy()
    assert layout(state) == layout(model.init_state(3, context=64 + 6))
    recurrent = small(("gated_delta_net", "linear_attention"))
    assert layout(recurrent.init_state(3)) == layout(recurrent.init_state(3, context=10_000))
    example = jax.ShapeDtypeStruct((3, 1), jnp.int32)
    params = jax.eval_shape(recurrent.init, KEY, example)
    _, after = jax.eval_shape(recurrent.apply, params, example, recurrent.init_state(3))
    assert layout(after) == layout(recurrent.init_state(3))


def test_a_full_cache_is_an_error():
    """Positions that softmax attention has no room for: an error, not tokens drawn from nothing."""
    model, params = case()
    with pytest.raises(ValueError, match="state: expected room .* and 6 tokens"):
        greedy(state=model.init_state(3, context=10))
    _, growing = jax.eval_shape(model.apply, params, jax.ShapeDtypeStruct((3, 2), jnp.int32))
    with pytest.raises(ValueError, match="state: expected one of fixed size"):
        greedy(state=growing)
    with pytest.raises(ValueError, match="state: expected one row a prompt, 3, got 2"):
        greedy(state=model.init_state(2, context=90))


def test_parameters_that_are_not_finite():
    model, params = case()
    broken = jax.tree.map(lambda a: np.full_like(a, np.nan), params)
    with pytest.raises(ValueError, match="not a number"):
        generate(model, broken, PROMPTS, steps=6, key=KEY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "prompts: expected at least one prompt"),
        ({"prompts": [[1], []]}, "prompts: .* each of at least one token"),
        ({"prompts": [[1, VOCAB]]}, "prompts: expected token ids from 0 to 12, got 0 to 13"),
        ({"prompts": [[-2, 3]]}, "prompts: expected token ids from 0 to 12, got -2 to 3"),
        ({"steps": 0}, "steps: .* got 0"),
        ({"steps": 2.5}, "steps: expected an integer of at least 1, got 2.5"),
        ({"temperature": -0.1}, r"temperature: expected a number >= 0, got -0\.1"),
        ({"temperature": float("nan")}, "temperature: .* got nan"),
        ({"top_k": 0}, r"top_k: expected 1 to 13 \(the vocabulary\), got 0"),
        ({"top_k": 14}, "top_k: .* got 14"),
    ],
)
def test_bad_options(options, message):
    model, params = case()
    options = {"prompts": PROMPTS, "steps": 6, **options}
    with pytest.raises(ValueError, match=message):
        generate(model, params, options.pop("prompts"), key=KEY, **options)


@pytest.mark.slow
def test_two_thousand_steps():
    """A long decode is the parallel pass, token for token, and ends in the same state."""
    model, params = with_params(small(("gated_delta_net", "delta_net"), repeats=2))
    prompts = [[3, 1, 4], [1, 5]]
    drawn, state = generate(model, params, prompts, steps=2000, key=KEY)
    for row, (prompt, text) in enumerate(zip(prompts, drawn, strict=True)):
        ids = np.array([prompt + text], np.int32)
        logits, whole = jax.jit(model.apply)(params, ids)
        assert np.isfinite(logits).all()
        jax.tree.map(
            lambda a, b, i=row: np.testing.assert_allclose(a[:, i], b[:, 0], rtol=0, atol=1e-4),
            [part.memory for part in state],
            [part.memory for part in whole],
        )
    greedy_text, _ = generate(model, params, prompts, steps=2000, key=KEY, temperature=0)
    texts = [prompt + text for prompt, text in zip(prompts, greedy_text, strict=True)]
    same = [
        np.mean(np.equal(a, b))
        for a, b in zip(
            likeliest(model, params, texts, [2000] * 2, time=2003), greedy_text, strict=True
        )
    ]
    assert min(same) > 0.999  # two likeliest tokens can tie within rounding

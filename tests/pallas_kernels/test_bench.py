"""`memseq kernels`: its tables, and that the work it counts is the work that is done."""

import argparse
import re

import jax
import numpy as np
import pytest

from memseq import cli
from memseq.pallas_kernels import bench
from memseq.pallas_kernels.common.triangular import unit_lower_inverse


def arguments(**changes):
    defaults = {
        "action": "bench", "operation": "all", "batch": 1, "time": 32, "heads": 2, "dim": 4,
        "decay": "step", "chunk_size": 8, "repeats": 2, "shape": None,
    }  # fmt: skip
    return argparse.Namespace(**defaults | changes)


def test_table_of_forms(capsys):
    assert cli.main(["kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(bench.OPERATIONS)
    for name, line in zip(bench.OPERATIONS, lines[1:], strict=True):
        forms = ", ".join(bench.OPERATIONS[name].forms.available)
        assert forms.startswith("reference, chunked")
        assert re.match(rf"{name} +{forms} +[A-Z].*\.", line)


@pytest.mark.parametrize(
    "chosen", ["attention", "causal_conv", pytest.param("all", marks=pytest.mark.slow)]
)
def test_bench(chosen, capsys, monkeypatch):
    monkeypatch.setattr(bench, "MATMUL", 64)
    monkeypatch.setattr(bench, "PASS", 4096)
    assert bench.main(arguments(operation=chosen)) == 0
    out = capsys.readouterr().out
    assert jax.__version__ in out and "backend cpu" in out
    for name in bench.OPERATIONS:
        for form in ("reference", "chunked"):
            numbers = r"[\d.]+ +[\d.]+ +[\d.]+x +[\d.]+x faster"
            line = re.search(rf"^{name} +{form} +{numbers}$", out, re.MULTILINE)
            assert (line is not None) == (chosen in (name, "all")), (name, form)
        growth = re.findall(rf"^{name} +(\d+) +[\d.]+ +[\d.]+ +[\d.]+$", out, re.MULTILINE)
        assert growth == (["32", "64"] if chosen in (name, "all") else [])


def test_bench_of_a_named_shape(capsys, monkeypatch):
    """Of the operations that have one of this name."""
    monkeypatch.setattr(bench, "MATMUL", 64)
    monkeypatch.setattr(bench, "PASS", 4096)
    small = bench.OPERATIONS["attention"].shapes.SHAPES["odd"]._replace(batch=1, time=40)
    monkeypatch.setitem(bench.OPERATIONS["attention"].shapes.SHAPES, "small", small)
    assert bench.main(arguments(shape="small")) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^(\w+) +(?:reference|chunked) ", out, re.MULTILINE) == ["attention"] * 2
    assert "float32, small; medians" in out and "as time grows" not in out
    with pytest.raises(ValueError, match="^shape: expected one of .*'retnet_1.3b'.* got 'large'"):
        bench.main(arguments(operation="linear_attention", shape="large"))


@pytest.mark.parametrize("name", ["linear_attention", "delta_rule"])
def test_the_decay_asked_for_is_timed(name):
    shape = bench.OPERATIONS[name].shape
    decays = [shape(arguments(decay=kind)).decay for kind in ("none", "step", "channel")]
    assert decays == [None, "step", "channel"]
    with pytest.raises(ValueError, match="^decay: .* 'head'"):
        bench.main(arguments(operation=name, decay="head"))


def test_bench_of_an_unknown_operation():
    with pytest.raises(ValueError, match="^operation: expected one of 'all', .*mean 'delta_rule'"):
        bench.main(arguments(operation="deltarule"))


@pytest.mark.parametrize("name", bench.OPERATIONS)
def test_what_is_timed_has_the_sizes_asked_for(name):
    operation = bench.OPERATIONS[name]
    args = arguments(batch=3, time=40, heads=2, dim=8)
    inputs, _, both = bench._functions(operation, "chunked", args)
    for name, x in inputs.items():
        if name != "initial" and x.ndim > 2:  # the weights that a neural memory starts from
            assert x.shape[:2] == (3, 40) and set(x.shape[2:]) <= {1, 2, 8, 16}
    _, gradients = jax.eval_shape(both, inputs)
    shapes = (jax.tree.map(lambda x: x.shape, tree) for tree in (gradients, inputs))
    assert next(shapes) == next(shapes)


def multiply_adds(jaxpr):
    """The work of the matrix products of a program, those in loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * np.prod([shape[i] for i in contracted])
        times = equation.params.get("length", 1)
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                total += times * multiply_adds(getattr(inner, "jaxpr", inner))
    return int(total)


def chunked_products(name, **changes):
    operation = bench.OPERATIONS[name]
    args = arguments(batch=2, time=64, dim=6, **changes)
    shape = operation.shape(args)._replace(decay=None)
    inputs = jax.eval_shape(lambda: operation.shapes.example(shape, jax.random.key(0)))

    def call(inputs):
        return operation.function(**inputs, chunk_size=8, implementation="chunked")

    return shape, multiply_adds(jax.make_jaxpr(call)(inputs).jaxpr)


def test_products_are_those_that_the_chunked_form_takes():
    shapes = bench.OPERATIONS["linear_attention"].shapes
    shape, taken = chunked_products("linear_attention")
    assert shapes.forward_products(shape, 8) == taken
    shape, taken = chunked_products("delta_rule")
    systems = jax.ShapeDtypeStruct((shape.batch, shape.heads, shape.time // 8, 8, 8), np.float32)
    inverse = multiply_adds(jax.make_jaxpr(unit_lower_inverse)(systems).jaxpr)
    assert inverse > 0
    assert bench.OPERATIONS["delta_rule"].shapes.forward_products(shape, 8) == taken - inverse


@pytest.mark.parametrize("window", [None, 1, 5, 64, 100])
def test_products_of_attention_are_of_the_pairs_that_see_each_other(window):
    shapes = bench.OPERATIONS["attention"].shapes
    shape = shapes.Shape(2, 64, 1, 3, 7, window)
    i, j = np.ogrid[:64, :64]
    pairs = ((j <= i) & (i - j < (window or 64))).sum()
    assert shapes.forward_products(shape, 8) == 2 * 3 * pairs * 2 * 7

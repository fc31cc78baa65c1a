"""The study of experiments/timescales: its README has its tables, and its scripts run."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "experiments" / "timescales"
NAMES = ("study", "retention", "windows", "streams", "draw")


@pytest.fixture
def script(monkeypatch):
    """name -> that script of the folder, imported as it imports itself."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield lambda name: __import__(name)
    for name in NAMES:
        sys.modules.pop(name, None)


def test_the_readme_holds_the_tables_of_the_results(script):
    draw = script("draw")
    found, text = script("study").lines(), (FOLDER / "README.md").read_text()
    for table in (draw.retention_table, draw.windows_table, draw.streams_table):
        assert table(found) in text


def test_a_result_takes_the_place_of_its_like(script, tmp_path):
    study, path = script("study"), tmp_path / "lines.jsonl"
    for memory, value in (("a", 1), ("b", 2), ("a", 3)):
        study.record({"study": "x", "memory": memory, "value": value}, ("study", "memory"), path)
    assert [(line["memory"], line["value"]) for line in study.lines(path)] == [("b", 2), ("a", 3)]


@pytest.mark.slow
def test_a_delay_line_keeps_what_it_is_asked_for(script):
    """The measures on a memory that is known: LegT keeps its window and nothing behind it."""
    retention = script("retention")
    from memseq.layers import HiPPOMemory

    layer = HiPPOMemory(32, heads=8, order=32, measure="legt", method="zoh", window=64)
    params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 4, 32)))
    explained = retention.probe(layer, params)
    assert explained[:12].min() > 0.5 and explained[100:].max() < 0.05
    by_lag = retention.gradient(layer, params)
    assert np.isfinite(by_lag).all() and by_lag[1:60].min() > 100 * by_lag[100:].max()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("windows", ["--task=delayed_match", "--memory=LRU", "--steps=120"]),
        ("streams", ["--task=induction_heads", "--memory=Mamba", "--seconds=1", "--longest=1024"]),
    ],
)
def test_it_runs(script, monkeypatch, tmp_path, name, options):
    out = tmp_path / "lines.jsonl"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options, f"--out={out}"])
    script(name).main()
    (line,) = map(json.loads, out.read_text().splitlines())
    if name == "windows":
        assert line["solved"] >= 2 and line["accuracy"][0] > 0.98
    else:
        assert [length for length, _, _ in line["trained"]] == [16, 64, 256]
        assert list(line["tests"]) == ["64", "256", "1024"]

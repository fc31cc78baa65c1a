"""The tables of experiments/chunk_mismatch and experiments/needle say what their lines say."""

import importlib.util
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


def script(study):
    path = EXPERIMENTS / study / "run.py"
    spec = importlib.util.spec_from_file_location(f"experiments_{study}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("study", ["chunk_mismatch", "needle"])
def test_the_readme_holds_the_table_of_the_results(study):
    folder = EXPERIMENTS / study
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert lines and all(line["failed_at"] == -1 for line in lines)
    assert script(study).table(lines) in (folder / "README.md").read_text()


def test_shares_of_another_chunk():
    """Of TTT: cut, or 1 / i again, which is what zeros stand for; the rest stays."""
    params = {"block": {"share_bias": jnp.arange(1.0, 5.0)[None], "kernel": jnp.ones((1, 4))}}
    resized = script("chunk_mismatch").resized
    for chunk, want in ((2, [1, 2]), (4, [1, 2, 3, 4]), (6, [1, 2, 3, 4, 0, 0])):
        found = resized(params, chunk)["block"]
        np.testing.assert_array_equal(found["share_bias"], [want])
        assert found["kernel"] is params["block"]["kernel"]

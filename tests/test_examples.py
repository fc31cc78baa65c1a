"""A memory used from plain JAX, Flax Linen, Flax NNX and Equinox: the files in `examples`."""

import runpy
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))


def test_there_is_one_for_each_library():
    assert {"plain_jax", "linen", "nnx", "equinox"} <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, capsys):
    """Run as a script: it trains, streams as in parallel and is short enough to be read."""
    result = runpy.run_path(str(path), run_name="__main__")
    first, second = result["losses"]
    assert np.isfinite(first) and second < first
    whole, streamed = (np.asarray(result[name]) for name in ("whole", "streamed"))
    assert whole.shape == (2, 12, 16) and np.isfinite(whole).all()
    np.testing.assert_allclose(streamed, whole, rtol=0, atol=2e-5)
    assert "streamed is parallel: True" in capsys.readouterr().out
    assert len(path.read_text().splitlines()) < 50

"""What tests of TPU kernels need."""

import platform
import re
import sys
import tomllib
from pathlib import Path
from unittest import mock

import jax
import pytest

from memseq.pallas_kernels.aot import has_libtpu
from memseq.pallas_kernels.common.mosaic_tpu import scan

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture(scope="session")
def needs_libtpu():
    """Skips where the TPU compiler cannot be asked for; elsewhere a missing one is a failure.

    The extra `test` brings it wherever it exists. The environment of the oldest libraries, which
    has that extra's test runner only, goes without.
    """
    if has_libtpu():
        return
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("libtpu exists for Linux on x86-64 only")
    needs = tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]
    oldest = next(need.removeprefix("jax>=") for need in needs if need.startswith("jax>="))
    if re.match(rf"{re.escape(oldest)}(\.0)*$", jax.__version__):
        pytest.skip(f"the environment of the oldest libraries (jax {oldest}) is without libtpu")
    pytest.fail("libtpu is not installed, which the extra 'test' brings: pip install '.[test]'")


@pytest.fixture
def short_loops():
    """Scan kernels whose loops take two steps at a time: a fraction of the program to interpret."""
    with mock.patch.object(scan, "UNROLL", 2):
        yield

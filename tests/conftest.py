"""Settings that must stand before JAX starts: the CPU, eight devices of it, and quick compilation.

Most of a test's time is compilation of a program that runs once, so XLA's CPU backend does not
optimise, and what one test, worker or command has compiled, another finds in a folder that is
removed at the end, or by the next run where a run was killed. XLA_FLAGS, JAX_PLATFORMS and
JAX_COMPILATION_CACHE_DIR from outside are left as they are.
"""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
)
os.environ.setdefault("MPLBACKEND", "agg")


def remove_folders_of_dead_runs(temporary):
    """The folders in `temporary` named memseq-compiled-<process>-... whose process is gone."""
    for folder in Path(temporary).glob("memseq-compiled-[0-9]*-*"):
        try:
            os.kill(int(folder.name.split("-")[2]), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:  # a process of another user, so it lives
            continue


compiled = None  # the folder of compiled programs, where this process made it
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    remove_folders_of_dead_runs(tempfile.gettempdir())
    compiled = tempfile.mkdtemp(prefix=f"memseq-compiled-{os.getpid()}-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# The same examples in every run, and no limit on the time of one: the first of each shape compiles.
hypothesis.settings.register_profile("memseq", deadline=None, derandomize=True)
hypothesis.settings.load_profile("memseq")

MAPPINGS = Path("/proc/self/maps")
finished: list[str] = []


def pytest_unconfigure():
    if compiled:
        shutil.rmtree(compiled, ignore_errors=True)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Drops compiled programs before the kernel runs out of mappings for them.

    Each program has a few, a process may have 65,530, and thousands of tests compile more: LLVM
    then aborts. Where there is no such file there is no such limit.
    """
    finished.append(item.nodeid)
    if len(finished) % 16 or not MAPPINGS.exists():
        return
    if MAPPINGS.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()
        gc.collect()

"""Settings that must stand before JAX starts: the CPU, eight devices of it, and quick compilation.

Most of a test's time is compilation of a program that runs once, so XLA's CPU backend does not
optimise. XLA_FLAGS and JAX_PLATFORMS from outside are left as they are.
"""

import os

import hypothesis

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
)
os.environ.setdefault("MPLBACKEND", "agg")

# The same examples in every run, and no limit on the time of one: the first of each shape compiles.
hypothesis.settings.register_profile("memseq", deadline=None, derandomize=True)
hypothesis.settings.load_profile("memseq")

"""What the package is made of: metadata, pins, imports, wheel, links, the README's commands."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import jax
import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import memseq
from memseq import cli

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(
    line.partition(";")[0].split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)


def run_python(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_core_dependencies_are_four():
    names = [Requirement(need).name for need in PROJECT["dependencies"]]
    assert names == ["jax", "flax", "chex", "numpy"]
    assert set(PROJECT["optional-dependencies"]) == {"experiments", "tpu", "cuda", "test"}


def test_constraints_pin_everything():
    extras = PROJECT["optional-dependencies"]
    waiting = [*PROJECT["dependencies"], *extras["experiments"], *extras["test"]]
    seen = set()
    while waiting:
        need = Requirement(waiting.pop())
        name = canonicalize_name(need.name)
        wanted = [extra for extra in ("", *need.extras) if (name, extra) not in seen]
        if need.url or not wanted:
            continue
        assert name in PINS, f"{name} is not pinned"
        assert PINS[name] in need.specifier, f"{need} does not allow the pin {PINS[name]}"
        for extra in wanted:
            seen.add((name, extra))
            for further in importlib.metadata.requires(name) or ():
                marker = Requirement(further).marker
                if marker is None or marker.evaluate({"extra": extra}):
                    waiting.append(further)
    assert {name for name, _ in seen} == set(PINS), "pins of libraries that nothing needs"


def test_constraints_are_exact_and_name_no_index():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"#.*|[a-z0-9-]+==[0-9][0-9a-z.]*(; .+)?", line), line
        assert "://" not in line


def test_libraries_of_the_extra_are_known_to_the_command_line():
    wanted = {
        canonicalize_name(Requirement(need).name)
        for need in PROJECT["optional-dependencies"]["experiments"]
    }
    found = {
        canonicalize_name(distribution)
        for module, distributions in importlib.metadata.packages_distributions().items()
        for distribution in distributions
        if module in cli.EXPERIMENTS
    }
    assert wanted <= found, f"memseq.cli.EXPERIMENTS lacks {wanted - found}"
    installed = importlib.metadata.packages_distributions()
    assert set(installed) >= cli.EXPERIMENTS


def test_import_memseq_loads_nothing():
    code = (
        "import sys; before = set(sys.modules); import memseq; print(*(set(sys.modules) - before))"
    )
    assert run_python(code) == ["memseq"]


LOADED = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(*{name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names))
"""


@pytest.mark.parametrize("module", ["memseq.layers", "memseq.pallas_kernels"])
def test_imported_parts_load_only_jax_flax_and_chex(module):
    allowed = set(run_python(LOADED, "jax", "flax.linen", "chex"))
    assert set(run_python(LOADED, module)) - allowed == {"memseq"}
    assert not allowed & {"grain", "matplotlib", "tensorflow_datasets", "tensorboardX"}


def test_no_module_loads_tensorflow():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "memseq").rglob("*.py"))
    ]
    loaded = set(run_python(LOADED, *modules))
    assert not loaded & {"tensorflow", "torch", "clu"}


def test_wheel_holds_the_package_and_nothing_else():
    builder = WheelBuilder(str(ROOT))
    files = {file.distribution_path for file in builder.recurse_included_files()}
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "memseq").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files == sources
    assert {"memseq/py.typed", "memseq/layers/__init__.py"} <= files


def test_metadata():
    builder = WheelBuilder(str(ROOT))
    assert builder.metadata.version == memseq.__version__
    core = builder.metadata.core
    assert core.requires_python == ">=3.12"
    assert core.scripts == {"memseq": "memseq.cli:main"}
    assert core.license_expression == "Apache-2.0"
    assert (ROOT / ".python-version").read_text().strip() == "3.12"


@pytest.mark.parametrize("name", ["layers", "pallas_kernels"])
def test_top_links(name):
    link = ROOT / name
    assert link.is_symlink()
    assert os.readlink(link) == f"memseq/{name}"
    assert (link / "__init__.py").is_file()


def first_command(section):
    """The first fenced block under a heading of the README."""
    text = (ROOT / "README.md").read_text().partition(f"\n## {section}\n")[2]
    return re.search(r"^```\w*\n(.*?)^```", text, re.M | re.S)[1].strip()


@pytest.mark.parametrize("section", ["Run", "Test"])
def test_readme_commands(section):
    command = first_command(section)
    assert "\n" not in command
    script = ROOT / command.split()[0]
    assert script.is_file() and os.access(script, os.X_OK)
    assert "$" not in command and "/" not in command.removeprefix("scripts/")


def test_ci_runs_the_readmes_test_command():
    text = (ROOT / ".ci" / "run").read_text()
    extract = re.search(r"^test_command=\$\((.*)\)$", text, re.M)[1]
    done = subprocess.run(["bash", "-c", extract], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == first_command("Test")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_deprecations_are_errors():
    for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        with pytest.raises(kind):
            warnings.warn("old", kind, stacklevel=1)


def test_xla_flags_of_the_tests_take_effect():
    devices = re.search(r"host_platform_device_count=(\d+)", os.environ["XLA_FLAGS"])
    assert devices is None or jax.device_count("cpu") == int(devices[1])

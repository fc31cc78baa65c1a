"""Imports inside the package point down one list of layers, also the ones inside functions."""

import ast
from pathlib import Path

import pytest

import memseq

PACKAGE = Path(memseq.__file__).parent

# From top to bottom; a part may import itself and what stands below it.
ORDER = (
    "__main__",
    "cli",
    "evaluation",
    "training",
    "tasks",
    "data",
    "models",
    "layers",
    "pallas_kernels",
    "partitioning",
    "config",
)


def part_of(module: str) -> str | None:
    names = module.split(".")
    return names[1] if names[0] == "memseq" and len(names) > 1 else None


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_part_has_a_place():
    parts = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert parts - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("part", ORDER)
def test_imports_point_down(part):
    below = ORDER[ORDER.index(part) :]
    folder = PACKAGE / part
    files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
    for path in files:
        for module in imported(path):
            to = part_of(module)
            assert to is None or to in below or to == "__version__", f"{path} imports {module}"

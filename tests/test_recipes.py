"""The README's examples, and its recipes for a layer, a task and a config, to the letter."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def copy(tmp_path):
    for name in ("memseq", "configs", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def follow(root: Path, recipe: str) -> None:
    """Writes a recipe's files, linted. In a `diff`, a line with a plus goes below the last one."""
    blocks = re.findall(
        rf"^<!-- recipe: {recipe} -->\n```(\w+)\n# (\S+)\n(.*?)^```$", README, re.M | re.S
    )
    assert blocks, f"the README has no recipe for a {recipe}"
    for language, name, text in blocks:
        path = root / name
        if language == "python":
            assert not path.exists(), f"{name} exists already"
            path.write_text(text)
            continue
        lines = path.read_text().splitlines()
        place = 0
        for line in text.splitlines():
            if line.startswith("+"):
                lines.insert(place, line[1:])
                place += 1
            else:
                assert line[1:] in lines[place:], f"{name} has no line {line[1:]!r} below {place}"
                place = lines.index(line[1:], place) + 1
        path.write_text("\n".join(lines) + "\n")
    run(root, "ruff", "check", *(name for _, name, _ in blocks))


def run(root: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=root,
        # one device, as a user has it
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_layer(copy):
    follow(copy, "layer")
    passed = run(copy, "pytest", "-q", "tests/layers/test_laws.py", "-k", "exponential_decay")
    assert int(re.search(r"(\d+) passed", passed)[1]) >= 7
    assert "exponential_decay" in run(copy, "memseq", "layers", "--features=32")


def test_task(copy):
    follow(copy, "task")
    assert "first" in run(copy, "memseq", "tasks", "list")
    assert "question" in run(copy, "memseq", "tasks", "show", "first", "--variant=long")
    run(copy, "pytest", "-q", "tests/tasks", "-k", "first")


def test_config(copy):
    follow(copy, "config")
    config = "--config=configs/lm/two_memories.py:smoke"
    run(copy, "memseq", "train", config, "--workdir=run", "--config.data.data_dir=data")
    assert (copy / "run" / "metrics.jsonl").stat().st_size


def test_import_examples(tmp_path):
    section = re.search(r"^## Use a layer\n(.*?)^## ", README, re.M | re.S)[1]
    linen, plain, wrapped = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)
    script = tmp_path / "examples.py"
    script.write_text(
        f"{linen}\n"
        "import numpy as np\n"
        "np.testing.assert_allclose(first, y[:, :100], atol=2e-5)\n"
        "np.testing.assert_allclose(second, y[:, 100:], atol=2e-5)\n"
        f"{plain}\n"
        "assert out.shape == value.shape and state.shape == (2, 4, 16, 16)\n"
        "assert np.isfinite(out).all()\n"
        f"{wrapped}\n"
        "np.testing.assert_allclose(y, layer.apply(params, x)[0], atol=2e-5)\n"
    )
    code = "import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[2])"
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT, script], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

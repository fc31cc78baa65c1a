"""The set-up that scripts/run and scripts/test share, on made-up Pythons that install nothing."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("sh", "cat", "chmod", "cksum", "dirname", "mkdir", "rm", "rmdir", "sleep")

# Answers what the set-up asks of a Python, and logs that it made an environment or installed.
PYTHON = """#!/bin/sh
case "$*" in
    -V) echo "Python {version}" ;;
    *'%d.%d.%d'*) echo "{version}" ;;
    *'sys.exit(sys.version_info'*) exit {too_old} ;;
    *ensurepip*) exit {no_venv} ;;
    '-m venv '*)
        mkdir -p "$3/bin"; cat "$0" > "$3/bin/python"; chmod +x "$3/bin/python"
        echo venv >> "$LOG" ;;
    *fcntl*) exec '{real}' "$@" ;;
    '-m pip install '*)
        sleep "${{PIP_SECONDS:-0}}"
        echo pip >> "$LOG"
        exit "${{PIP_STATUS:-0}}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder (with a blank in its name) with what the set-up reads, and a script that uses it."""
    folder = tmp_path / "a checkout"
    for name in ("scripts/environment", "pyproject.toml", "constraints.txt", "memseq/__init__.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    script = folder / "scripts" / "probe"
    script.write_text(
        "set -eu\n"
        'root=$(cd "$(dirname "$0")/.." && pwd)\n'
        '. "$root/scripts/environment"\n'
        'echo "venv=$venv"\n'
    )
    return folder


@pytest.fixture
def tools(tmp_path):
    folder = tmp_path / "tools"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(shutil.which(tool))
    return folder


def make_python(path, version="3.12.9", no_venv=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    too_old = int(tuple(map(int, version.split("."))) < (3, 12))
    path.write_text(
        PYTHON.format(version=version, too_old=too_old, no_venv=no_venv, real=sys.executable)
    )
    path.chmod(0o755)


def refuse(path):
    """A pyenv shim whose version is not the one in force."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n")
    path.chmod(0o755)


def probe(checkout, *path, **environment):
    """Runs the script with `path` as its whole PATH; the log tells what the made-up Python did."""
    log = checkout.parent / "log"
    start = log.stat().st_size if log.exists() else 0
    done = subprocess.run(
        [shutil.which("sh"), checkout / "scripts" / "probe"],
        env={"PATH": os.pathsep.join(map(str, path)), "LOG": str(log), **environment},
        capture_output=True,
        text=True,
    )
    return done, (log.read_text()[start:] if log.exists() else "").split()


def assert_refused(done, said):
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("memseq: ") and done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr


def assert_made(done, log):
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("venv=")
    assert log == ["venv", "pip", "pip"]


def test_made_once(checkout, tools):
    make_python(tools / "python3")
    done, log = probe(checkout, tools)
    assert_made(done, log)
    assert done.stdout == f"venv={checkout}/.venv\n"
    done, log = probe(checkout, tools)
    assert (done.returncode, done.stderr, log) == (0, "", [])


def test_two_at_once_make_it_once(checkout, tools):
    make_python(tools / "python3")
    with ThreadPoolExecutor() as pool:
        started = [pool.submit(probe, checkout, tools, PIP_SECONDS="0.5") for _ in range(2)]
    (first, _), (second, _) = (future.result() for future in started)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert (checkout.parent / "log").read_text().split() == ["venv", "pip", "pip"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "memseq/__init__.py"])
def test_made_again_when_an_ingredient_changes(checkout, tools, name):
    make_python(tools / "python3")
    probe(checkout, tools)
    with (checkout / name).open("a") as file:
        file.write("\n")
    assert_made(*probe(checkout, tools))


def test_made_again_when_the_checkout_has_moved(checkout, tools):
    make_python(tools / "python3")
    probe(checkout, tools)
    moved = checkout.rename(checkout.with_name("elsewhere"))
    assert_made(*probe(moved, tools))


def test_made_again_when_its_python_has_gone(checkout, tools):
    make_python(tools / "python3")
    probe(checkout, tools)
    (checkout / ".venv" / "bin" / "python").unlink()
    assert_made(*probe(checkout, tools))


def test_failed_set_up_says_so_and_is_made_again(checkout, tools):
    make_python(tools / "python3")
    done, log = probe(checkout, tools, PIP_STATUS="1")
    assert done.returncode == 1
    assert "could not install the libraries" in done.stderr
    assert log == ["venv", "pip"]
    assert_made(*probe(checkout, tools))


def test_interrupted_set_up_is_made_again(checkout, tools):
    make_python(tools / "python3")
    probe(checkout, tools)
    # What a kill during the installation leaves: the folder, marked as ours, not as whole.
    (checkout / ".venv" / "memseq-stamp").write_text("")
    (checkout / ".venv" / "half").touch()
    assert_made(*probe(checkout, tools))
    assert not (checkout / ".venv" / "half").exists()


def test_someone_elses_environment_is_left_alone(checkout, tools):
    make_python(tools / "python3")
    keep = checkout / ".venv" / "keep"
    keep.parent.mkdir()
    keep.touch()
    done, log = probe(checkout, tools)
    assert_refused(done, "was not made by these scripts")
    assert log == [] and keep.exists()
    assert_made(*probe(checkout, tools, MEMSEQ_VENV=str(checkout / "other")))
    assert keep.exists()


def test_no_python(checkout, tools):
    done, _ = probe(checkout, tools)
    assert_refused(done, "Python 3.12 or newer is needed, but no Python was found; install it")


def test_too_old_python(checkout, tools):
    make_python(tools / "python3", version="3.11.7")
    done, _ = probe(checkout, tools)
    assert_refused(done, f"but found only Python 3.11.7 ({tools}/python3)")


def test_python_without_venv(checkout, tools):
    make_python(tools / "python3", version="3.13.1", no_venv=1)
    done, _ = probe(checkout, tools)
    assert_refused(done, "came without its venv module")


def test_newer_python_behind_an_older_one(checkout, tools, tmp_path):
    make_python(tmp_path / "first" / "python3", version="3.11.7")
    make_python(tmp_path / "second" / "python3", version="3.14.0")
    assert_made(*probe(checkout, tools, tmp_path / "first", tmp_path / "second"))


@pytest.mark.parametrize("known_by", ["PATH", "PYENV_ROOT", "HOME"])
def test_pyenv_whose_shim_refuses(checkout, tools, tmp_path, known_by):
    pyenv = tmp_path / "home" / ".pyenv"
    refuse(pyenv / "shims" / "python3")
    make_python(pyenv / "versions" / "3.11.7" / "bin" / "python3", version="3.11.7")
    make_python(pyenv / "versions" / "3.13.2" / "bin" / "python3", version="3.13.2")
    make_python(tmp_path / "old" / "python3", version="3.9.1")
    path = [tools, tmp_path / "old"] + [pyenv / "shims"] * (known_by == "PATH")
    environment = {
        "PATH": {},
        "PYENV_ROOT": {"PYENV_ROOT": str(pyenv)},
        "HOME": {"HOME": str(pyenv.parent)},
    }[known_by]
    assert_made(*probe(checkout, *path, **environment))


def test_chosen_python(checkout, tools, tmp_path):
    make_python(tools / "python3", version="3.13.2")
    make_python(tmp_path / "mine", version="3.12.1")
    assert_made(*probe(checkout, tools, MEMSEQ_PYTHON=str(tmp_path / "mine")))
    assert "3.12.1" in (checkout / ".venv" / "memseq-stamp").read_text()
    make_python(tmp_path / "mine", version="3.10.0")
    shutil.rmtree(checkout / ".venv")
    done, _ = probe(checkout, tools, MEMSEQ_PYTHON=str(tmp_path / "mine"))
    assert_refused(done, "is not a Python of version 3.12 or newer")

"""`kill -9` at the worst moments, then the same command: the numbers of an unharmed run."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from memseq.training.metrics import read_lines

ROOT = pathlib.Path(__file__).parent.parent.parent

# `memseq train` that kills itself when a moment comes, if asked with a model that compiles fast.
DRIVER = """
import os, signal, sys
from memseq import cli
from memseq.models import build
from memseq.training import loop
from memseq.training.checkpoints import Checkpoints
from tests.training.stand_in import Tiny

moment, number = sys.argv[1].split(":")

def killing(name, owner, step_of, after):
    inner = getattr(owner, name)
    def wrapped(self, *args, **options):
        def kill():
            if int(step_of(self, args)) == int(number):
                os.kill(os.getpid(), signal.SIGKILL)
        if not after:
            kill()
        result = inner(self, *args, **options)
        if after:
            kill()
        return result
    setattr(owner, name, wrapped)

if moment in ("before-save", "after-save"):
    killing("save", Checkpoints, lambda self, args: args[0].step, moment == "after-save")
elif moment == "in-step":
    killing("_log", loop._Run, lambda self, args: self.step, False)
if len(sys.argv) > 2 and sys.argv[2] == "tiny":
    build.language_model = lambda model: Tiny(features=8, vocabulary=model.vocab_size)
sys.exit(cli.main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(6):
        lines = (f"value_{number} = {(number * k * k) % 97}\n" for k in range(200))
        (folder / f"{number}.py").write_text("".join(lines))
    return folder


def command(text, workdir, moment, model, *overrides):
    return [
        sys.executable,
        "-c",
        DRIVER,
        moment,
        model,
        "train",
        f"--config={ROOT}/configs/lm/bytes.py:smoke",
        f"--workdir={workdir}",
        f"--config.data.path={text}",
        f"--config.data.data_dir={text.parent / 'prepared'}",
        "--config.train.length=16",
        "--config.train.log_every=1",
        *(f"--config.{override}" for override in overrides),
    ]


def environment(cache):
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
    }


def run(arguments, cache):
    done = subprocess.run(
        arguments, env=environment(cache), capture_output=True, text=True, timeout=600, check=False
    )
    return done.returncode, done.stderr


def outcome(workdir):
    """The metrics file, and what the last checkpoint says of arrays, data and counters."""
    last = max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    body = json.loads((workdir / "checkpoints" / str(last) / "meta" / "metadata").read_text())[
        "body"
    ]
    kept = {name: body[name] for name in ("step", "digests", "data", "counters")}
    return (workdir / "metrics.jsonl").read_text(), kept


def test_killed_at_the_worst_moments(text, tmp_path):
    overrides = ("train.steps=14", "checkpoint.every=4", "eval.every=7", "train.microbatches=2")
    whole, parts, cache = tmp_path / "whole", tmp_path / "parts", tmp_path / "cache"
    code, errors = run(command(text, whole, "never:0", "tiny", *overrides), cache)
    assert code == 0, errors
    begins = []
    for moment in ("in-step:3", "after-save:4", "before-save:8", "in-step:13"):
        code, errors = run(command(text, parts, moment, "tiny", *overrides), cache)
        assert code == -signal.SIGKILL, errors
        begins.append(list(read_lines(parts / "sessions.jsonl"))[-1]["step"])
    code, errors = run(command(text, parts, "never:0", "tiny", *overrides), cache)
    assert code == 0, errors
    # Saves are asynchronous: a kill may come before or after the write of step 4 was complete.
    assert begins in ([0, 0, 0, 0], [0, 0, 0, 4], [0, 0, 4, 4]), begins
    assert outcome(parts) == outcome(whole)
    leftovers = [p.name for p in (parts / "checkpoints").iterdir() if not p.name.isdigit()]
    assert leftovers == []


@pytest.mark.slow
def test_killed_at_random_moments(text, tmp_path):
    overrides = (
        "train.steps=30",
        "checkpoint.every=2",
        "eval.every=9",
        "model.pattern=linear_attention",
        "model.mixers={}",
        "model.features=16",
    )
    whole, parts, cache = tmp_path / "whole", tmp_path / "parts", tmp_path / "cache"
    code, errors = run(command(text, whole, "never:0", "real", *overrides), cache)
    assert code == 0, errors
    chance = random.Random(0)
    for attempt in range(20):
        process = subprocess.Popen(
            command(text, parts, "never:0", "real", *overrides),
            env=environment(cache),
            stderr=subprocess.PIPE,
            text=True,
        )
        sessions = parts / "sessions.jsonl"
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if sessions.exists() and len(list(read_lines(sessions))) > attempt:
                break
            time.sleep(0.02)
        time.sleep(chance.random() * 2)
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
    code, errors = run(command(text, parts, "never:0", "real", *overrides), cache)
    assert code == 0, errors
    assert outcome(parts) == outcome(whole)

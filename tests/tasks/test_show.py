"""What `memseq tasks` prints."""

import argparse
import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from memseq import tasks
from memseq.tasks import base, show


def printed(capsys, monkeypatch, width=100, **args):
    monkeypatch.setenv("COLUMNS", str(width))
    defaults = {"action": "show", "variant": None, "seed": 0}
    assert show.main(argparse.Namespace(**{**defaults, **args})) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= width
    return text


def test_list(capsys, monkeypatch):
    text = printed(capsys, monkeypatch, 70, action="list")
    for name, cls in tasks.REGISTRY.items():
        task = cls.preset()
        line = re.search(rf"^{name} .*$", text, re.M)[0]
        assert f"{task.chance:.3f}" in line and f"{task.ceiling:.3f}" in line
        assert all(variant in line for variant in cls.VARIANTS)
    assert "capacity" in text


def rows_of(text):
    """The rows of the example, put together from all blocks: name -> texts."""
    rows = {}
    for block in text.split("Example with seed")[1].split("\n\n")[1:-1]:
        lines = [line.split() for line in block.splitlines()]
        for line in lines:
            assert len(line) <= len(lines[0])
            rows.setdefault(line[0], []).extend(line[1:])
    return rows


@pytest.mark.parametrize("width", [60, 200])
def test_example_of_parity(capsys, monkeypatch, width):
    text = printed(capsys, monkeypatch, width, name="parity", seed=3)
    rows = rows_of(text)
    example = jax.jit(tasks.get("parity").example)(jax.random.key(3))
    assert rows["position"] == [str(position) for position in range(16)]
    assert rows["role"] == ["bit"] * 16
    assert rows["input"] == [str(token) for token in example["inputs"]]
    assert rows["target"] == [str(token) for token in example["targets"]]
    assert rows["ones"] == [str(count) for count in example["meta"]["ones"]]
    assert "chance      0.500: 1/2, as" in text and "ceiling     1.000: " in text
    assert "tested on   64 bits" in text


def test_example_of_rewrite(capsys, monkeypatch):
    text = printed(capsys, monkeypatch, 500, name="rewrite", variant="half")
    example = jax.jit(tasks.get("rewrite", "half").example)(jax.random.key(0))
    rows = rows_of(text)
    asked = [
        (str(position), str(target))
        for position, target in enumerate(example["targets"])
        if example["mask"][position]
    ]
    lines = text.splitlines()
    position, role, target = (
        next(line for line in lines if line.startswith(name))
        for name in ("position", "role", "target")
    )
    # A column ends where the text of its position ends.
    shown = []
    for match in re.finditer(r"query", role):
        shown.append(tuple(line[: match.end()].split()[-1] for line in (position, target)))
    assert shown == asked
    assert rows["input"][:2] == [str(token) for token in example["inputs"][:2]]
    assert ".." in rows["position"]  # a run of equal filler
    assert rows["updated"].count("yes") == rows["kept"].count("yes") == 4
    assert "updates: 4, rewrites: 1" in text
    for name in tasks.REGISTRY["rewrite"].META.keys() - {"updates", "rewrites"}:
        assert re.search(rf"^  {name} +\S", text, re.M), name


def test_narrow_terminal_and_padding(capsys, monkeypatch):
    text = printed(capsys, monkeypatch, 44, name="mqar", variant="paper", seed=3)
    assert "padding" in text and "pairs: 4" in text
    assert "a memory that stores" in " ".join(text.split())


def test_capacity(capsys, monkeypatch):
    for width in (60, 120):
        text = printed(capsys, monkeypatch, width, name="capacity")
        assert re.search(r"^ +32 +1 +0\.969 15\.5 +0\.730", text, re.M)
        for rule in tasks.capacity.RULES:
            assert text.count(rule) >= 3
        assert "chance   0.004: 1 / candidates" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"name": "rewrit"}, "name: .*mean 'rewrite'"),
        ({"name": "capacty"}, "name: .*mean 'capacity'"),
        ({"name": "rewrite", "variant": "tinny"}, "variant: .*mean 'tiny'"),
        ({"name": "capacity", "variant": "tinny"}, "variant: .*mean 'tiny'"),
        ({"name": "rewrite", "seed": -1}, "seed: "),
        ({"name": "rewrite", "seed": 2**32}, "seed: "),
        ({"action": "shows"}, "action: .*mean 'show'"),
    ],
)
def test_bad_arguments(args, message):
    defaults = {"action": "show", "variant": None, "seed": 0}
    with pytest.raises(ValueError, match=message):
        show.main(argparse.Namespace(**{**defaults, **args}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Echo(base.Task):
    """Say what was said four positions ago."""

    vocab_size: int = 8
    length: int = 6

    SUMMARY = "say it again"
    ROLES = ("token",)
    VARIANTS = {"short": {}}
    chance = 1 / 8
    ceiling = 1.0

    def details(self):
        return "echo"

    def example(self, key):
        inputs = jax.random.randint(key, (self.length,), 0, self.vocab_size)
        asked = jnp.arange(self.length) >= 4
        return {
            "inputs": inputs,
            "targets": jnp.where(asked, jnp.roll(inputs, 4), 0),
            "mask": asked,
            "meta": {"role": jnp.zeros(self.length, jnp.int32)},
        }


def test_a_task_is_one_class_and_one_line(capsys, monkeypatch):
    monkeypatch.setitem(tasks.REGISTRY, "echo", Echo)
    assert "say it again" in printed(capsys, monkeypatch, action="list")
    text = printed(capsys, monkeypatch, name="echo")
    assert rows_of(text)["target"][:4] == ["."] * 4
    task = tasks.get("echo", length=9)
    drawn = task.batch(jax.random.key(0), "test", 0, 5)
    assert float(task.scores(drawn["targets"], drawn)["accuracy"][1]) == 25

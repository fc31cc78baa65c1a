"""The script of experiments/sequential_digits runs, and its table says what its lines say."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "experiments" / "sequential_digits"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import train

    yield train
    sys.modules.pop("train")


def test_the_readme_holds_the_table_of_the_results(script):
    lines = [json.loads(line) for line in (FOLDER / "results.jsonl").read_text().splitlines()]
    assert script.table(lines) in (FOLDER / "README.md").read_text()


@pytest.mark.slow
def test_it_trains(script, monkeypatch, tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    config = FOLDER.parent.parent / "configs" / "digits" / "sequential.py"
    monkeypatch.setattr(sys, "argv", ["train.py", f"--config={config}:smoke", f"--out={out}"])
    script.main()
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["layer"] == "LRU" and 0.1 < line["accuracy"][-1][0] <= 1
    assert "| LRU |" in capsys.readouterr().out

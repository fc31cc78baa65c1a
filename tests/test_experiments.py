"""The studies of experiments/ that are recall configs: they load, and one shows what it claims."""

from pathlib import Path

import pytest

from memseq import cli
from memseq import config as configs
from memseq.evaluation import jobs, verdict
from memseq.evaluation.results import Folder

ROOT = Path(__file__).parent.parent
STUDIES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("experiments/*/config.py"))


@pytest.mark.parametrize("path", STUDIES)
def test_loads(path):
    base, smoke = (configs.load(f"{ROOT / path}{variant}") for variant in ("", ":smoke"))
    assert configs.differences(base, smoke)
    for claim in base.claims:
        verdict.parse_claim(claim)
    for memory in base.compare:
        for task in base.on:
            _, built, _, _ = jobs.build(base, memory, task)
            assert base.tasks[task].headline in jobs.score_names(built)


@pytest.mark.slow
def test_two_steps_with_strengths_to_2_track_s3(tmp_path):
    """80 CPU-seconds: trained on 12 permutations, at least 0.99 at positions 25 to 48."""
    config = ROOT / "experiments/state_tracking/config.py"
    options = ["--config.compare=two_steps_to_2", "--config.on=words", "--config.claims="]
    out = tmp_path / "run"
    assert cli.main(["recall", f"--config={config}", "--seeds=1", f"--out={out}", *options]) == 0
    (row,) = (row for row in Folder(out).rows() if row["kind"] == "trained")
    assert row["scores"]["25-48"] >= 0.99

"""What the test run does for itself."""

import os
import subprocess
import sys

from tests.conftest import remove_folders_of_dead_runs


def test_compiled_programs_of_a_killed_run_are_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left, living, another = (
        tmp_path / name
        for name in (
            f"memseq-compiled-{gone.pid}-a",
            f"memseq-compiled-{os.getpid()}-b",
            f"other-{gone.pid}-c",
        )
    )
    for folder in (left, living, another):
        folder.mkdir()
        (folder / "program").write_text("")
    remove_folders_of_dead_runs(tmp_path)
    assert set(tmp_path.iterdir()) == {living, another}

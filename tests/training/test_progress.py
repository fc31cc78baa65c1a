"""What a run shows: a bar on a terminal, a line now and then elsewhere."""

import io

import pytest
from rich.console import Console

from memseq.training.progress import RunProgress, duration


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(terminal, seconds_a_step, steps=10):
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=100, highlight=False)
    with RunProgress(steps, 4, console=console, interval=10.0, clock=clock) as progress:
        for step in range(5, steps + 1):
            clock.now += seconds_a_step
            progress.update(step, loss=1.5, tokens_per_second=2048.4)
        progress.say("done [really]")
    return out.getvalue()


def test_plain_lines_come_at_intervals_and_at_the_end():
    assert run(False, 1.0).splitlines() == [
        "step 10/10  loss 1.500  2,048 tokens/s  0s left",
        "done [really]",
    ]
    lines = run(False, 6.0).splitlines()
    assert lines[0] == "step 6/10  loss 1.500  2,048 tokens/s  24s left"
    assert [line.split()[1] for line in lines[:-1]] == ["6/10", "8/10", "10/10"]


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left():
    text = run(True, 1.0)
    assert "10/10" in text and "loss 1.500" in text and "2,048 tokens/s" in text
    assert "done [really]" in text and "0:00:0" in text


@pytest.mark.parametrize(
    "seconds, text",
    [(0.2, "0s"), (59.4, "59s"), (60, "1m00s"), (185, "3m05s"), (3600, "1h00m"), (7630, "2h07m")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text

"""The folder's lock, the wish to stop, the stopwatch and the profiler's window."""

import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from memseq.training.session import Profile, StopSignals, Stopwatch, claim_folder


def test_a_folder_has_one_holder_at_a_time(tmp_path):
    folder = tmp_path / "a" / "b"
    with claim_folder(folder):
        with pytest.raises(OSError, match="b is in use by another run"), claim_folder(folder):
            pass
    with claim_folder(folder):
        pass


def test_the_system_lets_go_of_a_killed_holder(tmp_path):
    code = (
        "import pathlib, sys, time; from memseq.training.session import claim_folder\n"
        "with claim_folder(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OSError, match="in use"), claim_folder(tmp_path):
            pass
        holder.send_signal(signal.SIGKILL)
    with claim_folder(tmp_path):
        pass


def test_a_file_in_the_way_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError), claim_folder(folder):
            pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_wish_and_handlers_are_put_back(number):
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal is number
    assert signal.getsignal(number) is before


def test_the_second_interrupt_interrupts():
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_stopwatch_adds_up(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 3.5, 4.5, 10.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    clock = Stopwatch()
    with clock("data"):
        pass
    with pytest.raises(ZeroDivisionError), clock("data"):
        _ = 1 / 0
    assert clock.split() == {"data": 3.0, "other": 7.0, "total": 10.0}


def test_the_profiler_traces_its_window(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: events.append("stop"))
    profile = Profile(tmp_path, {"start": 2, "stop": 4})
    for step in range(6):
        profile.before(step)
        events.append(step)
    profile.close()
    assert events == [0, 1, "start", 2, 3, "stop", 4, 5]


def test_a_window_that_the_run_ends_in_is_closed(tmp_path):
    profile = Profile(tmp_path / "profile", {"start": 0, "stop": 10})
    profile.before(0)
    np.testing.assert_array_equal(jnp.arange(3) + 1, [1, 2, 3])
    profile.close()
    profile.close()
    assert list((tmp_path / "profile").rglob("*.pb")) or list((tmp_path / "profile").rglob("*.gz"))


@pytest.mark.parametrize("window", [{"start": 3, "stop": 2}, {"start": -1, "stop": 2}])
def test_a_window_that_cannot_be_is_refused(tmp_path, window):
    with pytest.raises(ValueError, match="profile: got start"):
        Profile(tmp_path, window)
    Profile(tmp_path, {"start": 0, "stop": 0}).before(0)

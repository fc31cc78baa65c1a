"""Run jobs on several processes, one CPU core each, and hear how far they are.

The programs of the recall job are too small to use a second core well: two of them side by side
  take little more than half the time of one after the other. A worker that dies (killed for want of
  memory, say) costs the job it was on.
"""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from memseq import config as configs
from memseq.evaluation import jobs
from memseq.evaluation.jobs import Job
from memseq.pallas_kernels.common.checks import check_count


@dataclasses.dataclass(frozen=True)
class Event:
    """News of a job: it began or advanced (`rows` is None), or it ended with these rows."""

    worker: int
    job: Job
    step: int = 0
    steps: int = 1
    loss: float | None = None
    rows: list[dict[str, Any]] | None = None


@dataclasses.dataclass
class _Worker:
    number: int
    process: multiprocessing.process.BaseProcess
    job: Job | None = None


def choose_count(wanted: int, jobs_left: int) -> int:
    """How many processes to use.

    `wanted` 0 is one for each core the process may use, or 1 with an accelerator.
    """
    check_count("workers", wanted, 0)
    if wanted == 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        wanted = cores if jax.default_backend() == "cpu" else 1
    return max(1, min(wanted, jobs_left))


def run(config_json: str, todo: Sequence[Job], count: int, hear: Callable[[Event], None]) -> None:
    """Run all jobs, calling `hear` with each event, in this process and thread.

    With `count` 1 the jobs run here, one after the other. An exception in `hear` (an interrupt, a
    full disk) stops the workers and goes on to the caller.
    """
    if count == 1:
        config = configs.from_json(config_json)
        for job in todo:
            hear(Event(0, job))
            hear(Event(0, job, rows=jobs.run(config, job, _telling(0, job, hear))))
        return
    waiting = list(todo)
    alive: dict[multiprocessing.connection.Connection, _Worker] = {}
    try:
        for number in range(count):
            _start(number, config_json, alive)
        while alive:
            for connection in multiprocessing.connection.wait(list(alive)):
                _attend(connection, alive, waiting, config_json, hear)
        config = configs.from_json(config_json)
        for job in waiting:  # every worker ended before it asked for a job
            hear(Event(0, job, rows=jobs.failed(config, job, "no process could be started for it")))
    finally:
        for connection, worker in alive.items():
            worker.process.terminate()
            worker.process.join()
            connection.close()


def _attend(connection, alive, waiting: list[Job], config_json: str, hear) -> None:
    """Take one message of a worker, and give it the next job when it is free."""
    worker = alive[connection]
    try:
        event = connection.recv()
    except (EOFError, ConnectionResetError):
        del alive[connection]
        connection.close()
        worker.process.join()
        if worker.job is not None:
            config = configs.from_json(config_json)
            error = f"its process ended ({_cause(worker.process.exitcode)})"
            hear(Event(worker.number, worker.job, rows=jobs.failed(config, worker.job, error)))
            if waiting:
                _start(worker.number, config_json, alive)
        return
    if event is not None:
        hear(event)
    if event is None or event.rows is not None:
        worker.job = waiting.pop(0) if waiting else None
        with contextlib.suppress(BrokenPipeError):  # it has died meanwhile: the next wait tells
            connection.send(worker.job)
        if worker.job is not None:
            hear(Event(worker.number, worker.job))


def _start(number: int, config_json: str, alive) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve,
        args=(number, theirs, config_json),
        name=f"memseq-worker-{number}",
        daemon=True,  # it ends with this process, however that ends
    )
    with _inherited_by_workers():
        process.start()
    theirs.close()
    alive[ours] = _Worker(number, process)


@contextlib.contextmanager
def _inherited_by_workers() -> Iterator[None]:
    """What a new process finds: one thread for XLA, and a Ctrl-C that is not its own."""
    before = os.environ.get("PJRT_NPROC")
    os.environ["PJRT_NPROC"] = "1"
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)
        if before is None:
            del os.environ["PJRT_NPROC"]
        else:
            os.environ["PJRT_NPROC"] = before


def _serve(number: int, connection, config_json: str) -> None:
    """A worker's life: ask for a job, do it, until there is none or the parent has gone."""
    config = configs.from_json(config_json)
    try:
        connection.send(None)
        while (job := connection.recv()) is not None:
            rows = jobs.run(config, job, _telling(number, job, connection.send))
            connection.send(Event(number, job, rows=rows))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _telling(number: int, job: Job, hear: Callable[[Event], None]):
    return lambda step, steps, loss: hear(Event(number, job, step, steps, loss))


def _cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"killed by {name}" + (", often for want of memory" if name == "SIGKILL" else "")
    return f"exit status {exitcode}"

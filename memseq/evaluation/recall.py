"""`memseq recall`: train several memories on recall tasks, and show which one remembers what."""

import datetime
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from memseq import config as configs
from memseq.evaluation import capacity, console, jobs, report, verdict, workers
from memseq.evaluation.results import Folder, dated
from memseq.pallas_kernels.common.checks import check_count

# `--out` of the command when none is given: runs go into folders of their own, by date and time.
DEFAULT_OUT = "runs/recall"
COMPILE_SECONDS, SECONDS_PER_TOKEN = 8.0, 6e-6  # of one CPU core, to weigh jobs; only the time left


def main(args) -> int:
    """Run what `args.config` says, with `args.seeds`, into `args.out`, and write the report.

    An `--out` that already holds a run with the same settings is gone on with: only what is missing
    is trained. Returns 0, or 1 if no run finished.

    Raises:
      ValueError: the config, the seeds or the folder cannot be used.
      OSError: the folder cannot be written; finished rows are kept.
    """
    check_count("seeds", args.seeds, 1)
    config = configs.load(args.config, args.overrides)
    for text in config.claims:
        verdict.parse_claim(text)
    default = args.out is None or pathlib.Path(args.out) == pathlib.Path(DEFAULT_OUT)
    folder = Folder(dated(DEFAULT_OUT) if default else args.out)
    rows = folder.rows() if folder.results.exists() else []
    todo = jobs.plan(config, args.seeds, rows)
    costs = {job: _cost(config, job) for job in todo}
    closed_form = capacity.rows(config.capacity) if config.capacity else []
    count = workers.choose_count(config.workers, len(todo))
    folder.create()
    _write_manifest(folder, config, args)

    titles = {label: config.memories[label].title for label in config.compare}
    _announce(folder, config, todo, len(rows), count)
    try:
        if not any(row["kind"] == "closed_form" for row in rows):
            folder.append(closed_form)
        if todo:
            _train(folder, config, todo, costs, count, titles)
    except KeyboardInterrupt:
        print(f"stopped; the same command with --out={folder.path} goes on", file=sys.stderr)
        raise
    finally:  # an interrupt or a full disk: what is finished is worth a page
        finished = folder.rows()
        if any(row["status"] == "ok" for row in finished):
            report.write(folder)
    print(f"\n{report.summary(finished, folder.read_manifest())}")
    print(f"\nreport   {folder.report}\nnumbers  {folder.results}\npicture  {folder.picture}")
    trained = [row for row in finished if row["kind"] == "trained"]
    return 0 if any(row["status"] == "ok" for row in trained) else 1


def _cost(config: ConfigDict, job: jobs.Job) -> float:
    """About how many CPU-seconds a job takes; finds the config's mistakes about it on the way."""
    _, task, _, settings = jobs.build(config, job.memory, job.task)
    headline = config.tasks[job.task].headline
    names = jobs.score_names(task)
    if headline not in names:
        raise ValueError(
            f"config key 'tasks.{job.task}.headline' is {headline!r}, but the scores of the task "
            f"are {', '.join(names)}"
        )
    copies = len(job.seeds) * len(settings.learning_rates)
    tokens = copies * settings.steps * settings.batch * task.length
    return COMPILE_SECONDS + SECONDS_PER_TOKEN * tokens


def _train(
    folder: Folder,
    config: ConfigDict,
    todo: Sequence[jobs.Job],
    costs: Mapping[jobs.Job, float],
    count: int,
    titles: Mapping[str, str],
) -> None:
    names = {job: f"{config.tasks[job.task].title}: {titles[job.memory]}" for job in todo}
    headlines = {label: config.tasks[label].headline for label in config.on}

    def hear(event: workers.Event) -> None:
        if event.rows is not None:
            folder.append(event.rows)
        view.hear(event)

    # The longest first, so that no core ends up alone with a long job.
    ordered = sorted(todo, key=lambda job: -costs[job])
    with console.console(console.Progress(costs), names, headlines) as view:
        workers.run(configs.to_json(config), ordered, count, hear)


def _announce(folder: Folder, config: ConfigDict, todo, there: int, count: int) -> None:
    runs = sum(len(job.seeds) for job in todo)
    kept = f" ({there} rows are there already)" if there else ""
    processes = f"{count} processes" if count > 1 else "one process"
    print(
        f"{len(config.compare)} memories on {len(config.on)} tasks: {runs} runs{kept} "
        f"in {processes}, into {folder.path}",
        file=sys.stderr,
        flush=True,
    )


def _write_manifest(folder: Folder, config: ConfigDict, args) -> None:
    manifest: dict[str, Any] = {
        "command": shlex.join(
            ["memseq", "recall", f"--config={args.config}", f"--seeds={args.seeds}"]
            + list(args.overrides)
        ),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seeds": args.seeds,
        "config": config.to_dict(),
        **jobs.machine(),
    }
    folder.write_manifest(manifest)

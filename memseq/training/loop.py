"""The training loop of a language model, and the `memseq train` command.

A run lives in one folder; the same command goes on from the newest sound checkpoint in it.

    config.json         the resolved config
    parameters.txt      every parameter: shape, mesh axes, bytes on each device
    sessions.jsonl      a line for each start: code revision, versions, device, step it began at
    metrics.jsonl       losses and scores; the same file whether the run was interrupted or not
    timing.jsonl        speed, and where the time went
    tensorboard/        the same numbers for TensorBoard
    checkpoints/        see `memseq.training.checkpoints`
    profile/            a trace of the steps that `config.profile` asks for
    compilation_cache/  compiled programs, unless JAX_COMPILATION_CACHE_DIR says where
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import signal
import sys
from typing import Any

import jax

from memseq import config as configs
from memseq import partitioning
from memseq.data import context_model, pipeline
from memseq.data.tokens import VOCABULARY_SIZE
from memseq.models import build
from memseq.training import optimizers, session
from memseq.training import state as states
from memseq.training import step as steps
from memseq.training.checkpoints import CheckpointMismatch, Checkpoints, Restored
from memseq.training.metrics import JsonLines, Metrics
from memseq.training.progress import RunProgress, duration

BATCH_KEYS = ("tokens", "targets", "segment_ids", "weights")

# A resumed run keeps everything that decides what its numbers mean; these may change.
FREE_KEYS = ("data.data_dir", "data.held_out_mb")
FIXED_KEYS = ("model.", "data.", "seed", "train.batch", "train.length")


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a call of `train` ended.

    Attributes:
      step: steps done in all.
      bits_per_byte: of the held-out text after the last step; None if the run was stopped before.
      signal: the signal that stopped the run, or None.
    """

    step: int
    bits_per_byte: float | None
    signal: signal.Signals | None


def main(args) -> int:
    """`memseq train`: `args` has `config`, `workdir` and `overrides`. Returns the exit status."""
    session.quiet_storage()
    config = configs.load(args.config, args.overrides)
    if jax.config.jax_compilation_cache_dir is None:
        folder = pathlib.Path(args.workdir, "compilation_cache").absolute()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    try:
        summary = train(config, args.workdir)
    except FloatingPointError as error:
        print(f"memseq: error: {error}", file=sys.stderr)
        return 1
    return 128 + summary.signal if summary.signal else 0


def train(config: configs.ConfigDict, workdir: str | os.PathLike) -> Summary:
    """Trains as the config says, going on from what the folder holds.

    Raises:
      ValueError: a config that cannot work, a checkpoint of another config, no usable checkpoint.
      OSError: the folder cannot be written or another run uses it; a checkpoint cannot be saved.
      FloatingPointError: `config.train.max_skipped` steps in a row had no finite loss or gradient.
    """
    if jax.process_count() > 1:
        raise ValueError(f"training runs in one process, got {jax.process_count()} of them")
    workdir = pathlib.Path(workdir).absolute()
    mesh = partitioning.make_mesh(config.mesh)
    _check(config, mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(session.claim_folder(workdir))
        stack.enter_context(jax.set_mesh(mesh))
        stop = stack.enter_context(session.StopSignals())
        return _Run(config, workdir, mesh, stop, stack).run()


class _Run:
    """One session of a run: what `train` keeps at hand while it works."""

    def __init__(self, config, workdir, mesh, stop, stack):
        self.config, self.workdir, self.stop = config, workdir, stop
        self.clock = session.Stopwatch()
        self.batch_sharding = partitioning.batch_sharding(mesh)
        options = config.train
        with self.clock("init"):
            model = build.language_model(config.model)
            self.state_bytes = model.state_bytes(1, options.length)
            optimizer, schedule = optimizers.make_optimizer(config.optimizer, options.steps)
            self.state, shardings = states.sharded_initial_state(
                model, optimizer, config.seed, options.length, mesh
            )
            self.train_step = steps.make_train_step(
                model,
                optimizer,
                schedule,
                microbatches=options.microbatches,
                loss_chunk=options.loss_chunk,
                out_shardings=shardings,
            )
            self.eval_step = steps.make_eval_step(model, loss_chunk=options.loss_chunk)
        self.changed = {}  # config leaves that a resumed run has changed: {key: (old, new)}
        with self.clock("restore"):
            folder = workdir / "checkpoints"
            self.checkpoints = Checkpoints(folder, keep=config.checkpoint.keep)
            stack.enter_context(self.checkpoints)
            restored = self.checkpoints.restore(_structs(self.state), check=self._require_same_run)
        with self.clock("data"):
            sizes = {"batch": options.batch, "length": options.length}
            self.data = pipeline.train_iterator(config.data, seed=config.seed, **sizes)
            self.held_out = pipeline.held_out_batches(config.data, **sizes)
            self.compared = {}
        self.step = self.tokens = 0
        if restored:
            self.state, self.step = restored.state, restored.step
            self.tokens = restored.counters["tokens"]
            self.data.set_state(restored.data)
        self.waiting = None  # (step, tokens, metrics) of the latest step, perhaps still computing
        self.timed = (0.0, self.tokens)
        self.metrics = stack.enter_context(Metrics(workdir, last_step=self.step))
        self.profile = session.Profile(workdir / "profile", config.profile)
        stack.callback(self.profile.close)
        self.progress = stack.enter_context(RunProgress(options.steps, self.step))
        self._introduce(restored, mesh)

    def run(self) -> Summary:
        """Steps, scores and checkpoints until the end or a signal."""
        options, score = self.config.train, None
        if self.step in (0, options.steps):
            score = self._score(record=self.step == 0)
        while self.step < options.steps and not self.stop.signal:
            self._advance()
            if self._due(self.config.eval.every):
                score = self._score()
            if self._due(self.config.checkpoint.every) or self.stop.signal:
                self._save()
        with self.clock("save"):
            self.checkpoints.close()
        self._finish()
        done = self.step == options.steps
        return Summary(self.step, score if done else None, self.stop.signal)

    def _advance(self) -> None:
        """Dispatches a step, then logs the one before it, so that no device waits for the log."""
        with self.clock("data"):
            batch = next(self.data)
            self.tokens += int(batch["weights"].sum())
            batch = self._put(batch)
        self.profile.before(self.step)
        with self.clock("train" if self.waiting else "compile"):
            self.state, metrics = self.train_step(self.state, batch)
        self.step += 1
        self._log()
        self.waiting = (self.step, self.tokens, metrics)

    def _log(self) -> None:
        """Writes the metrics that wait, if any."""
        if self.waiting is None:
            return
        (step, tokens, metrics), self.waiting = self.waiting, None
        with self.clock("train"):
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        skipped = values["skipped_in_row"]
        if skipped == 1:
            self.progress.say(f"step {step} was skipped: its loss or gradient is not finite")
        every = self.config.train.log_every
        if step == 1 or step % every == 0 or step == self.config.train.steps or skipped:
            self.metrics.write("train", step, {**values, "tokens": tokens})
        speed = self._speed(tokens)
        if step % every == 0:
            self.metrics.write_timing("speed", step, {"tokens_per_second": speed})
        self.progress.update(step, values["loss"], speed)
        if skipped >= self.config.train.max_skipped:
            raise FloatingPointError(
                f"{skipped} steps in a row, up to step {step}, had a loss or gradient that is not "
                f"finite; the checkpoints in {self.checkpoints.directory} are as they were"
            )

    def _score(self, record: bool = True) -> float:
        """Bits per byte of the held-out text, shown beside the context models."""
        self._log()
        with self.clock("context models"):
            if not self.compared:
                fitted = context_model.reference_bits_per_byte(self.config.data)
                self.compared = {name: fitted[name] for name in ("order_2", "order_3")}
        with self.clock("eval"):
            pairs = [self.eval_step(self.state.params, self._put(batch)) for batch in self.held_out]
            nll, weight = (sum(map(float, column)) for column in zip(*pairs, strict=True))
        bits = nll / weight / math.log(2)
        if record:
            values = {"bits_per_byte": bits, "bytes": weight, **self.compared}
            self.metrics.write("eval", self.step, values)
        others = ", ".join(
            f"{name.replace('_', '-')} {value:.3f}" for name, value in self.compared.items()
        )
        self.progress.say(f"step {self.step}: held-out text {bits:.3f} bits/byte ({others})")
        return bits

    def _save(self) -> None:
        """A checkpoint; every line up to this step is in the files before it exists."""
        self._log()
        with self.clock("save"):
            self.checkpoints.save(
                self.state,
                data=self.data.get_state(),
                counters={"tokens": self.tokens},
                config=self.config,
            )

    def _due(self, every: int) -> bool:
        last = self.step == self.config.train.steps
        return last or bool(every) and self.step % every == 0

    def _put(self, batch) -> dict[str, jax.Array]:
        return {key: jax.device_put(batch[key], self.batch_sharding) for key in BATCH_KEYS}

    def _speed(self, tokens: int) -> float:
        """Tokens per second of training (not evaluation or saving) since the step logged before."""
        seconds = sum(self.clock.seconds.get(name, 0.0) for name in ("data", "train"))
        (before, tokens_before), self.timed = self.timed, (seconds, tokens)
        return (tokens - tokens_before) / max(seconds - before, 1e-9)

    def _require_same_run(self, old: configs.ConfigDict) -> None:
        changed = configs.differences(old, configs.from_json(configs.to_json(self.config)))
        free = (*FREE_KEYS, *self.config.checkpoint.get("may_differ", ()))
        fixed = [k for k in changed if k.startswith(FIXED_KEYS) and k not in free]
        if fixed:
            what = "; ".join(
                f"{key} was {changed[key][0]!r}, is {changed[key][1]!r}" for key in fixed
            )
            raise CheckpointMismatch(
                f"{self.workdir} holds a run with another config: {what}. "
                "Use the same values or another folder, or go on with another model on purpose by "
                "naming these keys in config.checkpoint.may_differ"
            )
        self.changed = changed

    def _introduce(self, restored: Restored | None, mesh) -> None:
        """Says what is about to happen, and keeps it in the folder."""
        _write(self.workdir / "config.json", configs.to_json(self.config))
        rows = partitioning.report(self.state.params, mesh)
        table = partitioning.format_report(rows)
        _write(self.workdir / "parameters.txt", table + "\n")
        sessions = JsonLines(self.workdir / "sessions.jsonl")
        sessions.write({"step": self.step, **configs.provenance()})
        sessions.close()
        total = f"{table.splitlines()[-1]}; {self.state_bytes:,} bytes of memory a sequence"
        self.progress.say(f"{self.workdir}: {total}")
        if restored:
            for step, reason in restored.skipped.items():
                self.progress.say(f"the checkpoint of step {step} cannot be used: {reason}")
            for key, (old, new) in self.changed.items():
                self.progress.say(f"config.{key} was {old!r}, is {new!r} from here on")
            self.progress.say(f"going on from the checkpoint of step {self.step}")

    def _finish(self) -> None:
        split = self.clock.split()
        self.metrics.write_timing("split", self.step, split)
        parts = ", ".join(f"{name} {duration(s)}" for name, s in split.items() if name != "total")
        self.progress.say(f"{duration(split['total'])}: {parts}")
        if self.stop.signal:
            self.progress.say(
                f"stopped by {self.stop.signal.name} after step {self.step}; "
                "the same command goes on from there"
            )


def _check(config: configs.ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Refuses numbers that cannot work before anything is made."""
    options = config.train
    positive = {f"train.{name}": options[name] for name in options}
    positive |= {
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
    }
    for key, value in positive.items():
        if value < 1:
            raise ValueError(f"config.{key}: got {value}, expected >= 1")
    if config.eval.every < 0:
        raise ValueError(
            f"config.eval.every: got {config.eval.every}, expected >= 0 (0: at the end)"
        )
    if config.model.vocab_size < VOCABULARY_SIZE:
        raise ValueError(
            f"config.model.vocab_size: got {config.model.vocab_size}, "
            f"expected >= {VOCABULARY_SIZE} (bytes and a document start)"
        )
    ways = math.prod(mesh.shape[axis] for axis in partitioning.BATCH_AXES)
    if options.batch % (options.microbatches * ways):
        raise ValueError(
            f"config.train.batch: got {options.batch}, expected a multiple of "
            f"{options.microbatches} (train.microbatches) times {ways} (devices that split it)"
        )


def _structs(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _write(path: pathlib.Path, text: str) -> None:
    """Replaces a file as a whole: a kill in between leaves the old one."""
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)

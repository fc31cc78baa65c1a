"""The `memseq` command: names of sub-commands and options, help texts and error messages.

Nothing heavy is imported here, so help and mistakes answer at once. A sub-command's work is done by
the `main(args)` of the module that `HANDLERS` names, imported only when it is asked for; it takes
the parsed options and returns the exit status. What each finds in `args`:

    train     config, workdir, overrides
    recall    config, seeds, out, overrides
    generate  workdir, prompt (list), steps, temperature, top_k, seed, step
    tasks     action ("list" or "show"); for "show" also name, variant, seed
    layers    features, context
    kernels   action (None, "compile" or "bench"); for "compile" also operation, target, shape,
              dtype, json; for "bench" operation, batch, time, heads, dim, decay, chunk_size,
              repeats

`overrides` lists the arguments `--config.KEY=VALUE` as they were typed, in their order.
A `ValueError` or an `OSError` of a handler is the user's to mend: it becomes one line on standard
error and exit status 2. Any other exception is a defect of memseq and keeps its traceback.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import memseq

HANDLERS = {
    "train": "memseq.training.loop",
    "recall": "memseq.evaluation.recall",
    "generate": "memseq.training.continue_text",
    "tasks": "memseq.tasks.show",
    "layers": "memseq.layers.table",
    "kernels": "memseq.pallas_kernels.bench",
}

# Import names of what memseq[experiments] asks for: one of these missing is no defect.
EXPERIMENTS = frozenset(
    ("absl", "array_record", "etils", "grain", "matplotlib", "ml_collections", "optax", "orbax")
    + ("rich", "sklearn", "tensorboardX", "tensorflow_datasets")
)


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors and help texts that keep their line breaks."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (options: {self.prog} --help)\n")

    def option(self, name: str, kind: Callable, default, meaning: str, metavar: str = "N") -> None:
        """Adds an option whose help ends with its default, unless that is None."""
        meaning += "" if default is None else " (default: %(default)s)"
        self.add_argument(name, type=kind, default=default, metavar=metavar, help=meaning)

    def option_names(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]


def number(kind: type, least: float, meaning: str) -> Callable:
    """A converter for argparse: text to `kind`, finite and at least `least`; `meaning` says so."""

    def convert(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected {meaning}, got {text!r}")
        return value

    return convert


count = number(int, 1, "a whole number of at least 1")
index = number(int, 0, "a whole number of at least 0")
amount = number(float, 0.0, "a number of at least 0")


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` with the known word closest to `word`, or an empty string."""
    bare = {name.lstrip("-"): name for name in known}
    close = difflib.get_close_matches(word.lstrip("-"), bare, n=1, cutoff=0.6)
    return f"; did you mean {bare[close[0]]!r}?" if close else ""


def build_parsers() -> dict[tuple[str, ...], Parser]:
    """The parsers of all commands by their path: `()`, `("train",)`, `("kernels", "bench")`."""
    parser = Parser(
        prog="memseq",
        description="Sequence models with associative memory: train them, measure what they\n"
        "remember, look inside.",
        epilog="Each command has its own help: memseq COMMAND --help\n"
        "JAX's own settings hold; JAX_PLATFORMS=cpu keeps everything on the CPU.",
    )
    parser.add_argument("--version", action="version", version=f"memseq {memseq.__version__}")
    parsers: dict[tuple[str, ...], Parser] = {(): parser}
    groups = {(): parser.add_subparsers(dest="command", metavar="COMMAND", required=True)}

    def command(*path: str, text: str, alone: bool = False) -> Parser:
        """Adds a sub-command; the first line of `text` is what its parent's help says of it.

        alone: its parent does something too when no sub-command follows.
        """
        above = path[:-1]
        if above not in groups:
            groups[above] = parsers[above].add_subparsers(
                dest="action", metavar="ACTION", required=not alone
            )
        summary = text.partition("\n")[0]
        made = groups[above].add_parser(path[-1], help=summary, description=text)
        made.add_argument("--traceback", action="store_true", help="show where an error was raised")
        parsers[path] = made
        return made

    train = command(
        "train",
        text="""\
Train a model as a config file says, or go on with a run that stopped.

  memseq train --config=configs/lm/bytes.py
  memseq train --config=configs/lm/bytes.py:smoke --workdir=runs/try
  memseq train --config=configs/lm/bytes.py --config.optimizer.learning_rate=3e-3

The run's folder receives the resolved config, the metrics (JSON lines and TensorBoard)
and the checkpoints. The same command with the same folder goes on from the newest good
checkpoint, whatever stopped the run before.""",
    )
    train.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="config file and its variant"
    )
    train.option(
        "--workdir", str, None, "folder of the run (default: runs/FILE or runs/FILE-VARIANT)", "DIR"
    )

    recall = command(
        "recall",
        text="""\
Train several memories on recall tasks and report which one remembers what.

  memseq recall --seeds=1
  memseq recall --seeds=3 --out=runs/three-seeds
  memseq recall --config=configs/recall/main.py:smoke

Prints a table and a verdict. The run's folder receives one self-contained HTML page with
the figures, and the numbers as JSON lines. With the folder of an earlier run, only what is
missing there is trained.""",
    )
    recall.option(
        "--config", str, "configs/recall/main.py", "what is trained on what", "FILE[:VARIANT]"
    )
    recall.option("--seeds", count, 1, "runs of each memory on each task")
    recall.option(
        "--out", str, None, "folder of the run (default: a new one in runs/recall)", "DIR"
    )
    for with_config in (train, recall):
        with_config.add_argument(
            "--config.KEY",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help="one entry of the config, as in --config.seed=3; any number of these",
        )

    generate = command(
        "generate",
        text="""\
Continue text with a trained language model, from its memory of the prompt.

  memseq generate --workdir=runs/bytes --prompt='def '
  memseq generate --workdir=runs/bytes --prompt='class ' --prompt='import ' --top-k=40

Prints each prompt with its continuation on standard output. Writes no files.""",
    )
    generate.add_argument(
        "--workdir", required=True, metavar="DIR", help="folder of a training run"
    )
    generate.add_argument(
        "--prompt",
        required=True,
        action="append",
        metavar="TEXT",
        help="text to continue; several of these are continued at once",
    )
    generate.option("--steps", count, 256, "tokens to add to each prompt")
    generate.option("--temperature", amount, 1.0, "divides the logits; 0: the likeliest token", "X")
    generate.option("--top-k", count, None, "draw among the N likeliest tokens (default: all)")
    generate.option("--seed", index, 0, "seed of the draws")
    generate.option("--step", index, None, "training step to load (default: the newest)")

    command(
        "tasks",
        text="""\
List the synthetic memory tasks, or show one with an annotated example.

  memseq tasks list
  memseq tasks show rewrite""",
    )
    command(
        "tasks",
        "list",
        text="""\
List the tasks with what each asks of a memory.

  memseq tasks list

Prints to standard output. Writes no files.""",
    )
    show = command(
        "tasks",
        "show",
        text="""\
Describe a task (sizes, chance level, ceiling) and annotate one example of it.

  memseq tasks show rewrite
  memseq tasks show parity --variant=tiny --seed=3

Prints to standard output. Writes no files.""",
    )
    show.add_argument("name", metavar="NAME", help="a task that `memseq tasks list` names")
    show.option("--variant", str, None, "preset of the task (default: the task's own)", "NAME")
    show.option("--seed", index, 0, "which example")

    layers = command(
        "layers",
        text="""\
List every layer: the shape of its memory, its bytes, its forms, its source paper.

  memseq layers
  memseq layers --features=1024 --context=32768

Prints a table to standard output. Writes no files.""",
    )
    layers.option("--features", count, 512, "width of the layers")
    layers.option("--context", count, 2048, "positions that a memory growing with time must hold")

    command(
        "kernels",
        text="""\
List the forms of the memory operations, compile their TPU kernels, or time them.

  memseq kernels
  memseq kernels compile
  memseq kernels bench

Without an action: which forms each operation has. Writes no files.""",
    )
    compiling = command(
        "kernels",
        "compile",
        alone=True,
        text="""\
Compile the TPU kernels ahead of time and tabulate what the compiler says of each.

  memseq kernels compile --target=v5e
  memseq kernels compile --operation=delta_rule --target=all --shape=all --json=kernels.json

A line for each operation, direction, target and shape: does it compile, its memory (VMEM), the
cycles of its schedule and the unit they use most, FLOPs, bytes, and what bounds it. Needs no TPU
and runs nothing, but needs libtpu (Linux on x86-64): pip install 'memseq[tpu]'. A line takes
some seconds. The exit status is 1 if a kernel does not compile.
Prints to standard output. Writes no files but that of --json.""",
    )
    compiling.option("--operation", str, "all", "the operation, or all of them", "NAME")
    compiling.option("--target", str, "all", "v5e, v5p, v6e, tpu7x, or all of them", "NAME")
    compiling.option(
        "--shape",
        str,
        "lab",
        "size of a model that the operation knows, lab (batch 1, time 2048, 16 heads of 128, with "
        "each kind of decay), named (the sizes of models), or all of them",
        "NAME",
    )
    compiling.option(
        "--dtype", str, "bfloat16", "of all but gates, which are float32; or float32", "NAME"
    )
    compiling.option("--json", str, None, "write the table's numbers and more to this file", "FILE")
    bench = command(
        "kernels",
        "bench",
        text="""\
Time the forms of the memory operations, forward and backward.

  memseq kernels bench
  memseq kernels bench --operation=delta_rule --time=1024 --repeats=9

Each time is shown as a ratio to the matmul floor: the time that three times the forward
products would take at the speed of one large matmul, measured in the same run.
Prints to standard output. Writes no files.""",
    )
    bench.option("--operation", str, "all", "the operation to time", "NAME")
    bench.option(
        "--shape",
        str,
        None,
        "size of a model that operations know, instead of the sizes below",
        "NAME",
    )
    bench.option("--batch", count, 1, "sequences")
    bench.option("--time", count, 4096, "positions of a sequence")
    bench.option("--heads", count, 4, "heads")
    bench.option("--dim", count, 64, "size of a head's keys and values")
    bench.option(
        "--decay", str, "step", "of linear_attention and delta_rule: none, step or channel", "KIND"
    )
    bench.option(
        "--chunk-size",
        count,
        None,
        "positions that the chunked form takes at once (default: 64; scans choose by platform)",
    )
    bench.option("--repeats", count, 5, "timed calls, of which the median counts")
    return parsers


def command_path(argv: Sequence[str], parsers: dict[tuple[str, ...], Parser]) -> tuple[str, ...]:
    """The sub-command that `argv` names; an unknown word is an error naming the nearest one."""
    path: tuple[str, ...] = ()
    for word in argv:
        below = [known[-1] for known in parsers if known and known[:-1] == path]
        if not below or word.startswith("-"):
            break
        if word not in below:
            hint = nearest(word, below) or f"; known: {', '.join(below)}"
            parsers[path].error(f"unknown command {word!r}{hint}")
        path += (word,)
    return path


def split_overrides(argv: Sequence[str], parser: Parser) -> tuple[list[str], list[str]]:
    """`argv` without its `--config.KEY=VALUE`, and those; unknown other options are errors."""
    rest, overrides = [], []
    known = parser.option_names()
    words = iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if name.startswith("--config.") and "--config.KEY" in known:
            value = None if equals else next(words, None)
            if not equals and (value is None or value.startswith("--")):
                parser.error(f"{name} has no value; write {name}=VALUE")
            overrides.append(word if equals else f"{name}={value}")
        elif name.startswith("--") and name not in known:
            parser.error(f"unknown option {name}{nearest(name, known)}")
        else:
            rest.append(word)
    return rest, overrides


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parsed and checked options; help, `--version` and mistakes leave by `SystemExit`."""
    parsers = build_parsers()
    path = command_path(argv, parsers)
    rest, overrides = split_overrides(argv, parsers[path])
    args = parsers[()].parse_args(rest)
    args.overrides = overrides
    if path == ("train",) and args.workdir is None:
        file, _, variant = args.config.partition(":")
        args.workdir = str(Path("runs", "-".join(filter(None, (Path(file).stem, variant)))))
    return args


def sentence(error: BaseException) -> str:
    """What an exception has to say, on one line."""
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*names, error.strerror])
    return " ".join(str(error).split()) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` (by default the process's) asks for; returns the exit status."""
    args = parse(list(sys.argv[1:] if argv is None else argv) or ["--help"])
    try:
        status = importlib.import_module(HANDLERS[args.command]).main(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read the output has gone, such as `head`. What is left of it must go somewhere, or
        # the interpreter complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if args.traceback or library not in EXPERIMENTS:
            raise
        message = (
            f"error: {library} is not installed; install it with: pip install 'memseq[experiments]'"
        )
        status = 2
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        message, status = f"error: {sentence(error)}", 2
    print(f"memseq: {message}", file=sys.stderr)
    return status

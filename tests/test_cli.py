"""The command line: help, mistakes and what a user sees of an error."""

import os
import re
import subprocess
import sys
import types

import pytest

from memseq import cli

PATHS = [path for path in cli.build_parsers() if path]


@pytest.fixture
def handler(monkeypatch):
    """`handler("train", f)`: `f(args)` stands in for the command's handler; returns the calls."""

    def install(command, function):
        calls = []

        def main(args):
            calls.append(args)
            return function(args)

        name = f"memseq_test_handler_{command}"
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(main=main))
        monkeypatch.setitem(cli.HANDLERS, command, name)
        return calls

    return install


def refused(capsys, *argv):
    """The one line that a command line with a mistake in it gets."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_of_every_command(capsys, path):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*path, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    name = "memseq " + " ".join(path)
    assert re.search(rf"^  {name}", out, re.M), "no example command"
    assert max(map(len, out.splitlines())) <= 100
    for action in cli.build_parsers()[path]._actions:
        assert action.help or action.dest == "action", f"{action.dest} is not explained"


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_examples_in_help_are_valid(path):
    examples = re.findall(r"^  memseq (.*)", cli.build_parsers()[path].description, re.M)
    assert examples
    for example in examples:
        args = cli.parse(
            [word.replace("'", "") for word in re.findall(r"(?:'[^']*'|\S)+", example)]
        )
        assert args.command == path[0]


def test_every_command_has_a_handler_and_is_listed(capsys):
    commands = {path[0] for path in PATHS}
    assert commands == set(cli.HANDLERS)
    with pytest.raises(SystemExit):
        cli.main([])
    out = capsys.readouterr().out
    for command in commands:
        assert re.search(rf"^    {command}\b", out, re.M)


def test_help_starts_without_jax():
    code = (
        "import sys, memseq.cli\n"
        "try: memseq.cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'jax', 'flax', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["xyz"], "known: train, recall, generate, tasks, layers, kernels"),
        (["kernels", "bnech"], "did you mean 'bench'?"),
        (["tasks"], "ACTION"),
        (["tasks", "show"], "NAME"),
        (["train"], "--config"),
        (["train", "--cofnig=a.py"], "unknown option --cofnig; did you mean '--config'?"),
        (["train", "--config=a.py", "--confi.seed=1"], "did you mean '--config'?"),
        (
            ["train", "--config=a.py", "--work=x"],
            "unknown option --work; did you mean '--workdir'?",
        ),
        (["train", "--config=a.py", "--config.seed"], "write --config.seed=VALUE"),
        (["train", "--config=a.py", "--config.seed", "--workdir=x"], "write --config.seed=VALUE"),
        (["generate", "--config.seed=1"], "unknown option --config.seed"),
        (["recall", "--seeds=0"], "--seeds: expected a whole number of at least 1, got '0'"),
        (["recall", "--seeds=two"], "got 'two'"),
        (["generate", "--workdir=x", "--prompt=a", "--temperature=nan"], "got 'nan'"),
        (["generate", "--workdir=x", "--prompt=a", "--temperature=inf"], "got 'inf'"),
        (["generate", "--workdir=x", "--prompt=a", "--temperature=-1"], "got '-1'"),
        (["generate", "--workdir=x"], "--prompt"),
        (["layers", "extra"], "extra"),
    ],
)
def test_mistakes_get_one_sentence(capsys, argv, said):
    assert said in refused(capsys, *argv)


def test_train_arguments(handler):
    calls = handler("train", lambda args: 0)
    words = ["--config=configs/lm/bytes.py:smoke", "--config.a.b=3", "--config.name", "x y"]
    assert cli.main(["train", *words, "--workdir", "w"]) == 0
    assert cli.main(["train", words[0]]) == 0
    assert cli.main(["train", "--config=configs/lm/bytes.py"]) == 0
    first, second, third = calls
    assert (first.config, first.workdir) == ("configs/lm/bytes.py:smoke", "w")
    assert first.overrides == ["--config.a.b=3", "--config.name=x y"]
    assert (second.workdir, second.overrides) == ("runs/bytes-smoke", [])
    assert third.workdir == "runs/bytes"


def test_recall_arguments(handler):
    calls = handler("recall", lambda args: 0)
    cli.main(["recall"])
    cli.main(["recall", "--config=a.py", "--config=b.py", "--seeds=3", "--out=d", "--config.x=1"])
    assert vars(calls[0]) == {
        "command": "recall",
        "config": "configs/recall/main.py",
        "seeds": 1,
        "out": None,
        "overrides": [],
        "traceback": False,
    }
    assert (calls[1].config, calls[1].seeds, calls[1].out) == ("b.py", 3, "d")
    assert calls[1].overrides == ["--config.x=1"]


def test_generate_arguments(handler):
    calls = handler("generate", lambda args: 0)
    cli.main(["generate", "--workdir=w", "--prompt=def ", "--prompt=--x", "--top-k=5", "--step=0"])
    (args,) = calls
    assert args.prompt == ["def ", "--x"]
    assert (args.steps, args.temperature, args.top_k, args.seed, args.step) == (256, 1.0, 5, 0, 0)


def test_other_arguments(handler):
    tasks, layers, kernels = (
        handler(name, lambda args: 0) for name in ("tasks", "layers", "kernels")
    )
    cli.main(["tasks", "list"])
    cli.main(["tasks", "show", "rewrite", "--variant=tiny", "--seed=4"])
    cli.main(["layers", "--features=64", "--context=9"])
    cli.main(["kernels", "bench", "--operation=delta_rule", "--chunk-size=32", "--dim=16"])
    assert tasks[0].action == "list"
    assert (tasks[1].action, tasks[1].name, tasks[1].variant, tasks[1].seed) == (
        *("show", "rewrite", "tiny", 4),
    )
    assert (layers[0].features, layers[0].context) == (64, 9)
    (bench,) = kernels
    assert (bench.operation, bench.batch, bench.time, bench.heads) == ("delta_rule", 1, 4096, 4)
    assert (bench.dim, bench.chunk_size, bench.repeats) == (16, 32, 5)


def fail_with(error):
    def function(args):
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            ValueError("features: got 3,\n  expected a multiple of 16"),
            2,
            "got 3, expected a multiple",
        ),
        (FileNotFoundError(2, "No such file or directory", "a.py"), 2, "error: a.py: No such file"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device"),
        (OSError("the corpus is empty"), 2, "error: the corpus is empty"),
        (ValueError(), 2, "error: ValueError"),
        (KeyboardInterrupt(), 130, "memseq: interrupted"),
        (ModuleNotFoundError("no grain", name="grain"), 2, "pip install 'memseq[experiments]'"),
        (ModuleNotFoundError("x", name="orbax.checkpoint"), 2, "error: orbax is not installed"),
    ],
)
def test_errors_of_handlers(capsys, handler, error, status, said):
    handler("layers", fail_with(error))
    assert cli.main(["layers"]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("memseq: ") and err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize(
    "error", [TypeError("a defect"), ModuleNotFoundError("x", name="memseq.nothing")], ids=repr
)
def test_defects_keep_their_traceback(handler, error):
    handler("layers", fail_with(error))
    with pytest.raises(type(error)):
        cli.main(["layers"])


@pytest.mark.parametrize(
    "error", [ValueError("x"), ModuleNotFoundError("x", name="grain")], ids=repr
)
def test_traceback_on_request(handler, error):
    handler("layers", fail_with(error))
    with pytest.raises(type(error)):
        cli.main(["layers", "--traceback"])


def test_exit_status_of_a_handler_is_kept(handler):
    handler("layers", lambda args: 7)
    assert cli.main(["layers"]) == 7


@pytest.mark.parametrize("lines", [1, 100_000], ids=["found when leaving", "found when printing"])
def test_closed_pipe_is_quiet(lines):
    code = (
        "import sys, types, memseq.cli as cli\n"
        "def main(args):\n"
        "    print('first', flush=True)\n"
        "    sys.stdin.read()\n"
        f"    for i in range({lines}): print(i)\n"
        "    return 0\n"
        "sys.modules['h'] = types.SimpleNamespace(main=main)\n"
        "cli.HANDLERS['layers'] = 'h'\n"
        "sys.exit(cli.main(['layers']))"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code]
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=buffered
    ) as child:
        assert child.stdout.readline() == "first\n"
        child.stdout.close()
        child.stdin.close()
        assert child.stderr.read() == ""
    assert child.returncode == 1


def test_python_dash_m():
    done = subprocess.run(
        [sys.executable, "-m", "memseq", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("memseq ")

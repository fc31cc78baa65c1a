"""The `memseq generate` command: continue text with a language model that `memseq train` made."""

import pathlib
import sys

import jax

from memseq.config import ConfigDict
from memseq.data.tokens import decode, encode
from memseq.models import build
from memseq.models.generation import generate
from memseq.training import session
from memseq.training.checkpoints import Checkpoints


def main(args) -> int:
    """`memseq generate`. Returns the exit status.

    Args:
      args: has `workdir`, `prompt` (a list), `steps`, `temperature`, `top_k`, `seed` and `step`.

    Raises:
      ValueError: no checkpoint, or none that can be used.
    """
    session.quiet_storage()
    texts = continuations(
        args.workdir,
        args.prompt,
        steps=args.steps,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
        step=args.step,
    )
    for number, (prompt, text) in enumerate(zip(args.prompt, texts, strict=True)):
        if number:
            print("-" * 40)
        print(prompt + text)
    return 0


def continuations(
    workdir: str | pathlib.Path,
    prompts: list[str],
    *,
    steps: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    step: int | None = None,
) -> list[str]:
    """What the run's model adds to each prompt; all prompts are continued at once.

    Args:
      workdir: the run's folder.
      prompts: the beginnings of documents.
      steps: tokens to add.
      temperature, top_k: as of `memseq.models.generation.generate`.
      seed: of the draws.
      step: which checkpoint; None is the newest sound one.

    Raises:
      ValueError: no checkpoint, or none that can be used.
    """
    folder = pathlib.Path(workdir).absolute() / "checkpoints"
    restored = Checkpoints(folder, read_only=True).restore_params(_parameter_structs, step)
    if restored is None:
        raise ValueError(f"{workdir} holds no checkpoint; make one with memseq train")
    for broken, reason in restored.skipped.items():
        print(f"the checkpoint of step {broken} cannot be used: {reason}", file=sys.stderr)
    model = build.language_model(restored.config.model)
    tokens, _ = generate(
        model,
        restored.state,
        [encode(prompt) for prompt in prompts],
        steps=steps,
        key=jax.random.key(seed),
        temperature=temperature,
        top_k=top_k,
    )
    return [decode(row) for row in tokens]


def _parameter_structs(config: ConfigDict):
    """The parameters that the config's model has, on one device."""
    model = build.language_model(config.model)
    tokens = jax.ShapeDtypeStruct((1, 1), "int32")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(model.init, jax.random.key(0), tokens),
    )

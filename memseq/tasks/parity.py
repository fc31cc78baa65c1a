"""Parity: the smallest task that needs a memory which can change sign."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from memseq.tasks import base
from memseq.tasks.bands import band_scores, check_bands

LABELS = ("every", "last")
ROLES = ("padding", "bit")


def ones_within(bits: jax.Array, window) -> jax.Array:
    """int32 [T]: ones among the last `window` bits, or all so far where there are fewer.

    bits int32 [T]; window may be traced.
    """
    total = jnp.cumsum(bits)
    out = jnp.arange(bits.size) - window  # the last one that does not count any more
    return total - jnp.where(out >= 0, total[jnp.maximum(out, 0)], 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(base.Task):
    """Whether the number of ones so far is odd, at lengths beyond those of training.

    Bits are fair and independent; token 1 is the bit 0, token 2 the bit 1, and 0 pads. The answer
    is the parity of all bits up to and with the present one, written as the token of that bit. An
    example, with `length=8` and `jax.random.key(0)`:

        inputs   1 2 2 2 2 1 1 2
        targets  1 2 1 2 1 1 1 2

    A diagonal or delta-rule memory whose transitions have only eigenvalues in [0, 1] cannot track
    parity at every length; write strengths up to 2, whose eigenvalues reach -1, can (Grazzi et al.
    2024, "Unlocking State-Tracking in Linear RNNs", arXiv 2411.12537; the setting of the `paper`
    variant is theirs).

    With a `window` of N bits the answer is the parity of the last N only: N-parity of
    Khajehabdollahi et al. 2024, "Emergent mechanisms for long timescales depend on training
    curriculum and affect performance in memory tasks". A bit has to be forgotten again, exactly,
    after N steps.

    Chance is 1/2, as the parity is still a fair coin when any one bit so far is not known. (A
    reader of only the last w bits is right at the first w positions and for half of the others.)

    Ceiling is reached by counting: the answer is a function of the bits.

    Attributes:
        vocab_size: number of token ids, at least 3.
        length: positions; with `min_length` below it, the number of bits is uniform from
            `min_length` to `length`.
        min_length: fewest bits; `None` means `length`.
        label: "every" position that has a bit, or the "last" one only.
        window: N, at most `min_length`, and positions before the N-th bit are not scored; `None`
            means all bits so far.
        bands: last positions (from 1) of the bands by which accuracy is split, ascending.

    Scores add `scaled_accuracy`, (accuracy - chance) / (1 - chance), and
    the accuracy of each band that the length reaches, as "17-32".
    """

    vocab_size: int = 4
    length: int = 16
    min_length: int | None = None
    label: str = "every"
    window: int | None = None
    bands: tuple[int, ...] = (16, 32, 64)

    SUMMARY: ClassVar[str] = "is the number of ones so far odd? Trained short, tested long"
    ROLES: ClassVar[tuple[str, ...]] = ROLES
    META: ClassVar[dict[str, str]] = {"ones": "ones among the bits that count"}
    VARIANTS: ClassVar[dict] = {
        "tiny": {"test": {"length": 64}},
        "paper": {
            "vocab_size": 3,
            "length": 40,
            "min_length": 3,
            "label": "last",
            "bands": (40, 80, 160, 256),
            "test": {"length": 256, "min_length": 40},
        },
        "window": {"length": 32, "window": 4, "test": {"length": 64}},
    }

    def __post_init__(self):
        base.check_integer("vocab_size", self.vocab_size, 3)
        base.check_integer("length", self.length, 1)
        base.check_name("label", self.label, LABELS)
        if self.min_length is not None:
            base.check_integer("min_length", self.min_length, 1)
        if self.fewest > self.length:
            raise ValueError(
                f"min_length: expected at most the length, {self.length}, got {self.fewest}"
            )
        if self.window is not None and base.check_integer("window", self.window, 1) > self.fewest:
            raise ValueError(f"window: expected at most {self.fewest} bits, got {self.window}")
        object.__setattr__(self, "bands", check_bands(self.bands))
        super().__post_init__()

    @property
    def fewest(self) -> int:
        return self.length if self.min_length is None else self.min_length

    @property
    def chance(self) -> float:
        return 0.5

    def details(self) -> str:
        bits = f"{self.fewest} to {self.length}" if self.fewest < self.length else f"{self.length}"
        where = "every position" if self.label == "every" else "the last position"
        last = "" if self.window is None else f" for the last {self.window}"
        return f"{bits} bits, scored at {where}{last}"

    def example(self, key: jax.Array) -> base.Example:
        bit_key, count_key = jax.random.split(key)
        time = jnp.arange(self.length)
        bits = jax.random.bernoulli(bit_key, 0.5, (self.length,)).astype(jnp.int32)
        count = jax.random.randint(count_key, (), self.fewest, self.length + 1)
        inside = time < count
        window = self.length if self.window is None else self.window
        ones = ones_within(bits, window)
        full = time >= (0 if self.window is None else window - 1)
        mask = inside & full if self.label == "every" else time == count - 1
        return {
            "inputs": jnp.where(inside, 1 + bits, 0),
            "targets": jnp.where(mask, 1 + ones % 2, 0),
            "mask": mask,
            "meta": {"role": inside.astype(jnp.int32), "ones": jnp.where(inside, ones, -1)},
        }

    def slices(self, predicted: jax.Array, correct: jax.Array, batch: base.Example) -> base.Scores:
        return band_scores(self, self.bands, correct, batch["mask"])

"""Accuracy by bands of positions, for tasks that are tested past the length of training."""

import jax
import jax.numpy as jnp

from memseq.tasks import base


def check_bands(bands: object) -> tuple[int, ...]:
    """The last positions (from 1) of the bands; `ValueError` unless they ascend."""
    bands = base.as_tuple(bands)
    if not isinstance(bands, tuple) or not bands:
        raise ValueError(f"bands: expected last positions, ascending, got {bands!r}")
    for band in bands:
        base.check_integer("bands", band, 1)
    if list(bands) != sorted(set(bands)):
        raise ValueError(f"bands: expected last positions, ascending, got {bands!r}")
    return bands


def band_scores(
    task: base.Task, bands: tuple[int, ...], correct: jax.Array, mask: jax.Array
) -> base.Scores:
    """`scaled_accuracy`, (accuracy - chance) / (1 - chance), and that of each band, as "17-32"."""
    right, asked = base.share(correct, mask)
    scores = {"scaled_accuracy": ((right - task.chance * asked) / (1 - task.chance), asked)}
    position = jnp.arange(1, mask.shape[-1] + 1)
    first = 1
    for last in bands:
        if first <= task.length:
            inside = mask & (first <= position) & (position <= last)
            scores[f"{first}-{last}"] = base.share(correct, inside)
        first = last + 1
    return scores

"""Models from configs."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from memseq.models.language_model import LanguageModel


def language_model(config: ConfigDict) -> LanguageModel:
    """The model that `config.model` describes; its keys are the fields of `LanguageModel`.

    `dtype` and `param_dtype` are names such as "bfloat16" (an empty dtype follows the parameters);
    an empty `channel` is none; `mixers` maps a layer's name to its options.
    """
    options = config.to_dict()
    for name in ("dtype", "param_dtype"):
        if name in options:
            options[name] = _dtype(name, options[name])
    if "channel" in options:
        options["channel"] = options["channel"] or None
    return LanguageModel(**options)


def _dtype(name: str, value: str | None):
    if not value:
        return None
    try:
        return jnp.dtype(value)
    except TypeError as error:
        raise ValueError(f"{name}: expected the name of a dtype, got {value!r}") from error
